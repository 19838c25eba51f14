"""The house rules that a reader relies on: names, sizes, one first line for every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "peftlab"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL = SOURCES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "scripts").glob("*.py"))
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
MOST_LINES, MOST_BODY = 400, 60


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= MOST_LINES
    assert path.stem not in FORBIDDEN_NAMES or path == PACKAGE / "manager.py"  # S4's own class is the manager


def test_every_test_file_is_tracked_under_a_name_of_its_own() -> None:
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len({path.name for path in found}) == len(found)
    tracked = subprocess.run(
        ["git", "ls-files", "tests"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode == 0 and tracked.stdout:
        assert {path.relative_to(ROOT).as_posix() for path in found} <= set(tracked.stdout.splitlines())


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_function_bodies_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= MOST_BODY, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_file_says_what_it_is_in_its_first_line(path: Path) -> None:
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert document
    assert document.splitlines()[0].rstrip().endswith((".", ":", ";"))


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_nothing_pickles_runs_remote_code_or_hides_errors(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in (
        "torch.load(",
        "torch.save(",
        "pickle",
        "trust_remote_code=True",
        "NotImplementedError",
        "TODO",
    ):
        if word == "pickle" and path.name in {"checkpoint.py"}:
            continue  # says in words that there is none
        assert word not in text, word
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)


def test_no_path_of_one_machine_is_written_down() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / line for line in tracked.stdout.splitlines()] or ALL
    for path in files:
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".json", ".txt", ".log", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.])/(?:work|farm|root|home)/[\w.-]+", text), path


def test_the_readme_shows_the_tree_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        path.stem
        for path in PACKAGE.glob("*.py")
        if path.stem not in readme and not path.stem.startswith("_")
    ]
    assert not missing


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, peftlab; print([m for m in ('torch', 'pydantic', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
