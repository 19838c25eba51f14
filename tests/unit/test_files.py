"""Files and folders: the old one or the new one, never half of one."""

import json
import math
import os

import pytest

from peftlab import files
from peftlab.errors import CheckpointError, OutputError
from peftlab.files import CHECKSUMS, checksums, new_folder, sha256, verify_folder, write_json, write_text


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_a_text_is_written_whole(tmp_path):
    path = write_text(tmp_path / "a.txt", "ä\nb\n")
    assert path.read_bytes() == "ä\nb\n".encode()
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert leftovers(tmp_path) == []


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_json_refuses_what_json_cannot_say(bad, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": bad})
    assert list(tmp_path.iterdir()) == []
    assert json.loads(write_json(tmp_path / "a.json", {"x": [1, None, "ü"]}).read_text(encoding="utf-8")) == {
        "x": [1, None, "ü"]
    }


def test_a_folder_appears_whole_with_its_checksums(tmp_path):
    target = tmp_path / "made"
    with new_folder(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a.bin").write_bytes(b"123")
        assert not target.exists(), "filled aside"
    verify_folder(target)
    assert json.loads((target / CHECKSUMS).read_text()) == {"sub/a.bin": sha256(target / "sub" / "a.bin")}
    assert leftovers(tmp_path) == []


def test_a_crash_while_filling_leaves_the_old_folder(tmp_path):
    target = tmp_path / "made"
    with new_folder(target) as aside:
        (aside / "a").write_text("old")

    def crash():
        with new_folder(target) as aside:
            (aside / "a").write_text("new")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert (target / "a").read_text() == "old"
    verify_folder(target)
    assert leftovers(tmp_path) == []


def test_a_new_folder_replaces_the_old_one_wholly(tmp_path):
    target = tmp_path / "made"
    for name in ("a", "b"):
        with new_folder(target) as aside:
            (aside / name).write_text(name)
    assert sorted(p.name for p in target.iterdir()) == ["b", CHECKSUMS]
    assert leftovers(tmp_path) == []


def test_a_failed_move_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "made"
    with new_folder(target) as aside:
        (aside / "a").write_text("old")
    replace = os.replace

    def fails(source, to):
        if to == target and str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return replace(source, to)

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OutputError, match="cannot write the folder"), new_folder(target) as aside:
        (aside / "a").write_text("new")
    assert (target / "a").read_text() == "old"


def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot write the folder"),
        new_folder(tmp_path / "file" / "made") as aside,
    ):
        aside.mkdir()


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "bit"])
def test_damage_is_named(damage, tmp_path):
    target = tmp_path / "made"
    with new_folder(target) as aside:
        (aside / "a.bin").write_bytes(bytes(100))
        (aside / "b.bin").write_bytes(b"b")
    name = "a.bin"
    if damage == "changed":
        (target / name).write_bytes(b"other")
    elif damage == "missing":
        (target / name).unlink()
    elif damage == "extra":
        name = "c.bin"
        (target / name).write_bytes(b"")
    else:
        content = bytearray((target / name).read_bytes())
        content[50] ^= 1
        (target / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is damaged: {name} not as written"):
        verify_folder(target)


def test_a_folder_without_checksums_is_not_complete(tmp_path):
    with pytest.raises(CheckpointError, match="is not complete"):
        verify_folder(tmp_path)
    (tmp_path / CHECKSUMS).write_text("{")
    with pytest.raises(CheckpointError, match="is not complete"):
        verify_folder(tmp_path)


def test_checksums_are_sorted_and_leave_their_own_file_out(tmp_path):
    for name in ("b", "a", CHECKSUMS):
        (tmp_path / name).write_text(name)
    assert list(checksums(tmp_path)) == ["a", "b"]
    assert sha256(tmp_path / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
