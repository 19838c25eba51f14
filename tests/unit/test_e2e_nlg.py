"""The E2E reader: the upstream files as they are, and every way in which a file can be wrong."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from pathlib import Path

import pytest

from peftlab.errors import DataError
from peftlab.task import Splits, Task
from peftlab.tasks import e2e_nlg as task

ORIGINAL = {
    "trainset.csv": (
        'mr,ref\n"name[A], near[B]",A is near B.\n'
        '"name[C], food[Thai]",C is Thai.\n"name[A], near[B]",Near B is A.\n'
    ),
    "devset.csv": 'mr,ref\n"name[D], area[riverside]",D is at the river.\n',
    "testset_w_refs.csv": '"MR","ref"\n"name[E], near[Café F]","E is near Café F."\n',
}
CLEANED = {
    "train-fixed.no-ol.csv": 'mr,ref,fixed,orig_mr\n"name[A], near[B]",A is near B.,1,"name[A], near[B], food[Thai]"\n',
    "devel-fixed.no-ol.csv": 'mr,ref,fixed,orig_mr\n"name[C], name[D]",C is not D.,0,"name[C]"\n',
    "test-fixed.csv": "mr,ref,fixed,orig_mr\nnear[E],It is near E.,0,near[E]\n",
}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def load(folder: Path) -> Splits:
    return task.load(folder, seed=1)


def test_it_is_a_task() -> None:
    assert isinstance(task, Task)
    assert doctest.testmod(task).failed == 0
    assert task.PROMPT.count("{source}") == 1
    assert not task.PROMPT[-1].isspace()


def test_original(tmp_path: Path) -> None:
    splits = load(write(tmp_path, ORIGINAL))
    assert [e.id for e in splits.train] == ["train-0", "train-1"]
    assert splits.train[0].source == "name[A], near[B]"
    assert splits.train[0].references == ("A is near B.", "Near B is A.")
    assert splits.train[0].values == ("A", "B")
    assert splits.train[1].values == ("C",)
    assert splits.validation[0].id == "validation-0"
    assert splits.test[0].values == ("E", "Café F")
    assert [f.name for f in splits.files] == list(ORIGINAL)
    assert "train: 3 rows (the published set has 42,061)" in splits.notes
    assert splits == task.load(tmp_path, seed=2)


def test_cleaned(tmp_path: Path) -> None:
    splits = load(write(tmp_path, CLEANED))
    assert splits.train[0].source == "name[A], near[B]"
    assert splits.validation[0].values == ("C", "D")
    assert splits.test[0].references == ("It is near E.",)
    assert "train: 1 rows (the published set has 33,525)" in splits.notes


def test_byte_order_mark_crlf_empty_lines_and_line_breaks_in_fields(tmp_path: Path) -> None:
    plain = load(write(tmp_path, ORIGINAL))
    changed = ORIGINAL["trainset.csv"].replace("\n", "\r\n\r\n").encode("utf-8-sig")
    assert load(write(tmp_path, {"trainset.csv": changed})) == plain
    write(tmp_path, {"trainset.csv": 'mr,ref\nname[A],"two\nlines"\nname[B],\n'})
    with pytest.raises(DataError, match=r"trainset.csv, line 4: 'ref' is empty"):
        load(tmp_path)


def test_duplicate_rows_are_kept_and_told(tmp_path: Path) -> None:
    text = ORIGINAL["trainset.csv"] + '"name[A], near[B]",A is near B.\n'
    splits = load(write(tmp_path, ORIGINAL | {"trainset.csv": text}))
    assert splits.train[0].references == ("A is near B.", "Near B is A.", "A is near B.")
    assert "train: duplicate rows kept: 1" in splits.notes


def test_nothing_is_said_of_the_published_number_of_rows(tmp_path: Path) -> None:
    text = "mr,ref\n" + "".join(f"name[A],text {n}\n" for n in range(42_061))
    notes = load(write(tmp_path, {**ORIGINAL, "trainset.csv": text})).notes
    assert not [note for note in notes if note.startswith("train")]


def test_meanings_of_a_later_split_are_dropped_from_the_earlier(tmp_path: Path) -> None:
    shared = {
        "trainset.csv": ORIGINAL["trainset.csv"] + "name[Test],x\nname[Dev],x\n",
        "devset.csv": "mr,ref\nname[Test],x\nname[Dev],x\n",
        "testset_w_refs.csv": "mr,ref\nname[Test],x\n",
    }
    splits = load(write(tmp_path, shared))
    assert [e.source for e in splits.train] == ["name[A], near[B]", "name[C], food[Thai]"]
    assert [e.source for e in splits.validation] == ["name[Dev]"]
    assert [e.id for e in splits.validation] == ["validation-0"]
    told = "meanings dropped because they also stand in"
    assert {f"train: {told} test: 1", f"train: {told} validation: 1", f"validation: {told} test: 1"} <= set(
        splits.notes
    )
    with pytest.raises(DataError, match=r"devset.csv: every meaning also stands in .*testset_w_refs.csv"):
        load(write(tmp_path, {"devset.csv": "mr,ref\nname[Test],x\n"}))


def test_no_folder_names_the_option_and_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir.*trainset.csv, devset.csv.*train-fixed.no-ol.csv"):
        task.load(None, seed=1)
    for wrong in (tmp_path / "absent", write(tmp_path, {"file": "x"}) / "file"):
        with pytest.raises(DataError, match=r"is not a folder; --data-dir must name .*testset_w_refs.csv"):
            load(wrong)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no complete release of the E2E data. Found: no CSV file. The original"
    ):
        load(tmp_path)
    write(tmp_path, {name: text for name, text in CLEANED.items() if not name.startswith("train")})
    with pytest.raises(
        DataError, match=r"the cleaned release lacks train-fixed.no-ol.csv. Found: devel-fixed.no-ol"
    ):
        load(tmp_path)
    write(tmp_path, {"devset.csv": ORIGINAL["devset.csv"], "testset.csv": "MR\nname[A]\n"})
    with pytest.raises(
        DataError, match=r"original release lacks trainset.csv, testset_w_refs.csv; the cleaned"
    ):
        load(tmp_path)


def test_both_releases_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds the original and the cleaned release; put each in a folder"):
        load(write(tmp_path, ORIGINAL | CLEANED))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected a header with one column 'mr', got an empty file"),
        ("mr,text\na,b\n", r"line 1: expected a header with one column 'ref', got \['mr', 'text'\]"),
        ("mr,ref,ref\n", "line 1: expected a header with one column 'ref'"),
        ("mr,ref\n", "no rows below the header"),
        ("mr,ref\nname[A],x\nname[B],x,y\n", "line 3: 3 fields, but the header has 2"),
        ("mr,ref\nname[A]\n", "line 2: 1 fields, but the header has 2"),
        ("mr,ref\nname[A],x\n , x\n", "line 3: 'mr' is empty"),
        ("mr,ref\nname[A],\n", "line 2: 'ref' is empty"),
        (
            "mr,ref\nAromi is a pub,x\n",
            r"line 2: expected a meaning such as 'name\[Aromi\].*got 'Aromi is a pub'",
        ),
        ('mr,ref\nname[A],x\nname[B],"x"y\n', "line 3: not valid CSV"),
        ('mr,ref\nname[A],x\nname[B],"x\n\n', r"line 3: not valid CSV \(unexpected end of data\)"),
        (b"mr,ref\nname[A],x\nname[Caf\xe9],x\n", "line 3: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    for name in ("trainset.csv", "testset_w_refs.csv"):
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            load(write(tmp_path, {**ORIGINAL, name: text}))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path, ORIGINAL)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"trainset.csv cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_the_upstream_files(shared_data: Path) -> None:
    splits = load(shared_data / "e2e")
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [457, 547, 630]
    rows = [sum(len(e.references) for e in s) for s in (splits.train, splits.validation, splits.test)]
    assert rows == [4000, 4672, 4693]
    assert splits.notes == (
        "train: 4,000 rows (the published set has 42,061)",
        "train: duplicate rows kept: 115",
        "validation: duplicate rows kept: 151",
        "test: duplicate rows kept: 116",
    )
    every = [*splits.train, *splits.validation, *splits.test]
    assert all(e.values and e.values[0] in e.source for e in every)
    held = [value in reference for e in every for reference in e.references for value in e.values]
    assert sum(held) / len(held) > 0.99  # why name and near are asked for verbatim


def test_the_cleaned_slice_lacks_its_train_file(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "e2e" / "cleaned"
    with pytest.raises(DataError, match=r"the cleaned release lacks train-fixed.no-ol.csv"):
        load(folder)
    copies = {name: (folder / name).read_bytes() for name in ("devel-fixed.no-ol.csv", "test-fixed.csv")}
    splits = load(write(tmp_path, {**CLEANED, **copies}))
    assert [len(splits.validation), len(splits.test)] == [1484, 1847]
    assert not [n for n in splits.notes if n.startswith(("validation: 4", "test: 4"))]  # the published counts
