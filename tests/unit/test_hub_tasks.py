"""The published data sets by hub name: rows as the hub has them, through `datasets`, into the task's own files."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import task_samples
from peftlab import downloads
from peftlab.catalog import TASKS
from peftlab.config import TaskSettings
from peftlab.errors import DataError
from peftlab.task import Splits
from peftlab.task_data import load_splits
from peftlab.tasks import e2e_nlg


class Hub(types.ModuleType):
    """`datasets` as far as it is used."""

    def __init__(self, found: Mapping[str, list[dict[str, Any]]]) -> None:
        super().__init__("datasets")
        self.found = found
        self.asked: list[str] = []

    def load_dataset(self, path: str, subset: str | None) -> Mapping[str, list[dict[str, Any]]]:
        self.asked.append(path)
        return self.found


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))


def read(monkeypatch: pytest.MonkeyPatch, task: str, found: Mapping[str, list[dict[str, Any]]]) -> Splits:
    monkeypatch.setitem(sys.modules, "datasets", Hub(found))
    return load_splits(TaskSettings(name=task, hub=f"org/{task}"), seed=1)


def sizes(splits: Splits) -> list[int]:
    return [len(part) for part in (splits.train, splits.validation, splits.test)]


def meanings(split: str, count: int) -> list[dict[str, str]]:
    return [
        {"meaning_representation": f"name[{split} {n // 2}], food[Thai]", "human_reference": f"{split} {n}, \"Thai\"."}
        for n in range(count)
    ]  # fmt: skip


def test_every_published_data_set_has_a_hub_form() -> None:
    published = {name for name in TASKS.names() if hasattr(TASKS.load(name), "NUM_ROWS")} | {"e2e_nlg"}
    assert published >= {"e2e_nlg", "samsum", "wikisql", "multi_nli"}
    for name in published:
        assert TASKS.load(name).HUB_FILES["train"], name


def test_e2e(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"train": meanings("a", 8), "validation": meanings("b", 4), "test": meanings("c", 4)}
    splits = read(monkeypatch, "e2e_nlg", found)
    assert sizes(splits) == [4, 2, 2]
    first = splits.train[0]
    assert (first.source, first.values) == ("name[a 0], food[Thai]", ("a 0",))
    assert first.references == ('a 0, "Thai".', 'a 1, "Thai".')
    assert "train: 8 rows (the published set has 42,061)" in splits.notes
    assert splits.notes[0].startswith("data set org/e2e_nlg of the hub")
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"expected a header with one column 'mr'"):
        read(monkeypatch, "e2e_nlg", {split: [{"text": "x"}] for split in found})


@pytest.mark.parametrize("release", ["original", "cleaned"])
def test_e2e_knows_which_release_the_hub_gave(release: str, tmp_path: Path) -> None:
    counts = e2e_nlg.RELEASES[release].num_rows
    for split, file in e2e_nlg.HUB_FILES.items():
        rows = "".join(f"name[{split}],text {n}\n" for n in range(counts[split]))
        (tmp_path / file).write_text(f"mr,ref\n{rows}", encoding="utf-8")
    assert e2e_nlg.load(tmp_path, seed=1).notes == ()


def test_samsum(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "train": task_samples.dialogues("train", 6),
        "validation": task_samples.dialogues("validation", 2),
        "test": task_samples.dialogues("test", 2),
    }
    splits = read(monkeypatch, "samsum", found)
    assert sizes(splits) == [6, 2, 2]
    assert splits.train[0].references == ("Ann and Dan meet at the mill (train 0).",)
    assert "train: 6 rows (the published set has 14,732)" in splits.notes


def test_multi_nli(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(part: str, count: int) -> list[dict[str, Any]]:
        return [
            {"promptID": n, "premise": f"{part} {n // 3}.", "hypothesis": f"H {n}.", "label": (n % 4) - 1}
            for n in range(count)
        ]

    found = {
        "train": rows("a", 40),
        "validation_matched": rows("b", 8),
        "validation_mismatched": rows("c", 8),
    }
    splits = read(monkeypatch, "multi_nli", found)
    assert sum(sizes(splits)[:2]) == 30
    assert sizes(splits)[2] == 6
    assert {example.label for example in splits.test} == {0, 1, 2}
    assert "train: 30 rows (the published set has 392,702)" in splits.notes
    assert "test: 6 rows (the published set has 9,815)" in splits.notes
    snli = {"train": rows("a", 40), "validation": rows("b", 8), "test": rows("c", 8)}
    monkeypatch.setitem(sys.modules, "datasets", Hub(snli))
    splits = load_splits(TaskSettings(name="multi_nli", hub="org/snli"), seed=1)
    assert sizes(splits) == [30, 6, 6]
    assert not any("published" in note for note in splits.notes), "SNLI is another set"


def hub_row(split: str, number: int) -> dict[str, Any]:
    """A row of WikiSQL as the hub has it: the table inside, conditions as three lists."""
    row = task_samples.questions(split, number + 1)[number]
    columns, operators, values = (
        zip(*row["sql"]["conds"], strict=True) if row["sql"]["conds"] else ((), (), ())
    )
    conds = {
        "column_index": list(columns), "operator_index": list(operators), "condition": [str(v) for v in values]
    }  # fmt: skip
    table = task_samples.table(split, number // 2) | {"page_title": "", "name": "table_1", "caption": ""}
    sql = {"human_readable": "SELECT ...", "sel": row["sql"]["sel"], "agg": row["sql"]["agg"], "conds": conds}
    return {"phase": 1, "question": row["question"], "table": table, "sql": sql}


def test_wikisql(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {split: [hub_row(split, n) for n in range(6)] for split in ("train", "validation", "test")}
    splits = read(monkeypatch, "wikisql", found)
    assert sizes(splits) == [6, 6, 6]
    own = TASKS.load("wikisql").load(task_samples.write_wikisql(tmp_path / "own", train=6), seed=1)
    assert splits.train[0].source == own.train[0].source
    assert splits.train[1].references == own.train[1].references
    assert any(note.startswith("no databases (train.db") for note in splits.notes)
    assert not any("no tables" in note for note in splits.notes)
    assert "train: 6 rows (the published set has 56,355)" in splits.notes
    (tables,) = (tmp_path / "cache" / "hub").rglob("train.tables.jsonl")
    assert len(tables.read_text(encoding="utf-8").splitlines()) == 3, "each table once"
    monkeypatch.setitem(sys.modules, "datasets", Hub({"train": [{"question": "x", "sql": {}}]}))
    settings = TaskSettings(name="wikisql", hub="org/other")
    with pytest.raises(
        DataError, match=r"org/other has other columns than this task reads \(train\.jsonl: 'tab"
    ):
        load_splits(settings, seed=1)


def test_two_tasks_do_not_share_the_files_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"t {n}", "label": n % 2, "premise": f"p {n}", "hypothesis": "h"} for n in range(20)]
    monkeypatch.setitem(
        sys.modules, "datasets", Hub({"train": rows, "test": [rows[0] | {"premise": "q", "text": "u"}]})
    )
    for _ in range(2):
        plain = load_splits(TaskSettings(name="jsonl", hub="org/rows"), seed=1)
        assert plain.labels == ("0", "1")
        pairs = load_splits(TaskSettings(name="multi_nli", hub="org/rows"), seed=1)
        assert pairs.labels == ("entailment", "neutral", "contradiction")
    assert json.dumps(sizes(pairs)) != json.dumps([0, 0, 0])
