"""WikiSQL's queries as text and back; what models write; what is no query."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peftlab.errors import DataError
from peftlab.wikisql_queries import (
    AGGREGATIONS,
    OPERATORS,
    Unparsable,
    check_query,
    column_names,
    numbered_columns,
    read_query,
    write_query,
)

COLUMNS = ("Player", "No.", 'The "A" (x)', "from where and select", "")
TEXTS = st.sampled_from(["```", "a```b", "ORDER BY x", "''"]) | st.text(
    "ab '\"`[]();,=<>\n\\é and where", max_size=12
)


def same(first: Any, second: Any) -> bool:
    """Equal, types included."""
    return first == second and repr(first) == repr(second)


@pytest.mark.parametrize("operator", range(len(OPERATORS)), ids=OPERATORS)
@pytest.mark.parametrize("aggregation", range(len(AGGREGATIONS)), ids=AGGREGATIONS)
def test_every_aggregation_and_operator_both_ways(aggregation: int, operator: int) -> None:
    query = {
        "sel": 2,
        "agg": aggregation,
        "conds": [[1, operator, "4' 2"], [0, operator, -3], [3, operator, 0.5]],
    }
    text = write_query(query, COLUMNS)
    assert AGGREGATIONS[aggregation] in text
    assert text.count(f" {OPERATORS[operator]} ") == 3
    assert same(read_query(text, COLUMNS), query)


@given(
    header=st.lists(TEXTS | st.text(max_size=6), min_size=1, max_size=5),
    data=st.data(),
    aggregation=st.integers(0, 5),
)
def test_round_trip(header: list[str], data: st.DataObject, aggregation: int) -> None:
    columns = column_names(header)
    column = st.integers(0, len(columns) - 1)
    value = (
        TEXTS
        | st.text(max_size=8)
        | st.integers(-(10**12), 10**12)
        | st.floats(allow_nan=False, allow_infinity=False)
    )
    conditions = data.draw(st.lists(st.tuples(column, st.integers(0, 3), value).map(list), max_size=3))
    query = {"sel": data.draw(column), "agg": aggregation, "conds": conditions}
    text = write_query(query, columns)
    assert same(read_query(text, columns), query)
    named = read_query(text)
    assert not isinstance(named, Unparsable)
    assert named["agg"] == aggregation
    assert [c[1:] for c in named["conds"]] == [c[1:] for c in conditions]


@given(header=st.lists(TEXTS | st.sampled_from(["a", "A", "a (2)", " a\n"]), max_size=8))
@example(header=["a", "a (2)", "A"])
def test_names_are_told_apart_whatever_their_case(header: list[str]) -> None:
    names = column_names(header)
    assert len({" ".join(name.casefold().split()) for name in names}) == len(header)
    assert not any("\n" in name for name in names)
    for given_name, name in zip(header, names, strict=True):
        assert name.startswith(" ".join(given_name.split()))


@given(
    st.text(max_size=60)
    | st.text("SELECTFROMWHERE AND'\"`[]()=<>;\n0123", max_size=60).map(lambda t: f"SELECT {t}")
)
def test_no_text_is_too_odd(text: str) -> None:
    for columns in (None, COLUMNS):
        found = read_query(text, columns)
        if not isinstance(found, Unparsable):
            assert found["agg"] in range(6)
            assert all(len(condition) == 3 for condition in found["conds"])


PLAIN = {"sel": 0, "agg": 3, "conds": [[1, 0, "42"]]}


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("select count(player) from t where no. = '42'", PLAIN),
        ('SQL: SELECT COUNT(`Player`) FROM [my table] WHERE [No.]=="42";', PLAIN),
        ('```sql\nSELECT COUNT("Player")\nFROM table\nWHERE "No." = \'42\'\n```\nI hope so.', PLAIN),
        ('SELECT COUNT("Player") FROM table WHERE "No." = \'42\'\nquestion: And who else?', PLAIN),
        ('SELECT COUNT "Player" FROM table WHERE "No." = \'42\'', PLAIN),
        ("SELECT Player", {"sel": 0, "agg": 0, "conds": []}),
        ("SELECT MAX No. FROM t", {"sel": 1, "agg": 1, "conds": []}),
        ("SELECT Player WHERE No. > 4.50", {"sel": 0, "agg": 0, "conds": [[1, 1, 4.5]]}),
        (
            "SELECT player FROM t WHERE no. = Tom and Jerry",
            {"sel": 0, "agg": 0, "conds": [[1, 0, "Tom and Jerry"]]},
        ),
        (
            "SELECT player FROM t WHERE no. = Tom and Jerry and player = 'O'Brien'",
            {"sel": 0, "agg": 0, "conds": [[1, 0, "Tom and Jerry"], [0, 0, "O'Brien"]]},
        ),
        (
            "SELECT No. FROM t WHERE Player = men's team",
            {"sel": 1, "agg": 0, "conds": [[0, 0, "men's team"]]},
        ),
        ("SELECT No. FROM t WHERE Player = 9e999", {"sel": 1, "agg": 0, "conds": [[0, 0, "9e999"]]}),
        (
            f"SELECT No. FROM t WHERE Player = {'9' * 5000}",
            {"sel": 1, "agg": 0, "conds": [[0, 0, "9" * 5000]]},
        ),
    ],
)
def test_what_models_write_is_read(text: str, query: dict[str, Any]) -> None:
    assert same(read_query(text, COLUMNS), query)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it holds no SELECT"),
        ("I do not know.", "it holds no SELECT"),
        ("SELECT", "it selects no column"),
        ("SELECT FROM t", "it selects no column"),
        ("SELECT MAX() FROM t", "it selects no column"),
        ("SELECT Player FROM t WHERE", "has no operator"),
        ("SELECT Player FROM t WHERE No. =", "has no value"),
        ("SELECT Player FROM t WHERE No. = '4", "is not closed"),
        ("SELECT Player FROM t WHERE No. >= 4", "the operator >= is none of"),
        ("SELECT Player FROM t WHERE No. != 4", "the operator != is none of"),
        ("SELECT Player FROM t WHERE No. = '4' '5'", "more than one value"),
        ("SELECT Player FROM t WHERE No. LIKE 'x'", "it holds 'LIKE'"),
        ("SELECT Player FROM t ORDER BY No.", "it holds 'ORDER'"),
        ("SELECT Player FROM t WHERE No. = 1 OR No. = 2", "it holds 'OR'"),
        ("SELECT Player FROM t WHERE No. = (SELECT No. FROM t)", "more than one SELECT"),
        ("SELECT Team FROM t", "the table has no column 'Team'"),
        ("SELECT Player FROM t WHERE Team = 1", "the table has no column 'Team'"),
    ],
)
def test_what_is_no_query_says_why(text: str, reason: str) -> None:
    found = read_query(text, COLUMNS)
    assert isinstance(found, Unparsable)
    assert reason in found.reason


def test_without_a_header_names_are_compared() -> None:
    one = read_query('SELECT MAX("No.  Of\tWins") FROM table WHERE "Team" = \'A\'')
    two = read_query("select max(no. of wins) from x where TEAM = 'A'")
    assert one == two == {"sel": "no. of wins", "agg": 1, "conds": [["team", 0, "A"]]}


def test_a_table_that_is_not_known() -> None:
    query = {"sel": 1, "agg": 0, "conds": [[0, 2, 4]]}
    assert write_query(query, numbered_columns(2)) == 'SELECT "col1" FROM table WHERE "col0" < 4'


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([], "'sql' must be an object"),
        ({"sel": 0}, "'sql' lacks agg, conds"),
        ({"sel": 5, "agg": 0, "conds": []}, "'sel' must be 0 to 4, got 5"),
        ({"sel": -1, "agg": 0, "conds": []}, "'sel' must be 0 to 4, got -1"),
        ({"sel": True, "agg": 0, "conds": []}, "'sel' must be 0 to 4, got True"),
        ({"sel": 0, "agg": 6, "conds": []}, "'agg' must be 0 to 5, got 6"),
        ({"sel": 0, "agg": 0, "conds": "x"}, "'conds' must be a list"),
        ({"sel": 0, "agg": 0, "conds": [[0, 0]]}, "condition 0 must be a list of column, operator and value"),
        (
            {"sel": 0, "agg": 0, "conds": [[0, 0, "a"], [0, 4, "a"]]},
            "condition 1: the operator must be 0 to 3",
        ),
        ({"sel": 0, "agg": 0, "conds": [[9, 0, "a"]]}, "condition 0: the column must be 0 to 4"),
        (
            {"sel": 0, "agg": 0, "conds": [[0, 0, None]]},
            "condition 0: the value must be a string or a number",
        ),
        (
            {"sel": 0, "agg": 0, "conds": [[0, 0, True]]},
            "condition 0: the value must be a string or a number",
        ),
        ({"sel": 0, "agg": 0, "conds": [[0, 0, float("nan")]]}, "condition 0: the value must be finite"),
    ],
)
def test_a_malformed_query_is_refused(query: object, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        check_query(query, num_columns=len(COLUMNS))
    if message != "'sql' must be an object":
        with pytest.raises(DataError, match=r"must|lacks"):
            write_query(query, COLUMNS)  # type: ignore[arg-type]
