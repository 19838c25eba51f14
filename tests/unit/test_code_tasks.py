"""Code summarization and generation: upstream layouts, splits that share nothing, and what is left out."""

from __future__ import annotations

import doctest
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from peftlab import code_rows
from peftlab.code_rows import CodeSettings, without_docstring
from peftlab.config import TaskSettings
from peftlab.errors import ConfigError, DataError
from peftlab.settings import validate
from peftlab.task import Splits, Task
from peftlab.task_data import load_splits
from peftlab.tasks import code_generation, code_summarization


def function(n: int, *, repo: str = "", path: str = "", **changes: Any) -> dict[str, Any]:
    """One row, in Python."""
    code = f'def f{n}(x):\n    """Add {n}."""\n    return x + {n}'
    tokens = ["def", f"f{n}", "(", "x", ")", ":", "return", "x", "+", str(n)]
    row = {"repo": repo, "path": path, "language": "python", "code": code, "code_tokens": tokens}
    return row | {"docstring": f"Add {n}.", "docstring_tokens": ["Add", str(n), "."]} | changes


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def folder_of(tmp_path: Path, **splits: list[dict[str, Any]]) -> Path:
    for split, rows in splits.items():
        write(tmp_path / "python" / f"{split}.jsonl", rows)
    return tmp_path


def ids(splits: Splits) -> list[list[str]]:
    return [[e.source for e in part] for part in (splits.train, splits.validation, splits.test)]


def test_they_are_tasks() -> None:
    assert isinstance(code_summarization, Task)
    assert isinstance(code_generation, Task)
    assert doctest.testmod(code_rows).failed == 0
    with pytest.raises(ConfigError, match="must be 'python', 'java' or 'javascript'"):
        validate(CodeSettings, {"language": "perl"})


def test_sources_and_references(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train=[function(1), function(2)], valid=[function(3)], test=[function(4)])
    said = code_summarization.load(folder, seed=1)
    assert said.test[0].source == "def f4 ( x ) : return x + 4", (
        "the docstring, which is the answer, is not in it"
    )
    assert said.test[0].references == ("Add 4 .",)
    made = code_generation.load(folder, seed=1)
    assert (made.test[0].source, made.test[0].references) == ("Add 4 .", ("def f4(x):\n    return x + 4",))
    assert [len(part) for part in ids(said)] == [2, 1, 1]
    assert "train: 2 rows (the published set has 251,820)" in said.notes


@pytest.mark.parametrize(
    "names",
    [
        ("python/train.jsonl.gz", "python/valid.jsonl.gz", "python/test.jsonl.gz"),
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        *[
            tuple(
                f"python/final/jsonl/{split}/python_{split}_0.jsonl.gz"
                for split in ("train", "valid", "test")
            ),
        ],
    ],
    ids=["packed", "flat", "shards"],
)
def test_layouts(names: tuple[str, str, str], tmp_path: Path) -> None:
    for n, name in enumerate(names):
        write(tmp_path / name, [function(10 * n + i) for i in range(3)])
    if "final" in names[0]:
        write(tmp_path / names[0].replace("_0", "_1"), [function(99)])
    splits = code_summarization.load(tmp_path, seed=1)
    assert [len(part) for part in ids(splits)] == [4 if "final" in names[0] else 3, 3, 3]


def test_validation_is_made_of_whole_repositories(tmp_path: Path) -> None:
    rows = [function(n, repo=f"o/r{n // 2}", path="a.py") for n in range(60)]
    rows += [function(100 + n, repo="o/large", path=f"{n // 5}.py") for n in range(40)]
    folder = folder_of(tmp_path, train=rows, test=[function(999)])
    splits = code_summarization.load(folder, seed=1)
    assert len(splits.validation) == 9, "at most a tenth, in whole groups of two and five"
    assert any("validation: no file, so 9 functions of train" in note for note in splits.notes)
    origin = {" ".join(row["code_tokens"]): (row["repo"], row["path"]) for row in rows}
    held, rest = ({origin[e.source] for e in part} for part in (splits.validation, splits.train))
    assert not held & rest
    assert ids(code_summarization.load(folder, seed=7)) == ids(splits), "the same one for every seed"


