"""Pages of evaluations and benchmarks."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from abcli.pages.charts import Series, chart
from abcli.ui.report_pages import bench_page, pareto_front
from tests.support.browser import browser, problems
from tests.ui.test_bench import report


@given(st.lists(st.tuples(st.integers(1, 9).map(float), st.floats(0, 5)), min_size=1))
def test_a_front_has_what_nothing_beats(points):
    front = pareto_front(points)
    for cost, loss in points:
        beaten = any(c <= cost and worse <= loss and (c, worse) != (cost, loss) for c, worse in points)
        assert ((cost, loss) in front) or beaten
    costs, losses = [c for c, _ in front], [loss for _, loss in front]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)


numbers = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.booleans())
def test_every_point_lies_in_the_drawing(points, log):
    points = [(x, abs(y) + 1e-3) for x, y in points]
    drawn = chart("t", [Series("s", [x for x, _ in points], [y for _, y in points])], "x", "y", log_y=log)
    found = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.e+]+) (-?[\d.e+]+)", drawn.curves[0].path)]
    assert len(found) == len(points)
    for x, y in found:
        assert drawn.left - 0.2 <= x <= drawn.right + 0.2
        assert drawn.top - 0.2 <= y <= drawn.bottom + 0.2
    assert len(drawn.y_ticks) >= 2


def test_a_benchmark_is_a_page_for_everyone(tmp_path):
    page = bench_page(report())
    assert "Tokens per second, decoding" in page
    path = tmp_path / "bench.html"
    path.write_text(page)
    with browser() as opened:
        shown = opened.new_page(viewport={"width": 400, "height": 900})
        shown.goto(path.as_uri())
        assert problems(shown) == []
        assert shown.evaluate("document.documentElement.scrollWidth") <= 400
