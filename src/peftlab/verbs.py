"""The verbs of the command line: the arguments of each, and what it does.

Nothing heavy is imported before a verb needs it: lists, reports and config errors never load torch.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peftlab.commands import evaluating, experimenting, together
from peftlab.commands.flags import read_flags
from peftlab.commands.inspecting import INSPECT, INSPECT_USAGE, add_inspect, read_inspect
from peftlab.commands.parsing import (
    Parser,
    RunParser,
    add_settings,
    count,
    given_flags,
    read_bytes,
    read_prompts,
)
from peftlab.errors import ConfigError, InputError
from peftlab.evaluate_verb import add_evaluate, carry_evaluate
from peftlab.lists import LIST, LIST_USAGE, add_list, carry_list
from peftlab.transfers import TRANSFERS


class Verb(NamedTuple):
    """One verb of the command line.

    Attributes:
        text: What it does, one line.
        usage: Examples below its help.
        add: Adds its arguments to a parser.
        do: Carries it out and returns the exit code.
        parser: The class of its parser.
    """

    text: str
    usage: str
    add: Callable[[Parser], None]
    do: Callable[[argparse.Namespace], int]
    parser: type[Parser] = Parser


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection while small things are built: it makes a light command a tenth faster.

    Yields:
        Nothing; collection is on again afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _add_run(parser: Parser) -> None:
    """The arguments of `run`."""
    add_settings(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="RUN",
        help="go on with a stopped run (the last one where none is named) under its own settings",
    )


def _tell_once(note: str) -> None:
    """Show a note, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(note)


@no_collection()
def _config(args: argparse.Namespace) -> Any:
    """The config that a command line asks for, its places checked."""
    from peftlab.commands.preconditions import check_places
    from peftlab.commands.sources import config_from, read_assignment

    assignments = [read_assignment(text) for text in args.assignments] + read_flags(given_flags(args))
    config = config_from(
        config_file=args.config, preset=args.preset, assignments=assignments, tell=_tell_once
    )
    check_places(config)
    return config


def _run(args: argparse.Namespace) -> int:
    """Carry out `peftlab run`."""
    if args.resume is not None:
        return _resume(args)
    config = _config(args)
    from peftlab.execute import execute

    execute(config)
    return 0


def _resume(args: argparse.Namespace) -> int:
    """Carry out `peftlab run --resume`."""
    given = [f"--{flag.name}" for flag, _ in given_flags(args) if flag.name != "output_dir"]
    given += [f"--set {text}" for text in args.assignments]
    given += [f"--preset {args.preset}"] if args.preset else []
    given += [str(args.config)] if args.config else []
    if given:
        raise ConfigError(
            f"--resume goes on with the run's own settings, so {', '.join(given)} cannot be given too;"
            " start a new run for other settings"
        )
    from peftlab.config import build_config
    from peftlab.files import read_yaml

    folder = _find_run(args.resume, args.output_dir)
    config = build_config(read_yaml(folder / "config.yaml"))
    from peftlab.execute import execute

    execute(config, resume=folder)
    return 0


def _together(args: argparse.Namespace) -> int:
    """Carry out `peftlab together`."""
    if args.resume:
        folders = together.read_resumed(args, _find_run)
        from peftlab.together import resume_together

        resume_together(folders)
        return 0
    configs = together.read_together(args, _tell_once)
    from peftlab.together import run_together

    run_together(list(configs.values()), names=list(configs))
    return 0


def _add_plan(parser: Parser) -> None:
    """The arguments of `plan`."""
    add_settings(parser)
    parser.add_argument(
        "--memory", metavar="SIZE", help="plan for so much memory, e.g. 24GB, instead of what is there"
    )
    parser.add_argument(
        "--largest_batch",
        action="store_true",
        help="look for the largest batch that fits, which takes seconds more",
    )


def _plan(args: argparse.Namespace) -> int:
    """Carry out `peftlab plan`."""
    memory = read_bytes(args.memory, "memory")
    config = _config(args)
    if _names_a_model_alone(args):
        from peftlab.memory.fitting import plan_memory
        from peftlab.memory.splitting import describe_split, split_step
        from peftlab.memory.text import render_memory

        if config.training.auto_batch_size:
            config, choice = split_step(config, memory=memory, confirm=False)
            print(f"{describe_split(choice)}\n")
        print(render_memory(plan_memory(config, memory=memory).as_dict()))
        return 0
    from peftlab.execute import plan
    from peftlab.tables import render_preflight

    preflight = plan(config, memory=memory, largest_batch=args.largest_batch)
    print(render_preflight(preflight))
    if "memory" in preflight:
        from peftlab.memory.text import render_memory

        print(f"\n{render_memory(preflight['memory'])}")
    return 0


def _names_a_model_alone(args: argparse.Namespace) -> bool:
    """Whether a command line names a model and nothing to teach it: then its memory is all that can be planned."""
    keys = {flag.key for flag, _ in given_flags(args)}
    keys |= {text.partition("=")[0].strip() for text in args.assignments}
    from_elsewhere = args.config is not None or args.preset is not None
    return "model.name" in keys and not from_elsewhere and not keys & {"task.name", "task.data_dir"}


def _directory(output_dir: str | None) -> Path:
    """The folder in which run folders lie."""
    if output_dir is not None:
        return Path(output_dir)
    from peftlab.config import OutputSettings

    return OutputSettings().directory


def _find_run(reference: str, output_dir: str | None) -> Path:
    """The folder of a run that is named by path, by name or as "last"."""
    from peftlab.run import RunFolder

    return Path(RunFolder.find(reference, _directory(output_dir)).path)


