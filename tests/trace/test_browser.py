"""The page of a trace in a browser: what a person sees and reaches."""

from __future__ import annotations

import pytest

from abcli.trace.page import save_trace
from tests.support.browser import browser, problems
from tests.trace.samples import made_trace

PROMPT = [f" word{index}" + ("." if index % 9 == 8 else "") for index in range(120)]
ANSWER = [" The", " <b>", " answer", "\n", " alone", ".", ""]


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


@pytest.fixture
def page_of(opened, tmp_path):
    pages = []

    def show(trace, **settings):
        path = tmp_path / "trace.html"
        save_trace(trace, path)
        page = opened.new_page(**settings)
        pages.append(page)
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or page.complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield show
    for page in pages:
        page.close()


def test_a_chosen_token_shows_the_engines_numbers(page_of):
    trace = made_trace(PROMPT, ANSWER)
    page = page_of(trace)
    page.locator("[data-step]").nth(2).click()
    step = trace.steps[2]
    rows = page.locator("#detail tbody tr")
    assert rows.count() == 4
    for bucket, view in enumerate(step.views):
        cells = rows.nth(bucket).locator("th, td").all_inner_texts()
        assert float(cells[1]) == pytest.approx(view.weight, abs=1e-4)
        assert float(cells[2]) == pytest.approx(100 * view.probability, abs=0.06)
        assert float(cells[3].split()[-1]) == pytest.approx(100 * view.candidates[0].probability, abs=0.06)
    assert page.locator("[data-step]").nth(2).get_attribute("aria-pressed") == "true"
    # What the chosen token attends to: each passage, under each bucket.
    cells = page.locator("#passages tbody tr").nth(1).locator("td").all_inner_texts()[1:]
    for cell, share in zip(cells, trace.attention.passages[2, :, 1], strict=True):
        assert float(cell.split()[-1]) == pytest.approx(100 * share, abs=0.06)
    page.locator("input[value=whole]").check()
    start, end = trace.passages[1]
    cells = page.locator("#passages tbody tr").nth(1).locator("td").all_inner_texts()[1:]
    for cell, row in zip(cells, trace.attention.whole, strict=True):
        assert float(cell.split()[-1]) == pytest.approx(100 * row[start:end].sum(), abs=0.06)
    assert page.complaints == []


def test_the_page_says_the_same_before_its_script_runs_and_after(page_of):
    page = page_of(made_trace(PROMPT, ANSWER))
    script = """[...document.querySelectorAll("#passages td > span, #passages td:not(.passage)")].map(
        (one) => [one.textContent, Number((one.className.match(/s(\\d)/) || [0, 0])[1])])"""
    before = page.evaluate(script)
    page.locator("input[name=row]").first.check()
    assert page.evaluate(script) != before
    page.locator("input[name=row]").last.check()
    after = page.evaluate(script)
    assert [text for text, _level in after] == [text for text, _level in before]
    # The script has the shares in half precision.
    assert all(abs(now[1] - then[1]) <= 1 for now, then in zip(after, before, strict=True))


def test_the_keyboard_reaches_every_token(page_of):
    page = page_of(made_trace(PROMPT, ANSWER))
    tokens = page.locator("[data-step]")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert tokens.nth(2).get_attribute("aria-pressed") == "true"
    assert page.locator("#detail caption").inner_text().startswith("Token 3 of 7")
    page.keyboard.press("End")
    assert page.locator("#detail caption").inner_text().startswith("Token 7 of 7")
    # One stop for the whole answer on the way through the page.
    assert page.locator("[data-step][tabindex='0']").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_in_the_way_of_anyone(page_of, width, scheme):
    page = page_of(made_trace(PROMPT, ANSWER), viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator("[data-step]").nth(1).click()
    page.locator("details summary").click()
    assert problems(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []
