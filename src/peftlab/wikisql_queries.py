"""WikiSQL's queries as text and back: `{"sel": 0, "agg": 3, "conds": [[1, 0, "42"]]}`, `SELECT COUNT("Player") ...`.

A query of the data set is a column to select, an aggregation, and conditions joined by AND; columns, aggregations and
operators are numbers. As text:

```
SELECT COUNT("Player") FROM table WHERE "No." = '42' AND "Year" > 1990
```

Column names stand in double quotes, strings in single ones (both doubled inside), numbers bare: so that the text gives
the query back, types included. Aggregations are none, MAX, MIN, COUNT, SUM, AVG; operators are =, >, < and OP, which
the data set numbers but no row uses.

What a model writes is read leniently: keywords and names in any case, other quotes or none, `==`, a code fence, text
before SELECT, a semicolon and what follows it. What cannot be read as such a query is `Unparsable`, with the reason.

Source: github.com/salesforce/WikiSQL, lib/query.py; Zhong, Xiong and Socher 2017 (arXiv:1709.00103), section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.errors import DataError

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")

Query = dict[str, Any]
"""`sel`: a column; `agg`: index of `AGGREGATIONS`; `conds`: lists of column, index of `OPERATORS`, value. Columns are
numbers, or names where they were read without a header."""

_CLOSING = {"'": "'", '"': '"', "`": "`", "[": "]"}
_BEFORE_A_QUOTE = set(" \t\r\n(=<>,")
_AFTER_A_QUOTE = set(" \t\r\n)=<>,;")
_WORD = re.compile(r"[^\W\d]\w*")
_AGGREGATED = re.compile(
    r"(MAX|MIN|COUNT|SUM|AVG)\s*(?:\((.*)\)|(?=[\"'`\[])(.*))", re.IGNORECASE | re.DOTALL
)
_BARE = re.compile(r"(MAX|MIN|COUNT|SUM|AVG)\s+(.*)", re.IGNORECASE | re.DOTALL)
_OPERATOR = re.compile(r"[=<>!]+|\bOP\b", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+(\.\d*)?|(\.\d+))([eE][+-]?\d+)?")
_FENCE = re.compile(r"```(?:\w+[ \t]*\n)?(.*?)(?:```|$)", re.DOTALL)
_FOREIGN = {"or", "having", "limit", "join", "union", "between", "like"}
_WITH_BY = {"order", "group"}
_MOST_DIGITS = 300


@dataclass(frozen=True, slots=True)
class Unparsable:
    """A text that is no query.

    Attributes:
        reason: What is wrong with it.
    """

    reason: str


def column_names(header: Sequence[object]) -> tuple[str, ...]:
    """The names by which a table's columns are told to a model and written in queries.

    Args:
        header: The table's own column names, which may occur twice or hold line breaks.

    Returns:
        One name for each column, on one line, no two alike whatever their case: a later one gets a number.

    Example:
        >>> column_names(["Year", "Team", "team"])
        ('Year', 'Team', 'team (2)')
    """
    names: list[str] = []
    taken: set[str] = set()
    for given in header:
        plain = " ".join(str(given).split())
        name, number = plain, 1
        while _alike(name) in taken:
            number += 1
            name = f"{plain} ({number})"
        taken.add(_alike(name))
        names.append(name)
    return tuple(names)


def numbered_columns(count: int) -> tuple[str, ...]:
    """Names for the columns of a table that is not known.

    Args:
        count: How many columns.

    Returns:
        "col0", "col1", ..., as WikiSQL's own databases call them.

    Example:
        >>> numbered_columns(2)
        ('col0', 'col1')
    """
    return tuple(f"col{number}" for number in range(count))


def check_query(query: object, *, num_columns: int | None = None) -> Query:
    """A query of the data set, after a look at everything in it.

    Args:
        query: What stands under "sql" in a row.
        num_columns: Columns of its table; None where that is not known.

    Returns:
        The query, its conditions as lists.

    Raises:
        DataError: A part is missing, of the wrong type or out of range; says which.

    Example:
        >>> check_query({"sel": 0, "agg": 9, "conds": []})
        Traceback (most recent call last):
        ...
        peftlab.errors.DataError: 'agg' must be 0 to 5, got 9
    """
    if not isinstance(query, Mapping):
        raise DataError(f"'sql' must be an object with sel, agg and conds, got {query!r}")
    missing = [key for key in ("sel", "agg", "conds") if key not in query]
    if missing:
        raise DataError(f"'sql' lacks {', '.join(missing)}")
    most = None if num_columns is None else num_columns - 1
    selected = _index("'sel'", query["sel"], most)
    aggregation = _index("'agg'", query["agg"], len(AGGREGATIONS) - 1)
    if not isinstance(query["conds"], Sequence) or isinstance(query["conds"], str):
        raise DataError(f"'conds' must be a list, got {query['conds']!r}")
    conditions = []
    for number, condition in enumerate(query["conds"]):
        where = f"condition {number}"
        if not isinstance(condition, Sequence) or isinstance(condition, str) or len(condition) != 3:
            raise DataError(f"{where} must be a list of column, operator and value, got {condition!r}")
        column, operator, value = condition
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{where}: the value must be a string or a number, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{where}: the value must be finite, got {value!r}")
        operator = _index(f"{where}: the operator", operator, len(OPERATORS) - 1)
        conditions.append([_index(f"{where}: the column", column, most), operator, value])
    return {"sel": selected, "agg": aggregation, "conds": conditions}


def write_query(query: Mapping[str, Any], columns: Sequence[str]) -> str:
    r"""A query as text.

    Args:
        query: `sel`, `agg` and `conds` with columns as numbers.
        columns: The table's names, from `column_names` or `numbered_columns`.

    Returns:
        The text; `read_query` gives the query back.

    Raises:
        DataError: A part of the query is missing or out of range.

    Example:
        >>> write_query({"sel": 0, "agg": 3, "conds": [[1, 0, "O'Hara"], [1, 1, 7]]}, ["Player", "No."])
        'SELECT COUNT("Player") FROM table WHERE "No." = \'O\'\'Hara\' AND "No." > 7'
    """
    checked = check_query(query, num_columns=len(columns))
    names = ['"' + name.replace('"', '""') + '"' for name in columns]
    selected, aggregation = names[checked["sel"]], AGGREGATIONS[checked["agg"]]
    text = f"SELECT {aggregation}({selected})" if aggregation else f"SELECT {selected}"
    conditions = [
        f"{names[column]} {OPERATORS[operator]} {_literal(value)}"
        for column, operator, value in checked["conds"]
    ]
    return f"{text} FROM table" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def read_query(text: str, columns: Sequence[str] | None = None) -> Query | Unparsable:
    """A query from a text, a reference or what a model wrote.

    Args:
        text: The text.
        columns: The table's names; None where they are not at hand.

    Returns:
        The query with columns as numbers; without `columns` as names, in lower case and on one line, so that two texts
        can be compared. `Unparsable` where it is no such query or names a column that the table lacks.

    Example:
        >>> read_query("select min(year) from t where team = 'Leeds';", ["Year", "Team"])
        {'sel': 0, 'agg': 2, 'conds': [[1, 0, 'Leeds']]}
        >>> read_query("SELECT Year FROM t ORDER BY Year")
        Unparsable(reason="it holds 'ORDER', which a WikiSQL query does not have")
    """
    found = _read(text, columns)
    if not isinstance(found, Unparsable) or not text.strip():
        return found
    fenced = _FENCE.search(text)
    part = fenced.group(1) if fenced else text.strip().splitlines()[0]  # a model may write on after its query
    other = _read(part, columns)
    return found if isinstance(other, Unparsable) else other


def _index(what: str, value: object, most: int | None) -> int:
    """A number from 0 to `most`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < 0
        or (most is not None and value > most)
    ):
        limits = "0 or more" if most is None else f"0 to {most}"
        raise DataError(f"{what} must be {limits}, got {value!r}")
    return value