def _add_place(parser: Parser) -> None:
    """The argument that says where run folders lie."""
    parser.add_argument("--output_dir", metavar="DIR", help="folder in which run folders lie (default: runs)")


def _add_generate(parser: Parser) -> None:
    """The arguments of `generate`."""
    parser.add_argument("reference", metavar="RUN", help="a run: path, name or last")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", action="append", help="what to answer; again for more")
    source.add_argument("--file", metavar="PATH", type=Path, help="text file with one prompt on each line")
    parser.add_argument(
        "--max_new_tokens", metavar="N", help="longest answer in tokens (default: as the run did)"
    )
    _add_place(parser)


def _generate(args: argparse.Namespace) -> int:
    """Carry out `peftlab generate`."""
    max_new_tokens = count(args.max_new_tokens, "max_new_tokens")
    prompts = args.prompt or read_prompts(args.file)
    from peftlab.commands.printing import side_by_side
    from peftlab.generation import answer

    directory = _directory(args.output_dir)
    for given in answer(args.reference, prompts, max_new_tokens=max_new_tokens, directory=directory):
        print(side_by_side(given["prompt"], given["adapter_on"], given["adapter_off"]))
    return 0


def _add_report(parser: Parser) -> None:
    """The arguments of `report`."""
    parser.add_argument(
        "references", metavar="RUN", nargs="+", help="a run: path, name or last; several are compared"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the page of several runs goes")
    _add_place(parser)


@no_collection()
def _report(args: argparse.Namespace) -> int:
    """Carry out `peftlab report`."""
    from peftlab.report.inspection_folder import is_inspection

    if len(args.references) == 1 and is_inspection(args.references[0]):
        from peftlab.report.inspection_page import write_inspection_page

        print(write_inspection_page(args.references[0]))
        return 0
    runs = [_find_run(reference, args.output_dir) for reference in args.references]
    from peftlab.report import write_comparison, write_report

    if len(runs) == 1:
        if args.output is not None:
            raise InputError("--output is for several runs; the page of one run is report.html in its folder")
        print(write_report(runs[0]))
    else:
        print(write_comparison(runs, args.output))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    """Carry out `peftlab inspect`."""
    request = read_inspect(args)
    from peftlab.inspection.survey import inspect_models

    print(inspect_models(request))
    return 0


def _experiment(args: argparse.Namespace) -> int:
    """Carry out `peftlab experiment`."""
    request = experimenting.read_experiment(args)
    folder = experimenting.make_folder(request)
    if hasattr(request.leaf, "carry_out"):
        files = request.leaf.carry_out(request.settings, folder, print)
    else:
        from peftlab.study.conducting import conduct

        files = conduct(request.leaf, request.settings, folder, print)
    print(experimenting.tell_written(files))
    return 0


@no_collection()
def _list(args: argparse.Namespace) -> int:
    """Carry out `peftlab list`."""
    return carry_list(args)


_SETTINGS_NOTE = """\
What wins: defaults < preset < CONFIG < command line. The defaults above are the config's own; without
CONFIG, --preset, --task and --model the run starts from the preset `embedded`, which has its own and keeps
them under --set and flags. Only another --method leaves out what a preset or CONFIG chose for theirs, its
settings and its phases, and says so. `peftlab list methods NAME` shows what can be set on a method. Dashes
and underscores in flags are alike; `peftlab list flags` shows the config key of each flag.
"""
VERBS: dict[str, Verb] = {
    "run": Verb(
        "Fine-tune, measure, score, draw and report; everything goes into one run folder.",
        _SETTINGS_NOTE
        + "\nexamples:\n  peftlab run\n  peftlab run --max_steps 100 --phase_strategy early-late\n"
        "  peftlab run --dataset e2e_nlg --data_dir DIR --model DIR --target both --r 8\n"
        "  peftlab run runs/NAME/config.yaml --set training.seed=43\n  peftlab run --resume",
        _add_run,
        _run,
        RunParser,
    ),
    "together": Verb(together.TOGETHER, together.TOGETHER_USAGE, together.add_together, _together),
    "plan": Verb(
        "Show what a run would do - rows, tokens, what trains when, whether it fits - and stop before training.",
        _SETTINGS_NOTE
        + "\nA model without a task has its memory planned, from its config.json alone; so has one for a GPU that is\n"
        "not here: --set model.device=cuda --memory 24GB.\n"
        "\nexamples:\n  peftlab plan --task e2e_nlg --data_dir DIR --model DIR\n"
        "  peftlab plan --model DIR --method lora --r 8 --batch_size 4 --max_length 2048 --checkpointing",
        _add_plan,
        _plan,
        RunParser,
    ),
    "evaluate": Verb(evaluating.EVALUATE, evaluating.EVALUATE_USAGE, add_evaluate, carry_evaluate),
    "generate": Verb(
        "Answer prompts with a run's adapter on and off, side by side.",
        'examples:\n  peftlab generate last --prompt "name[Aromi], food[Italian]"\n'
        "  peftlab generate runs/NAME --file prompts.txt",
        _add_generate,
        _generate,
    ),
    "inspect": Verb(INSPECT, INSPECT_USAGE, add_inspect, _inspect),
    "experiment": Verb(
        experimenting.EXPERIMENT, experimenting.EXPERIMENT_USAGE, experimenting.add_experiment, _experiment
    ),
    **{name: Verb(*parts) for name, parts in TRANSFERS.items()},
    "report": Verb(
        "Write the page of a run, or one page that compares several.",
        "examples:\n  peftlab report last\n  peftlab report runs/A runs/B --output comparison.html",
        _add_report,
        _report,
    ),
    "list": Verb(LIST, LIST_USAGE, add_list, _list),
}
"""Verb to what it does, in the order of the help."""
