"""Names of folders: safe ones alone, and what happens to one that is there already."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import InputError, OutputError
from peftlab.folders import check_name, choose_folder


@pytest.mark.parametrize("name", ["mnli", "mnli-r8.v2", "_x", "7", "a" * 100, "com10", "c++", "console"])
def test_plain_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", ".hidden", "a/b", "a\\b", "/etc", "C:x", "a\0b", "a\nb", "-rf", "end.", "a b", "é", "a" * 101,
     "nul", "CON", "com1.txt", "Lpt9", "~", "$HOME", "a*", "a\n"],
)  # fmt: skip
def test_names_that_are_not_safe(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the name "):
        check_name(name)
    with pytest.raises(InputError, match=r"the name "):
        choose_folder(tmp_path, name, "overwrite")


@given(st.text(max_size=120))
def test_what_is_taken_lies_in_the_folder(name: str) -> None:
    parent = Path("parent").absolute()
    try:
        path = choose_folder(parent, name)
    except InputError:
        return
    assert path.parent == parent
    assert path.resolve().parent == parent.resolve()


def test_a_name_that_is_there(tmp_path: Path) -> None:
    assert choose_folder(tmp_path, "mnli") == tmp_path / "mnli"
    (tmp_path / "mnli").mkdir()
    with pytest.raises(OutputError, match=r"mnli is there already.*version.*overwrite"):
        choose_folder(tmp_path, "mnli")
    assert choose_folder(tmp_path, "mnli", "overwrite") == tmp_path / "mnli"
    assert choose_folder(tmp_path, "mnli", "version") == tmp_path / "mnli-2"
    (tmp_path / "mnli-2").mkdir()
    assert choose_folder(tmp_path, "mnli", "version") == tmp_path / "mnli-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mnli", "mnli-2"], "nothing is made"
    with pytest.raises(InputError, match=r"on_conflict is 'ask'; it is one of refuse, version, overwrite"):
        choose_folder(tmp_path, "mnli", "ask")  # type: ignore[arg-type]


def test_files_and_links_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "link", "nowhere"):
        with pytest.raises(OutputError, match=r"is not a folder"):
            choose_folder(tmp_path, name, "overwrite")
        with pytest.raises(OutputError, match=r"there already"):
            choose_folder(tmp_path, name)
        assert choose_folder(tmp_path, name, "version") == tmp_path / f"{name}-2"