def _literal(value: str | int | float) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def _alike(name: str) -> str:
    """A name without what a model may change: case and white space."""
    return " ".join(name.casefold().split())


def _read(text: str, columns: Sequence[str] | None) -> Query | Unparsable:
    """A query from a text without a fence."""
    words = _words(text)
    if isinstance(words, Unparsable):
        return words
    begins = [word for word in words if word[0] == "select"]
    if not begins:
        return Unparsable("it holds no SELECT")
    while len(begins) > 1 and _is_prose(text, words, begins[0][2], begins[1][1]):
        begins = begins[1:]
    start = begins[0][2]
    ends = [at for word, at, _ in words if word == ";" and at > start]
    end = ends[0] if ends else len(text)
    inside = [word for word in words if start <= word[1] < end]
    if len(begins) > 1 and begins[1] in inside:
        return Unparsable("it holds more than one SELECT")
    source = next((word for word in inside if word[0] == "from"), None)
    after = source[1] if source else start
    where = next((word for word in inside if word[0] == "where" and word[1] >= after), None)
    table = text[source[2] : where[1] if where else end] if source else ""
    if "\n" in table.strip():  # a query does not go on after a line that its table's name ends
        end = source[2] + table.index("\n", len(table) - len(table.lstrip())) if source else end
        where, inside = None, [word for word in inside if word[1] < end]
    behind = [word for word in inside if source and word[1] >= after]
    for (word, at, stop), following in zip(behind, [*behind[1:], ("", 0, 0)], strict=False):
        if word in _FOREIGN or (word in _WITH_BY and following[0] == "by"):
            return Unparsable(f"it holds '{text[at:stop].upper()}', which a WikiSQL query does not have")
    selected = _selection(text[start : (source or where or ("", end, end))[1]].strip())
    conditions = [] if where is None else _conditions(text, where[2], end, inside)
    if isinstance(conditions, Unparsable):
        return conditions
    if selected[1] is None:
        return Unparsable("it selects no column")
    return _numbered({"sel": selected[1], "agg": selected[0], "conds": conditions}, columns)


