"""Every extra that can be installed is named where a person looks for it."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    line = (ROOT / "README.md").read_text(encoding="utf-8").partition("Extras, ")[2].partition("\n\n")[0]
    assert [name for name in project["optional-dependencies"] if f"`{name}`" not in line] == []
