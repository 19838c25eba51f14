"""How WikiSQL's queries are compared: by their parts (logical form), or by what they find in a database (execution).

A query is a mapping with `sel`, `agg` and `conds`, as in the data set (`wikisql_queries`).

Source: github.com/salesforce/WikiSQL, lib/query.py and lib/dbengine.py, of today and of June 2018; Zhong, Xiong and Socher
2017 (arXiv:1709.00103), section 4.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from peftlab.errors import DataError, NotComputedError

Rule = Literal["today", "ordered", "2018"]

_AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
_OPERATORS = ("=", ">", "<")
_COLUMN = re.compile(r"[(,]\s*[\"`\[]?(col\d+)[\"`\]]?\s+(\w+)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")  # dbengine.py
_THOUSANDS = re.compile(r"[-+]?[\d,]*\d(?:\.\d*)?|[-+]?\.\d+")


def same_logical_form(query: Mapping[str, Any], gold: Mapping[str, Any], rule: Rule = "today") -> bool:
    """Whether two queries have the same parts.

    Args:
        query: A model's query.
        gold: The data set's.
        rule: "today": conditions in any order, repeats once, values compared as lower-cased text (the official
            evaluator's default). "ordered": the same in their order (its `--ordered`). "2018": in their order, strings
            lower-cased and numbers left numbers, so that 5 is not "5" (the rule behind the README's 0.3538).

    Returns:
        Whether column, aggregation and conditions agree.

    Example:
        >>> gold = {"sel": 0, "agg": 0, "conds": [[1, 0, "Leeds"], [2, 1, 5]]}
        >>> same_logical_form({"sel": 0, "agg": 0, "conds": [[2, 1, "5"], [1, 0, "leeds"]]}, gold)
        True
    """
    if (query["sel"], query["agg"]) != (gold["sel"], gold["agg"]):
        return False
    own, other = (_conditions(one["conds"], as_text=rule != "2018") for one in (query, gold))
    return set(own) == set(other) if rule == "today" else own == other


def _conditions(conditions: Iterable[Iterable[Any]], *, as_text: bool) -> list[tuple[Any, Any, Any]]:
    return [
        (column, operator, str(value).lower() if as_text or isinstance(value, str) else value)
        for column, operator, value in conditions
    ]


class Database:
    """A `.db` file of WikiSQL, open for reading; a context manager.

    Args:
        path: The file.

    Raises:
        DataError: There is no such file, or it is no SQLite database.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"there is no database {path}; take the upstream file")
        self.path = path
        self._connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        self._types: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Database:
        """Give the database."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._connection.close()

    def execute(self, table: str, query: Mapping[str, Any]) -> list[Any] | None:
        """What a query finds.

        Args:
            table: The table's id, e.g. "1-10015132-11".
            query: `sel`, `agg` and `conds` with columns as numbers.

        Returns:
            The results in the database's order; None where the query cannot be executed: a column that the table lacks,
            the operator OP, or a word where a number is needed.

        Raises:
            DataError: The file is no SQLite database, or has no such table.

        Source: WikiSQL, lib/dbengine.py, `execute` (strings lower-cased, numbers read from strings for real columns).
        """
        types = self._columns(table)
        selected = f"col{query['sel']}"
        conditions = [(f"col{column}", operator, value) for column, operator, value in query["conds"]]
        known = all(column in types for column in (selected, *(column for column, _, _ in conditions)))
        if not known or any(operator >= len(_OPERATORS) for _, operator, _ in conditions):
            return None
        values = [_bound(value, types[column]) for column, _, value in conditions]
        if any(value is None for value in values):
            return None
        aggregation = _AGGREGATIONS[query["agg"]]
        what = f"{aggregation}({selected})" if aggregation else selected
        where = " AND ".join(f"{column} {_OPERATORS[operator]} ?" for column, operator, _ in conditions)
        # all names in this text are col and a number, or come from the file's own list of tables
        text = f"SELECT {what} FROM {_table_name(table)}" + (f" WHERE {where}" if where else "")
        try:
            with closing(self._connection.execute(text, values)) as found:
                return [row[0] for row in found]
        except sqlite3.Error:
            return None

    def _columns(self, table: str) -> dict[str, str]:
        """Each column's type."""
        if table not in self._types:
            try:
                found = self._connection.execute(
                    "SELECT sql FROM sqlite_master WHERE tbl_name = ?", (_table_name(table),)
                ).fetchone()
            except sqlite3.Error as error:
                raise DataError(
                    f"{self.path} is no SQLite database ({error}); take the upstream file"
                ) from error
            if found is None:
                raise DataError(f"{self.path} has no table '{table}'; take the database of the same split")
            self._types[table] = {name: kind.lower() for name, kind in _COLUMN.findall(found[0])}
        return self._types[table]


def _table_name(table: str) -> str:
    """The name of a table in WikiSQL's databases."""
    name = f"table_{table.replace('-', '_')}"
    if not re.fullmatch(r"\w+", name):
        raise DataError(
            f"'{table}' is no table id of WikiSQL; expected numbers and dashes, e.g. 1-10015132-11"
        )
    return name


def _bound(value: str | int | float, kind: str) -> str | int | float | None:
    """A condition's value as the database compares it; None for a word where the column is of numbers."""
    if not isinstance(value, str):
        return value
    lowered = value.lower()
    if kind != "real":
        return lowered
    if _THOUSANDS.fullmatch(lowered.strip()):
        return float(lowered.replace(",", ""))
    number = _NUMBER.search(lowered)
    return float(number.group()) if number else None


def same_results(found: list[Any] | None, gold: list[Any] | None) -> bool:
    """Whether two queries found the same, in the same order.

    Args:
        found: What a model's query found; None where it could not be executed.
        gold: What the data set's query found.

    Returns:
        Whether they agree; a query that could not be executed agrees with nothing.

    Raises:
        NotComputedError: The data set's own query could not be executed.

    Example:
        >>> same_results(["leeds"], ["leeds"])
        True
    """
    if gold is None:
        raise NotComputedError(
            "the data set's own query cannot be executed: take the database of the same split"
        )
    return found is not None and found == gold
