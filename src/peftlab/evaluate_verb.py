"""What `peftlab evaluate` does; nothing heavy is loaded before it is carried out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.commands import evaluating as arguments
from peftlab.commands.parsing import Parser

if TYPE_CHECKING:
    from peftlab.evaluation import Scored
    from peftlab.run import RunFolder


def add_evaluate(parser: Parser) -> None:
    """The arguments of `evaluate`.

    Args:
        parser: The parser to add them to.
    """
    arguments.add_evaluate(parser)
    parser.add_argument("--output_dir", metavar="DIR", help="folder in which run folders lie (default: runs)")


def carry_evaluate(args: argparse.Namespace) -> int:
    """Carry out `peftlab evaluate`.

    Args:
        args: The parsed command line.

    Returns:
        The exit code.
    """
    request = arguments.read_evaluate(args, Path("runs" if args.output_dir is None else args.output_dir))
    run = None
    if request.format is not None:
        from peftlab.method_comparison import find_finished

        run = find_finished(str(request.reference), request.arguments["directory"])
        if not request.anew:
            _write_result(run, _kept(run), request.arguments["output"])
            return 0
    scored = _score(request)
    if run is not None:
        _write_result(run, scored.result["after"], request.arguments["output"])
    if run is None or request.arguments["output"] is not None:
        _tell(request, scored)
    return 0


def _score(request: arguments.EvaluateRequest) -> Scored:
    """Score a model, or a file of outputs."""
    if request.predictions is not None:
        from peftlab.scoring import score_file

        return score_file(request.predictions, reference=request.reference, **request.arguments)
    from peftlab.evaluation import score_saved

    return score_saved(str(request.reference), batch_size=request.batch_size, **request.arguments)


def _tell(request: arguments.EvaluateRequest, scored: Scored) -> None:
    """Print scores and examples; write the page where there is a folder for it."""
    from peftlab.commands.answers import shown_examples
    from peftlab.commands.printing import scores

    print(f"{scores(scored.result)}\n\n{shown_examples(scored.result['after'], scored.rows)}".rstrip())
    output = request.arguments["output"]
    if output is not None:
        from peftlab.report.evaluation_page import write_evaluation_page

        title = _title(request)
        print(f"\npage: {write_evaluation_page(scored.result, scored.rows, output, title=title)}")


def _title(request: arguments.EvaluateRequest) -> str:
    """What was scored: a run by its own name."""
    if request.predictions is not None or request.reference is None:
        return str(request.predictions)
    from peftlab.errors import OutputError, UnknownNameError
    from peftlab.run import RunFolder

    try:
        return RunFolder.find(request.reference, request.arguments["directory"]).name
    except (OutputError, UnknownNameError):
        return request.reference


def _kept(run: RunFolder) -> Any:
    """The scores that a run has written after training; None where it was not scored."""
    from peftlab.comparison import evaluation_of

    return (evaluation_of(run) or {}).get("after")


def _write_result(run: RunFolder, half: Any, output: Path | None) -> None:
    """A run as a result of peft's method_comparison: into a folder, or printed where there is none."""
    from peftlab.method_comparison import peft_result, write_peft_result
    from peftlab.predictions import make_folder

    result = peft_result(run, half)
    if output is None:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    make_folder(output)
    print(f"result of peft's method_comparison: {write_peft_result(result, output)}")
