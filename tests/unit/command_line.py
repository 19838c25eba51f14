"""Commands run as a person runs them, in their own process, with a note of which modules they loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"

_ONE = """
import json, sys
from peftlab.cli import main
code = main(sys.argv[2:])
heavy = [m for m in ("torch", "transformers", "pydantic", "numpy", "matplotlib") if m in sys.modules]
with open(sys.argv[1], "w") as stream:
    json.dump(heavy, stream)
sys.exit(code)
"""

_MANY = """
import contextlib, io, json, sys
from peftlab.cli import main
answers = []
with open(sys.argv[1]) as stream:
    many = json.load(stream)
for arguments in many:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    heavy = [m for m in ("torch", "transformers") if m in sys.modules]
    answers.append([code, out.getvalue(), err.getvalue(), heavy])
with open(sys.argv[2], "w") as stream:
    json.dump(answers, stream)
"""


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str
    loaded: tuple[str, ...]


def environment() -> dict[str, str]:
    """This process's environment, with the package's source on the path."""
    kept = {k: v for k, v in os.environ.items() if k != "PEFTLAB_DEBUG"}
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(SOURCE)) if p)
    return kept | {"PYTHONPATH": path, "COLUMNS": "100"}


def command(arguments: list[str], folder: Path) -> Answer:
    """Run one command in its own process.

    Args:
        arguments: What stands after `peftlab`.
        folder: The working folder.
    """
    note = folder / ".loaded.json"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ONE, str(note), *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    loaded = tuple(json.loads(note.read_text())) if note.exists() else ()
    return Answer(done.returncode, done.stdout, done.stderr, loaded)


def commands(many: list[list[str]], folder: Path) -> list[Answer]:
    """Run commands one after the other in one process of their own.

    Args:
        many: What stands after `peftlab`, for each.
        folder: The working folder.
    """
    given, taken = folder / ".given.json", folder / ".taken.json"
    given.write_text(json.dumps(many))
    subprocess.run(
        [sys.executable, "-W", "error", "-c", _MANY, str(given), str(taken)],
        cwd=folder,
        env=environment(),
        check=True,
        timeout=120,
    )
    return [Answer(code, out, err, tuple(loaded)) for code, out, err, loaded in json.loads(taken.read_text())]
