"""WikiSQL's metrics on a small database of our own: logical form under each rule, and execution."""

from __future__ import annotations

import doctest
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from peftlab import wikisql_scores
from peftlab.errors import DataError, NotComputedError
from peftlab.metrics import execution_accuracy, logical_form, logical_form_2018
from peftlab.task import Example
from peftlab.wikisql_queries import write_query
from peftlab.wikisql_scores import Database, same_logical_form, same_results

COLUMNS = ["Player", "No.", "Points"]
TABLE = "1-1000-1"
ROWS = [("ann", "42", 10.0), ("ben", "7", 1200.0), ("cat", "42", 5.5)]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "dev.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE table_1_1000_1 (col0 text, col1 text, col2 real)")
    connection.executemany("INSERT INTO table_1_1000_1 VALUES (?, ?, ?)", ROWS)
    connection.commit()
    connection.close()
    return path


def query(sel: int, agg: int = 0, *conds: list[Any]) -> dict[str, Any]:
    return {"sel": sel, "agg": agg, "conds": list(conds)}


def asked(database: Path | None, gold: dict[str, Any], *, table: str = TABLE) -> Example:
    facts = ()
    if database is not None:
        facts = (("database", str(database)), ("table", table), ("columns", json.dumps(COLUMNS)))
    return Example("dev-0", "s", (write_query(gold, COLUMNS),), facts=facts)


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(wikisql_scores).failed == 0


@pytest.mark.parametrize(
    ("made", "today", "ordered", "of_2018"),
    [
        (query(0, 0, [1, 0, "42"], [2, 1, 5]), True, True, True),
        (query(0, 0, [2, 1, 5], [1, 0, "42"]), True, False, False),
        (query(0, 0, [1, 0, 42], [2, 1, 5]), True, True, False),
        (query(0, 0, [1, 0, "42"], [2, 1, 5], [1, 0, "42"]), True, False, False),
        (query(0, 0, [1, 0, "42"]), False, False, False),
        (query(1, 0, [1, 0, "42"], [2, 1, 5]), False, False, False),
        (query(0, 3, [1, 0, "42"], [2, 1, 5]), False, False, False),
        (query(0, 0, [1, 0, "42"], [2, 2, 5]), False, False, False),
    ],
)
def test_the_three_rules(made: dict[str, Any], today: bool, ordered: bool, of_2018: bool) -> None:
    gold = query(0, 0, [1, 0, "42"], [2, 1, 5])
    assert same_logical_form(made, gold, "today") is today
    assert same_logical_form(made, gold, "ordered") is ordered
    assert same_logical_form(made, gold, "2018") is of_2018


def test_strings_are_compared_in_lower_case() -> None:
    assert same_logical_form(query(0, 0, [1, 0, "ANN"]), query(0, 0, [1, 0, "ann"]), "2018")


def test_the_leaves_read_what_models_write() -> None:
    gold = asked(None, query(0, 0, [1, 0, "42"], [2, 1, 5]))
    other = asked(None, query(0))
    answers = ["```sql\nselect player from t where points > 5 and \"no.\" = '42';\n```", "I do not know."]
    found = logical_form.score(answers, [gold, other], seed=1)
    assert found.value == 0.5
    assert "no query:1" in found.signature
    assert logical_form_2018.score(answers, [gold, other], seed=1).value == 0
    with pytest.raises(NotComputedError, match=r"'dev-9' is no WikiSQL query .* for the task wikisql"):
        logical_form.score(["a"], [Example("dev-9", "s", ("Aromi is a pub.",))], seed=1)


@pytest.mark.parametrize("has_database", [False, True])
def test_what_a_model_writes_after_its_query_does_not_count(has_database: bool, database: Path) -> None:
    gold = asked(database if has_database else None, query(0))
    answers = [
        'SELECT "Player" FROM table\nquestion: Where is x = 5',
        'SELECT "Player" FROM table\nThe answer is where Points = 10',
        'To select the player: SELECT "Player" FROM table',
        "SELECT Player\nFROM table\nWHERE Points > 5",
        "SELECT (SELECT Player FROM table)",
    ]
    found = logical_form.score(answers, [gold] * 5, seed=1)
    assert found.rows is not None
    assert found.rows.tolist() == [1, 1, 1, 0, 0]
    assert f"columns by {'number' if has_database else 'name'}|no query:1" in found.signature


