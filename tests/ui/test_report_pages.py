"""Pages of evaluations and benchmarks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from abcli.evals.report import RecordedCost
from abcli.evals.scores import Score
from abcli.pages.charts import Series, chart
from abcli.ui.report_pages import bench_page, evaluation_page, pareto_front
from tests.evals.test_report import CONFIGURATIONS, made_up
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


def evaluated(**changes):
    """A made-up evaluation, and its costs."""
    made = made_up(**changes)
    costs = {one.name: RecordedCost(20 / at, 18 / at, 21 / at, at << 29) for at, one in enumerate(CONFIGURATIONS, 1)}
    return made, replace(made, costs=costs)


def test_quality_stands_against_what_it_costs():
    made, costed = evaluated()
    plain, page = evaluation_page(made, made.summaries()), evaluation_page(costed, made.summaries())
    assert "Quality against buckets" in plain
    assert "Quality against speed" not in plain
    assert page.count("Quality against speed") == page.count("Quality against memory") == 2 * len(made.lengths)
    # The faster one is better, too: nothing is gained for the cost of the other.
    assert "not beaten" not in page
    assert "native, 20: 0." in page
    assert "native, 0.5: 0." in page
    assert "memory, GiB" in page
    assert "<td>9 to 10.5</td><td>1.0 GiB</td>" in page


def test_a_line_joins_what_is_not_beaten():
    made, costed = evaluated(
        scores={one.name: (Score(2.0 - at, False, None),) * 16 for at, one in enumerate(CONFIGURATIONS)}
    )
    page = evaluation_page(costed, made.summaries())
    assert page.count("not beaten in both</li>") == 4
    for part in page.split("not beaten in both</li>")[:4]:
        # From the fast and small to the slow and large one.
        assert (
            len(
                re.findall(
                    r'<path class="line" d="M[^L"]*L[^L"]*"', part.rpartition("<figure>")[2].partition("legend")[0]
                )
            )
            == 1
        )


def test_a_configuration_has_one_colour_and_mark_throughout():
    _, page = evaluated()
    page = evaluation_page(page, page.summaries())
    legends = [re.findall(r'curve (c\d)".*?</svg>([^<]*)</li>', part) for part in page.split('class="legend"')[1:]]
    for name, colour in ((CONFIGURATIONS[0].name, "c0"), (escape(CONFIGURATIONS[1].name), "c1")):
        assert {found for legend in legends for found, shown in legend if shown == name} == {colour}
    outlines = {mark for legend in page.split('class="legend"')[1:] for mark in re.findall(r"M12 5([^\"]*)", legend)}
    assert len(outlines) == 2


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_reports_are_pages_for_everyone(opened, tmp_path, width, scheme):
    _, costed = evaluated()
    pages = {"bench": bench_page(report()), "eval": evaluation_page(costed, costed.summaries())}
    assert "Tokens per second, decoding" in pages["bench"]
    for name, page in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(page)
        shown = opened.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown.goto(path.as_uri())
        assert problems(shown) == []
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        # No label of a chart lies on another one.
        assert shown.evaluate(OVERLAPS) == []
        shown.close()


# Pairs of texts of one chart whose boxes share more than a sliver.
OVERLAPS = """() => [...document.querySelectorAll("svg.chart")].flatMap((chart) => {
    const boxes = [...chart.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
    return boxes.flatMap(([text, a], index) => boxes.slice(index + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1).map(([other]) => text + " on " + other));
})"""
