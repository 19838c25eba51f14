"""Which points nothing beats, against every pair by hand; and a table whose cells carry what sorts them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peftlab.report.pareto_chart import Point, draw_pareto, pareto_front
from peftlab.report.sortable import Cell, sortable_table
from peftlab.tables import show_bytes

POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9)


@given(POINTS, st.booleans())
def test_the_front_is_what_no_point_beats(pairs: list[tuple[int, int]], higher: bool) -> None:
    points = [Point(str(i), cost, score) for i, (cost, score) in enumerate(pairs)]
    front = pareto_front(points, higher_is_better=higher)
    sign = 1 if higher else -1
    for point in points:
        beaten = any(
            (o.cost < point.cost and sign * o.score >= sign * point.score)
            or (o.cost <= point.cost and sign * o.score > sign * point.score)
            for o in points
        )
        assert (point in front) is not beaten
    assert [p.cost for p in front] == sorted(p.cost for p in front)


def test_the_axis_is_logarithmic_only_where_costs_span_much() -> None:
    near = [Point("a", 100, 1.0), Point("b", 120, 2.0, (1.5, 2.5))]
    told = {"cost": "peak memory", "score": "bleu", "show_cost": show_bytes}
    assert "logarithmic" not in draw_pareto(near, **told)  # type: ignore[arg-type]
    assert "logarithmic" in draw_pareto([*near, Point("c", 10_000, 3.0)], **told)  # type: ignore[arg-type]
    assert "two scored runs are needed" in draw_pareto(near[:1], **told)  # type: ignore[arg-type]


def test_cells_are_sorted_by_value_and_escaped() -> None:
    html = sortable_table(["a<b", "size"], [[Cell("<x>", link="p?a&b"), Cell("1 KiB", 1024)]])
    assert 'data-key="1024"' in html
    assert "&lt;x&gt;" in html
    assert 'href="p?a&amp;b"' in html
    assert "a&lt;b" in html