def test_columns_are_read_by_number_where_the_table_is_known(database: Path) -> None:
    """Another spelling of a column that WikiSQL's own code prints is read; a column that is none is no query."""
    gold = asked(database, query(2, 1))
    found = logical_form.score(["SELECT MAX Points FROM t", "SELECT MAX(Team) FROM t"], [gold] * 2, seed=1)
    assert found.value == 0.5
    assert "no query:1" in found.signature


@pytest.mark.parametrize(
    ("asked_for", "expected"),
    [
        (query(0, 0, [1, 0, "42"]), ["ann", "cat"]),
        (query(0, 0, [0, 0, "ANN"]), ["ann"]),  # the databases hold lower case
        (query(0, 3), [3]),
        (query(2, 4, [1, 0, "42"]), [15.5]),
        (query(2, 1), [1200.0]),
        (query(0, 0, [2, 0, "1,200"]), ["ben"]),  # a number read from a string
        (query(0, 0, [2, 1, "about 6 points"]), ["ann", "ben"]),
        (query(0, 0, [2, 2, 6]), ["cat"]),
        (query(0, 0, [0, 0, "nobody"]), []),
        (query(2, 4, [0, 0, "nobody"]), [None]),
        (query(0, 0, [2, 0, "no number"]), None),
        (query(9), None),
        (query(0, 0, [9, 0, 1]), None),
        (query(0, 0, [1, 3, 1]), None),  # OP
    ],
)
def test_what_a_query_finds(asked_for: dict[str, Any], expected: list[Any] | None, database: Path) -> None:
    with Database(database) as opened:
        assert opened.execute(TABLE, asked_for) == expected


def test_execution_accuracy_takes_other_queries_that_find_the_same(database: Path) -> None:
    gold = asked(database, query(0, 0, [1, 0, "7"]))
    answers = {
        "SELECT Player FROM t WHERE No. = '7'": 1,
        "SELECT Player FROM t WHERE Points > 100": 1,  # another query, the same player
        "SELECT Player FROM t": 0,
        "SELECT Team FROM t": 0,  # no such column
        "Ben": 0,
    }
    found = execution_accuracy.score(list(answers), [gold] * 5, seed=1)
    assert found.value == sum(answers.values()) / 5
    assert found.rows is not None
    assert found.rows.tolist() == list(answers.values())
    assert "no query:2" in found.signature


def test_without_a_database_execution_is_not_computed(database: Path) -> None:
    gold = query(0)
    with pytest.raises(NotComputedError, match=r"1 of 2 examples have none .*\.db files of WikiSQL"):
        execution_accuracy.score(["a", "b"], [asked(database, gold), asked(None, gold)], seed=1)


def test_a_database_that_is_not_the_right_one_is_named(database: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no table '1-2-3'"):
        execution_accuracy.score(["a"], [asked(database, query(0), table="1-2-3")], seed=1)
    with pytest.raises(DataError, match=r"is no table id of WikiSQL"):
        execution_accuracy.score(["a"], [asked(database, query(0), table="1; DROP TABLE x")], seed=1)
    with pytest.raises(DataError, match=r"there is no database"):
        execution_accuracy.score(["a"], [asked(tmp_path / "none.db", query(0))], seed=1)
    (tmp_path / "text.db").write_text("this is no database, only a text of some length")
    with pytest.raises(DataError, match=r"is no SQLite database"):
        execution_accuracy.score(["a"], [asked(tmp_path / "text.db", query(0))], seed=1)
    with pytest.raises(NotComputedError, match=r"own query of example 'dev-0' cannot be executed"):
        execution_accuracy.score(["a"], [asked(database, query(0, 0, [2, 0, "word"]))], seed=1)


def test_the_database_is_opened_for_reading_alone(database: Path) -> None:
    before = database.read_bytes()
    with Database(database) as opened:
        opened.execute(TABLE, query(0))
        with pytest.raises(sqlite3.OperationalError):
            opened._connection.execute("DELETE FROM table_1_1000_1")
    assert database.read_bytes() == before


def test_results_are_compared_in_their_order() -> None:
    assert same_results(["a", "b"], ["a", "b"])
    assert not same_results(["b", "a"], ["a", "b"])
    assert not same_results(None, ["a"])
