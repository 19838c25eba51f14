"""The arguments of `peftlab evaluate`, checked as far as that needs no model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftlab.catalog import TASKS
from peftlab.commands.parsing import Parser, count
from peftlab.commands.preconditions import check_data_folder
from peftlab.errors import ConfigError, DataError, InputError, UnknownNameError

EVALUATE = "Score a run's adapter, a saved adapter, any model or a file of outputs on a split of a task."
EVALUATE_USAGE = """\
A file of outputs (--predictions) needs no model: it holds one answer on each line, or, as .jsonl, rows with the "id" of
an example and its "prediction". With --output, answers are written as they come; after a kill the same command goes on;
scores, answers and a page with examples (evaluation.html) lie in the folder. An adapter may be peft's own folder: then
say the --task.
--set takes the keys of `task` and `evaluation`: evaluation.decoding=beam, task.settings.language=java,
evaluation.perplexity=true for the model's perplexity over the references' tokens, evaluation.answers=likelihood to take
the label that a writing model finds the most likely.
--format peft writes a finished run as a result of peft's method_comparison, whose viewers then show it; the scores are
those that the run has written, or new ones where --num_samples, --data_dir, --batch_size or --set is given.

examples:
  peftlab evaluate last
  peftlab evaluate MODEL --task e2e_nlg --data_dir DIR --num_samples 100
  peftlab evaluate last --split validation --set evaluation.decoding=sample --set evaluation.top_p=0.9
  peftlab evaluate MODEL --task multi_nli --data_dir DIR --set evaluation.answers=likelihood
  peftlab evaluate --predictions outputs.txt --task e2e_nlg --data_dir DIR
  peftlab evaluate last --format peft --output results
"""
FORMATS = ("peft",)
_SECTIONS = ("task", "evaluation")
_OF_A_RUN = ("enabled", "before", "num_samples", "batch_size")
"""Keys of `evaluation` that say what a run does, or that have an argument of their own here."""


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """What a person wants scored.

    Attributes:
        reference: A run, an adapter or a model; None for a file of outputs alone.
        predictions: A file of outputs; None asks the model.
        arguments: What both ways of scoring take.
        batch_size: Most prompts decoded together; None is the run's.
        format: "peft" for the result file of peft's method_comparison, else None.
        anew: Whether the scores that a run has written are not the ones that are asked for.
    """

    reference: str | None
    predictions: Path | None
    batch_size: int | None
    arguments: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    anew: bool = True


def add_evaluate(parser: Parser) -> None:
    """The arguments of `evaluate`.

    Args:
        parser: The parser to add them to.
    """
    parser.add_argument(
        "reference",
        metavar="RUN|ADAPTER|MODEL",
        nargs="?",
        help="a run (path, name or last), an adapter's folder, or a model (folder or hub name)",
    )
    parser.add_argument(
        "--task", "--dataset", metavar="TASK", help="task to score on (default: the run's own)"
    )
    parser.add_argument("--data_dir", metavar="DIR", type=Path, help="folder with the data set's own files")
    parser.add_argument("--split", metavar="SPLIT", help="train, validation or test (default: test)")
    parser.add_argument(
        "--num_samples",
        metavar="N|all",
        help="examples to score, a seeded choice (default: a run's own count on its own task, else the task's, mostly"
        " 100; the interval shows how little that says)",
    )
    parser.add_argument("--batch_size", metavar="N", help="most prompts generated together")
    parser.add_argument(
        "--predictions", metavar="FILE", type=Path, help="score this file of outputs; no model is loaded"
    )
    parser.add_argument(
        "--format", metavar="FORMAT", help="peft: write a run as a result of peft's method_comparison"
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set a key of task or evaluation, see `peftlab list config`",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for scores and answers")


def read_evaluate(args: argparse.Namespace, directory: Path) -> EvaluateRequest:
    """Check a command line.

    Args:
        args: The parsed command line.
        directory: Where run folders lie.

    Returns:
        What is wanted.

    Raises:
        InputError: An argument is wrong, or two do not go together.
    """
    num_samples: int | Literal["all"] | None = (
        "all" if args.num_samples == "all" else count(args.num_samples, "num_samples")
    )
    batch_size = count(args.batch_size, "batch_size")
    task = TASKS.check(args.task) if args.task else None
    from peftlab.example_choice import check_split

    split = check_split(args.split or "test")
    check_data_folder(args.data_dir)
    if args.predictions is None and args.reference is None:
        raise InputError(
            "name a run, an adapter or a model to score, or a file of outputs with --predictions FILE"
        )
    if args.predictions is not None:
        if not args.predictions.is_file():
            raise DataError(f"there is no file {args.predictions} (--predictions)")
        if batch_size is not None:
            raise ConfigError("--batch_size has no effect on a file of outputs; leave it out")
    _check_format(args)
    asked = (args.num_samples, args.data_dir, args.batch_size, args.assignments)
    return EvaluateRequest(
        args.reference,
        args.predictions,
        batch_size,
        {
            "task": task,
            "data_dir": args.data_dir,
            "split": split,
            "num_samples": num_samples,
            "changes": _changes(args.assignments, decoded=args.predictions is None),
            "output": args.output,
            "directory": directory,
        },
        args.format,
        anew=any(asked),
    )


def _check_format(args: argparse.Namespace) -> None:
    """Refuse a format that there is not, or that has no place for what is scored."""
    if args.format is None:
        return
    if args.format not in FORMATS:
        raise UnknownNameError("format", args.format, FORMATS)
    if args.predictions is not None:
        raise ConfigError(
            "--format peft tells of a run's training, which a file of outputs has none of; leave it out"
        )
    if args.task is not None:
        raise ConfigError("--format peft tells of a run and its own task; leave --task out")
    if args.split not in (None, "test"):
        raise ConfigError(f"--format peft has places for test scores alone; leave --split {args.split} out")


def _changes(assignments: list[str], *, decoded: bool) -> dict[str, dict[str, Any]]:
    """What `--set` changes, by section."""
    if not assignments:
        return {}
    from peftlab.commands.overlay import nest
    from peftlab.commands.sources import drop_unknown, read_assignment

    values = nest([read_assignment(text) for text in assignments])
    problems = drop_unknown(values, method="lora")
    for section, keys in values.items():
        if section not in _SECTIONS or not isinstance(keys, dict):
            problems.append(
                f"--set {section}: evaluate takes the keys of task and evaluation, such as task.data_dir=DIR"
            )
            continue
        for key in keys:
            if section == "evaluation" and key in _OF_A_RUN:
                problems.append(
                    f"--set {section}.{key}: not for evaluate; see --num_samples and --batch_size"
                )
            elif section == "evaluation" and not decoded and key != "metrics":
                problems.append(f"--set {section}.{key} has no effect on a file of outputs; leave it out")
    if problems:
        raise ConfigError("\n".join(problems))
    return values
