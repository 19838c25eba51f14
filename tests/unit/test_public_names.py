"""The public face: every name resolves, and `import peftlab` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import environment

import peftlab
from peftlab import errors

ROOT = Path(__file__).parents[2]
NAMES = [name for name in peftlab.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(peftlab, name) is not None


def test_all_is_the_table() -> None:
    assert set(NAMES) == set(peftlab._HOMES)
    assert list(peftlab._HOMES) == sorted(peftlab._HOMES)
    assert set(peftlab.__all__) <= set(dir(peftlab))


def test_every_error_is_public() -> None:
    classes = {
        n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.PeftlabError)
    }
    assert classes <= set(NAMES)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(peftlab.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("peftlab.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == peftlab._HOMES


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = peftlab.nothing  # type: ignore[attr-defined]


def test_import_is_light() -> None:
    code = "import sys, peftlab; dir(peftlab); print([m for m in ('torch','pydantic','numpy','yaml') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert peftlab.__version__ == project["version"]