def _is_prose(text: str, words: Sequence[tuple[str, int, int]], start: int, stop: int) -> bool:
    """Whether no query stands between two SELECTs, as in "To select the player: SELECT ..."."""
    return "(" not in text[start:stop] and not any(w == "from" and start <= at < stop for w, at, _ in words)


def _words(text: str) -> list[tuple[str, int, int]] | Unparsable:
    """Words and semicolons outside quotes, in lower case, with their place."""
    found: list[tuple[str, int, int]] = []
    at = 0
    while at < len(text):
        if text[at] in _CLOSING and (at == 0 or text[at - 1] in _BEFORE_A_QUOTE):
            stop = _quote_end(text, at)
            if stop is None:
                return Unparsable(f"the {text[at]} at character {at} is not closed")
            at = stop
            continue
        word = _WORD.match(text, at) if at == 0 or not text[at - 1].isalnum() else None
        if word:
            found.append((word.group().casefold(), at, word.end()))
        elif text[at] == ";":
            found.append((";", at, at + 1))
        at = word.end() if word else at + 1
    return found


def _quote_end(text: str, start: int) -> int | None:
    """The place behind a quoted text; a quote within a word does not close it, nor does a doubled one."""
    closing = _CLOSING[text[start]]
    at = start + 1
    while at < len(text):
        if text[at] == closing:
            if closing != "]" and text[at + 1 : at + 2] == closing:
                at += 1
            elif at + 1 == len(text) or text[at + 1] in _AFTER_A_QUOTE:
                return at + 1
        at += 1
    return None


def _unquote(text: str) -> tuple[str, bool]:
    """A text without the quotes around the whole of it, and whether it had some."""
    if text and text[0] in _CLOSING and _quote_end(text, 0) == len(text):
        closing = _CLOSING[text[0]]
        return (text[1:-1] if closing == "]" else text[1:-1].replace(closing * 2, closing)), True
    return text, False


