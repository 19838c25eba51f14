"""Rows from Python: validation that names the row, and a split that can be relied on."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import DataError
from peftlab.task import Splits, Task
from peftlab.tasks import rows as task

TEXT = [{"prompt": f"say {n}", "completion": f"word {n}"} for n in range(20)]
LABEL = [{"text": f"film {n}", "label": ("no", "yes", "maybe")[n % 3]} for n in range(30)]


def sources(splits: Splits) -> list[set[str]]:
    return [{e.source for e in part} for part in (splits.train, splits.validation, splits.test)]


def test_it_is_a_task_that_has_no_files() -> None:
    assert isinstance(task, Task)
    assert doctest.testmod(task).failed == 0
    with pytest.raises(DataError, match=r"needs a folder with rows\.jsonl"):
        task.load(None, seed=1)


def test_rows_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / task.FILE
    file.write_text("".join(json.dumps(row) + "\n" for row in TEXT), encoding="utf-8")
    loaded = task.load(tmp_path, seed=1)
    assert loaded.train == task.from_rows(TEXT, seed=1).train
    assert loaded.files == (file,)
    file.write_text('{"prompt": "a", "completion": "b"}\n{broken\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not JSON"):
        task.load(tmp_path, seed=1)
    with pytest.raises(DataError, match="cannot be read"):
        task.load(tmp_path / "gone", seed=1)


def test_sizes_and_ids() -> None:
    splits = task.from_rows(TEXT, seed=1)
    assert [len(s) for s in sources(splits)] == [16, 2, 2]
    assert splits.labels == ()
    every = [*splits.train, *splits.validation, *splits.test]
    assert len({e.id for e in every}) == 20
    for example in every:
        row = TEXT[int(example.id.removeprefix("row-"))]
        assert (example.source, example.references) == (row["prompt"], (row["completion"],))


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    assert task.from_rows(TEXT, seed=1) == task.from_rows(list(TEXT), seed=1)
    assert sources(task.from_rows(TEXT, seed=1)) == sources(task.from_rows(TEXT[::-1], seed=1))
    assert len({frozenset(sources(task.from_rows(TEXT, seed=s))[2]) for s in range(10)}) > 5


def test_the_split_is_the_same_on_every_machine_and_version() -> None:
    # sha256 of "42:<prompt>", computed by coreutils: these are the smallest four of the twenty
    assert sources(task.from_rows(TEXT, seed=42))[1:] == [{"say 2", "say 0"}, {"say 16", "say 18"}]


def test_equal_prompts_become_one_example() -> None:
    rows = [*TEXT, {"prompt": "say 3", "completion": "another"}, {"prompt": "say 3", "completion": "another"}]
    splits = task.from_rows(rows, seed=1)
    (found,) = [e for p in (splits.train, splits.validation, splits.test) for e in p if e.source == "say 3"]
    assert found.references == ("word 3", "another", "another")
    assert splits.notes == ("duplicate rows kept: 1",)


def test_label_rows() -> None:
    assert task.labels_of(LABEL) == ("maybe", "no", "yes")
    splits = task.from_rows(LABEL, seed=1)
    assert splits.labels == ("maybe", "no", "yes")
    for example in (*splits.train, *splits.validation, *splits.test):
        assert example.references == ()
        assert example.label is not None
        row = LABEL[int(example.id.removeprefix("row-"))]
        assert task.labels_of(LABEL)[example.label] == row["label"]


def test_texts_with_two_labels_stay_together_and_are_told() -> None:
    rows = [*LABEL, {"text": "film 0", "label": "yes"}]
    splits = task.from_rows(rows, seed=1)
    assert splits.notes == ("texts with more than one label: 1",)
    assert sum(len(p) for p in (splits.train, splits.validation, splits.test)) == 31
    parts = sources(splits)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_integer_labels_are_indices() -> None:
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(10)]
    assert task.labels_of(rows) == ("0", "1")
    assert {e.label for e in task.from_rows(rows, seed=1).train} == {0, 1}
    many = [{"text": f"film {n}", "label": n} for n in range(12)]
    assert task.labels_of(many)[10] == "10"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["a"], "row 0: expected a mapping with 'prompt' and 'completion', got str"),
        ([*TEXT, {"prompt": "a"}], "row 20: 'completion' is missing"),
        (
            [*TEXT, {"prompt": "a", "completon": "b"}],
            r"row 20: unknown key 'completon' \(did you mean 'completion'\?\)",
        ),
        ([*TEXT, {"prompt": "a", "completion": 3}], "row 20: 'completion' must be a string, got int"),
        ([*TEXT, {"prompt": " ", "completion": "b"}], "row 20: 'prompt' is empty"),
        ([*TEXT, {"text": "a", "label": "b"}], "row 20: unknown key 'text'"),
        ([*LABEL, {"text": "a", "label": 1}], "row 30: 'label' is a int, unlike those before"),
        ([*LABEL, {"text": "a", "label": True}], "row 30: 'label' must be a string or an integer, got bool"),
        ([*LABEL, {"text": "a", "label": ""}], "row 30: 'label' is empty"),
        ([{"text": "a", "label": -1}], "row 0: 'label' is -1"),
        (
            [{"text": str(n), "label": 2 * (n % 2)} for n in range(9)],
            "must be 0 to 1 for 2 classes, got 0, 2",
        ),
        ([{"text": str(n), "label": "x"} for n in range(9)], "every row has the label 'x'"),
        (TEXT[:2], "2 different prompts leave nothing to train on"),
        (TEXT[:1] * 50, "1 different prompts leave nothing"),
    ],
)
def test_bad_rows_are_named(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.from_rows(rows, seed=1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_bad_fractions(fraction: float) -> None:
    with pytest.raises(DataError, match="test_fraction must lie between 0 and 1"):
        task.from_rows(TEXT, seed=1, test_fraction=fraction)
    with pytest.raises(DataError, match="validation_fraction"):
        task.from_rows(TEXT, seed=1, validation_fraction=fraction)
    with pytest.raises(DataError, match="leave nothing to train on"):
        task.from_rows(TEXT, seed=1, validation_fraction=0.5, test_fraction=0.5)


def test_labels_of_text_rows_is_refused() -> None:
    with pytest.raises(DataError, match="have no 'label'"):
        task.labels_of(TEXT)


@given(
    prompts=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=3, max_size=40
    ),
    seed=st.integers(0, 2**63),
)
def test_every_row_is_in_exactly_one_split_and_none_is_empty(prompts: list[str], seed: int) -> None:
    rows = [{"prompt": p, "completion": "x"} for p in prompts]
    if len(set(prompts)) < 3:
        with pytest.raises(DataError):
            task.from_rows(rows, seed=seed)
        return
    parts = sources(task.from_rows(rows, seed=seed))
    assert all(parts)
    assert sum(map(len, parts)) == len(set(prompts))
    assert set.union(*parts) == set(prompts)
