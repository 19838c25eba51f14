"""WikiSQL's files: what is read, what is told to be missing, what is refused; a whole run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import task_samples
import whole_runs
from peftlab.config import build_config
from peftlab.errors import DataError, NotComputedError
from peftlab.execute import execute
from peftlab.metrics import execution_accuracy, logical_form
from peftlab.tasks import wikisql
from peftlab.wikisql_queries import Unparsable, column_names, read_query

COLUMNS = '"Player", "No. (train0)", "Year ""A"" of birth", "player (2)"'


def question(table: str, text: str = "Who?", **sql: Any) -> dict[str, Any]:
    return {"phase": 1, "table_id": table, "question": text, "sql": {"sel": 0, "agg": 0, "conds": [], **sql}}


def table(name: str, header: Any = ("a", "b")) -> dict[str, Any]:
    return {"id": name, "header": header, "types": ["text", "text"], "rows": []}


def write(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """Three splits of one question about a table of their own, files replaced by those given."""
    for name in ("train", "dev", "test"):
        task_samples.write_lines(folder / f"{name}.jsonl", files.get(name, [question(name)]))
        task_samples.write_lines(folder / f"{name}.tables.jsonl", files.get(f"{name}_tables", [table(name)]))
    return folder


def test_questions_with_their_columns_and_queries(tmp_path: Path) -> None:
    splits = wikisql.load(task_samples.write_wikisql(tmp_path), seed=1)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [24, 6, 6]
    one, two = splits.train[0], splits.train[1]
    assert one.id == "train-0"
    assert one.source == f"question: Who of train 0 came after 1990?\ncolumns: {COLUMNS}"
    assert one.references == ('SELECT "Player" FROM table',)
    assert two.references == ("SELECT MAX(\"No. (train0)\") FROM table WHERE \"Player\" = 'Ben''s'",)
    assert [path.name for path in splits.files] == [
        *(f"{name}.jsonl" for name in ("train", "dev", "test")),
        *(f"{name}.tables.jsonl" for name in ("train", "dev", "test")),
    ]
    assert not [note for note in splits.notes if "tables" in note or "databases" in note]
    assert "validation: 6 rows (the published set has 8,421)" in splits.notes


@pytest.mark.parametrize("tables", [True, False])
def test_every_reference_gives_its_query_back(tables: bool, tmp_path: Path) -> None:
    splits = wikisql.load(task_samples.write_wikisql(tmp_path, tables=tables), seed=1)
    for index, example in enumerate(splits.train):
        asked = task_samples.questions("train", 24)[index]
        header = task_samples.table("train", index // 2)["header"]
        columns = column_names(header) if tables else [f"col{i}" for i in range(4)]
        assert read_query(example.references[0], columns) == asked["sql"]


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    splits = wikisql.load(task_samples.write_wikisql(tmp_path, tables=False, databases=False), seed=1)
    assert splits.train[1].source == "question: Who of train 1 came after 1991?"
    assert splits.train[1].references == ("SELECT MAX(\"col1\") FROM table WHERE \"col0\" = 'Ben''s'",)
    tables, databases = splits.notes[:2]
    assert tables.startswith(
        "no tables (train.tables.jsonl, dev.tables.jsonl, test.tables.jsonl): the model is not told"
    )
    assert databases.startswith("no databases (train.db, dev.db, test.db): queries cannot be executed")
    task_samples.write_wikisql(tmp_path, tables=True)
    (tmp_path / "dev.tables.jsonl").unlink()
    with pytest.raises(DataError, match=r"lacks dev.tables.jsonl, but has the tables of other splits"):
        wikisql.load(tmp_path, seed=1)


def test_tables_are_kept_whole(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        train=[question("dev"), question("dev", "What?"), question("test"), question("train")],
        train_tables=[table("dev", ["x"]), table("test", ["y"]), table("train", ["z"])],
        dev=[question("dev"), question("test")],
        dev_tables=[table("dev", ["x"]), table("test", ["y"])],
        test_tables=[table("test", ["y"])],
    )
    splits = wikisql.load(folder, seed=1)
    assert [e.source for e in splits.train] == ['question: Who?\ncolumns: "z"']
    assert [e.source for e in splits.validation] == ['question: Who?\ncolumns: "x"']
    assert splits.notes[-3:] == (
        "validation: tables dropped because they also stand in test: 1",
        "train: tables dropped because they also stand in test: 1",
        "train: tables dropped because they also stand in validation: 1 (2 examples)",
    )


def test_a_question_that_reads_the_same_does_not_stand_in_two_splits(tmp_path: Path) -> None:
    folder = write(
        tmp_path, train=[question("train"), question("train", "Other?")], dev=[question("dev", "Third?")]
    )
    splits = wikisql.load(folder, seed=1)
    assert [e.source.splitlines()[0] for e in splits.train] == ["question: Other?"]
    assert any("questions about tables of the same columns dropped" in note for note in splits.notes)


def test_duplicates_are_counted_and_queries_gathered(tmp_path: Path) -> None:
    train = [question("train"), question("train", " Who? "), question("train", sel=1)]
    splits = wikisql.load(
        write(tmp_path, train=train, dev=[question("dev", "x")], test=[question("test", "y")]), seed=1
    )
    (example,) = splits.train
    assert example.references == ('SELECT "a" FROM table', 'SELECT "b" FROM table')
    assert "train: duplicate rows read once: 1" in splits.notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train": [question("nowhere")]},
            r"train.jsonl, line 1: there is no table 'nowhere' in the split's",
        ),
        (
            {"train": [question("train"), question("train", sel=2)]},
            r"train.jsonl, line 2: 'sel' must be 0 to 1, got 2",
        ),
        ({"dev": [question("dev", agg=9)]}, r"dev.jsonl, line 1: 'agg' must be 0 to 5"),
        ({"dev": [question("dev", conds=[[0, 0]])]}, r"dev.jsonl, line 1: condition 0 must be a list"),
        ({"dev": [{**question("dev"), "sql": "SELECT"}]}, r"dev.jsonl, line 1: 'sql' must be an object"),
        ({"dev": [{"table_id": "dev"}]}, r"dev.jsonl, line 1: 'question' is missing"),
        ({"dev": [question("dev", " ")]}, r"dev.jsonl, line 1: 'question' is empty"),
        ({"dev": []}, r"dev.jsonl: no questions in it"),
        ({"dev_tables": []}, r"dev.tables.jsonl: no tables in it"),
        (
            {"dev_tables": [table("dev", "a")]},
            r"dev.tables.jsonl, line 1: 'header' must be a list of column names",
        ),
        (
            {"dev_tables": [table("dev"), table("dev")]},
            r"line 2: the table 'dev' stands in the file a second time",
        ),
    ],
)
def test_a_malformed_row_is_named_with_its_line(files: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        wikisql.load(write(tmp_path, **files), seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(question("test")).encode() + b'\n\n{"table_id": \n', r"test.jsonl, line 3: not JSON"),
        (b"[1]\n", r"test.jsonl, line 1: expected an object"),
        (b'{"question": "caf\xe9"}\n', r"test.jsonl, line 1: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_json_lines(content: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        wikisql.load(tmp_path, seed=1)


@pytest.mark.parametrize("tables", [True, False])
def test_the_databases_own_answers_are_found(tables: bool, tmp_path: Path) -> None:
    splits = wikisql.load(task_samples.write_wikisql(tmp_path, tables=tables), seed=1)
    examples = [example for part in (splits.train, splits.validation, splits.test) for example in part]
    golds = [example.references[0] for example in examples]
    assert execution_accuracy.score(golds, examples, seed=1).value == 1
    assert logical_form.score(golds, examples, seed=1).value == 1
    wrong = ["SELECT nothing"] * len(golds)
    assert execution_accuracy.score(wrong, examples, seed=1).value == 0
    task_samples.write_wikisql(tmp_path / "bare", databases=False)
    bare = wikisql.load(tmp_path / "bare", seed=1).test
    with pytest.raises(NotComputedError, match=r"needs the database of each question"):
        execution_accuracy.score([example.references[0] for example in bare], bare, seed=1)


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"lacks dev.jsonl. Expected: train.jsonl"):
        wikisql.load(tmp_path, seed=1)
    with pytest.raises(DataError, match=r"is not a folder"):
        wikisql.load(tmp_path / "nowhere", seed=1)
    with pytest.raises(DataError, match=r"give their folder with --data-dir"):
        wikisql.load(None, seed=1)


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_whole_run(model: str, tmp_path: Path) -> None:
    data = task_samples.write_wikisql(tmp_path / "tables")
    values = whole_runs.make_values(
        tmp_path,
        task={"name": "wikisql", "data_dir": str(data), "max_length": 300},
        training={"max_steps": 2, "validation_steps": 2, "warmup_steps": 0},
        evaluation={"num_samples": 2, "max_new_tokens": 3},
        schedule={"strategy": None},
    )
    values["model"]["name"] = str(whole_runs.save_byte_model(tmp_path / model, model))
    done = execute(build_config(values), show=lambda line: None)
    assert done.is_finished
    assert set(done.summary()["scores"]["after"]) == set(wikisql.METRICS)


def test_the_upstream_slice(shared_data: Path) -> None:
    splits = wikisql.load(shared_data / "wikisql", seed=1)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [3997, 999, 1000]
    assert splits.notes[0].startswith("no tables (")
    lines = (shared_data / "wikisql" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row, example in zip(rows, splits.test, strict=True):
        columns = [f"col{i}" for i in range(30)]
        assert read_query(example.references[0], columns) == row["sql"]


def test_queries_of_another_writer(shared_data: Path) -> None:
    path = shared_data / "wikisql" / "text_rows" / "train.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for text in texts:
        header = text.split("\ncolumns: ")[1].split("\nQ: ")[0].split(", ")
        found.append(read_query(text.split("\nA: ")[1], column_names(header)))
    unread = [one for one in found if isinstance(one, Unparsable)]
    assert len(unread) < 0.05 * len(
        found
    )  # a name with "and", a comma or "where" cannot be told without quotes