def _selection(text: str) -> tuple[int, str | None]:
    """Aggregation and column name; None where there is no name."""
    name, quoted = _unquote(text)
    if quoted:
        return 0, name
    aggregated = _AGGREGATED.fullmatch(text)
    if aggregated:
        inner = (aggregated.group(2) if aggregated.group(2) is not None else aggregated.group(3)).strip()
        name, quoted = _unquote(inner)
        return AGGREGATIONS.index(aggregated.group(1).upper()), name if quoted or name else None
    return 0, text or None


def _conditions(
    text: str, start: int, end: int, words: Sequence[tuple[str, int, int]]
) -> list[list[Any]] | Unparsable:
    """The conditions of a text between two places, columns as names."""
    cuts = [(at, behind) for word, at, behind in words if word == "and" and at >= start]
    begins = [start]
    for (at, behind), following in zip(cuts, [*(at for at, _ in cuts[1:]), end], strict=False):
        if text[begins[-1] : at].strip().endswith(("'", '"')) or _split(text[behind:following]) is not None:
            begins.append(behind)  # else an "and" within a value that has no quotes
    stops = [at for at, behind in cuts if behind in begins] + [end]
    conditions: list[list[Any]] = []
    for begin, stop in zip(begins, stops, strict=True):
        found = _condition(text[begin:stop].strip())
        if isinstance(found, Unparsable):
            return found
        conditions.append(found)
    return conditions


def _condition(part: str) -> list[Any] | Unparsable:
    """One condition, its column as a name."""
    found = _split(part)
    if found is None:
        return Unparsable(f"the condition {part!r} has no operator")
    name, operator, text = found
    operator = "=" if operator == "==" else operator.upper()
    if operator not in OPERATORS:
        return Unparsable(f"the operator {operator} is none of {', '.join(OPERATORS)}")
    if not text:
        return Unparsable(f"the condition {part!r} has no value")
    value, quoted = _unquote(text)
    if not quoted and (text[0] in "'\"`" or "\n" in text):
        return Unparsable(f"more than one value stands in {text!r}")
    return [name, OPERATORS.index(operator), value if quoted else _value(text)]


def _split(part: str) -> tuple[str, str, str] | None:
    """Column name, operator and value of a condition; None where it has no operator."""
    behind = _quote_end(part, 0) if part[:1] in _CLOSING else None
    operator = _OPERATOR.search(part, behind or 0)
    if operator is None or not part[: operator.start()].strip():
        return None
    name, _ = _unquote(part[: operator.start()].strip())
    return name, operator.group(), part[operator.end() :].strip()


def _value(text: str) -> str | int | float:
    """A value without quotes: what looks like a number is one."""
    number = _NUMBER.fullmatch(text) if len(text) <= _MOST_DIGITS else None
    if number is None:
        return text
    if not any(number.groups()):
        return int(text)
    return float(text) if math.isfinite(float(text)) else text


def _numbered(named: Query, columns: Sequence[str] | None) -> Query | Unparsable:
    """A query with its columns as numbers."""
    if columns is None:
        conditions = [[_alike(name), operator, value] for name, operator, value in named["conds"]]
        return {**named, "sel": _alike(named["sel"]), "conds": conditions}
    place = {_alike(name): number for number, name in enumerate(columns)}
    bare = _BARE.fullmatch(named["sel"])
    if (
        bare and not named["agg"] and _alike(named["sel"]) not in place
    ):  # MAX Year, as WikiSQL's own code prints it
        named = {**named, "sel": bare.group(2), "agg": AGGREGATIONS.index(bare.group(1).upper())}
    names = [named["sel"], *(condition[0] for condition in named["conds"])]
    unknown = [name for name in names if _alike(name) not in place]
    if unknown:
        return Unparsable(f"the table has no column '{unknown[0]}'")
    selected, *others = [place[_alike(name)] for name in names]
    rest = [[column, *condition[1:]] for column, condition in zip(others, named["conds"], strict=True)]
    return {"sel": selected, "agg": named["agg"], "conds": rest}