def test_nothing_stands_in_two_splits(tmp_path: Path) -> None:
    same_words = function(50, docstring_tokens=["Add", "4", "."])
    train = [function(1), function(2), function(4), same_words, function(1)]
    folder = folder_of(tmp_path, train=train, valid=[function(3)], test=[function(4)])
    splits = code_summarization.load(folder, seed=1)
    assert len(splits.train) == 2
    assert "train: duplicate rows kept: 1" in splits.notes
    for what in ("functions", "descriptions"):
        told = f"train: {what} dropped because they also stand in test: 1"
        assert any(note.startswith(told) for note in splits.notes)
    several = [function(1), function(2, docstring_tokens=["Add", "1", "."])]
    made = code_generation.load(
        folder_of(tmp_path / "b", train=several, valid=[function(3)], test=[function(4)]), seed=1
    )
    assert len(made.train[0].references) == 2


def test_what_cannot_be_generated_is_left_out(tmp_path: Path) -> None:
    masked = function(5, code_tokens=["min", "(", "<mask>", ")"])
    bare = {key: value for key, value in function(6).items() if key != "code"}
    old = function(7, code='def f(x):\n    """Old."""\n    print x')
    rows = [function(1), masked, bare, old]
    folder = folder_of(tmp_path, train=rows, valid=[function(3)], test=[function(4)])
    splits = code_generation.load(folder, seed=1)
    assert len(splits.train) == 1
    assert any(note.startswith("train: functions left out") and note.endswith(": 3") for note in splits.notes)
    assert len(code_summarization.load(folder, seed=1).train) == 4


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f():\n    return 1", "def f():\n    return 1"),
        ('async def f():\n    """D\n    d"""\n    return 1\n', "async def f():\n    return 1\n"),
        ("def f():\n    'é' # note\n    return 1", None),
        ('def f(): """D"""; return 1', None),
        ('def f():\n    """D"""', None),
        ('@d\ndef f():\n    r"""\\d"""\n    return 1', "@d\ndef f():\n    return 1"),
        ("x = 1", None),
        ("def f(:", None),
    ],
)
def test_docstrings_are_taken_out(code: str, expected: str | None) -> None:
    assert without_docstring(code) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"code_tokens": ["a"]}',
            "line 1: 'docstring_tokens' must be a list of texts; the row has: code_tokens",
        ),
        ('{"code_tokens": "a", "docstring_tokens": ["b"]}', "'code_tokens' must be a list of texts"),
        ('{"code_tokens": [], "docstring_tokens": ["b"]}', "'code_tokens' is empty"),
        ('{"code_tokens": ["a"], "docstring_tokens": ["b"], "code": 3}', "'code' must be a text, got int"),
        (
            '{"code_tokens": ["a"], "docstring_tokens": ["b"], "language": "go"}',
            "a function in 'go', but python",
        ),
        ("{broken", "line 1: not JSON"),
        ("", "the split is empty"),
    ],
)
def test_rows_that_are_refused(line: str, said: str, tmp_path: Path) -> None:
    for suffix in (".jsonl", ".jsonl.gz"):
        folder = folder_of(tmp_path / suffix, train=[function(1)], test=[function(2)])
        (folder / "python" / "train.jsonl").unlink()
        data = (line + "\n").encode()
        path = folder / "python" / f"train{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        with pytest.raises(DataError) as caught:
            code_summarization.load(folder, seed=1)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give their folder with --data-dir; expected python/train\.jsonl"):
        code_summarization.load(None, seed=1)
    folder = folder_of(tmp_path, train=[function(1)])
    with pytest.raises(DataError, match="holds no test split"):
        code_summarization.load(folder, seed=1)
    with pytest.raises(
        DataError, match=r"holds no java functions; it has python \(task\.settings\.language\)"
    ):
        code_summarization.load(folder, seed=1, settings=CodeSettings(language="java"))
    (folder / "python" / "train.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="holds train twice"):
        code_summarization.load(folder, seed=1)
    (folder / "python" / "train.jsonl").unlink()
    write(folder / "python" / "test.jsonl", [function(2)])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz cannot be unpacked"):
        code_summarization.load(folder, seed=1)


@pytest.mark.parametrize("language", ["python", "java", "javascript"])
@pytest.mark.parametrize("name", ["code_summarization", "code_generation"])
def test_real_rows(name: str, language: str, shared_data: Path) -> None:
    settings = TaskSettings(name=name, data_dir=shared_data / "code", settings={"language": language})
    splits = load_splits(settings, seed=1)
    parts = [set(part) for part in ids(splits)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    if name == "code_summarization":
        assert len(splits.test) == 200
        words = [{r for e in part for r in e.references} for part in (splits.train, splits.test)]
        assert not words[0] & words[1]
    assert any("the published set has" in note for note in splits.notes)
