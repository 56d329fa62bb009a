"""The page, driven in a real browser: Debian's Chromium, with axe to judge whether everybody can use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.live import running_server

pytestmark = pytest.mark.peers

QUESTION = "Name three colours and say why."


@pytest.fixture(scope="module")
def address(real_model: Path) -> Iterator[str]:
    with running_server(real_model, buckets=2) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no Chromium: on Debian, apt install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[(1400, "light"), (400, "dark")], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(90_000)
    page = context.new_page()
    problems: list[str] = []
    # Among them what the policy forbids.
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#model:has-text('2 buckets')")
    yield page
    context.close()
    assert problems == []


def ask(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not([hidden])")


def check_for_everybody(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_word_tells_what_each_bucket_would_have_said(page: Any) -> None:
    check_for_everybody(page)
    ask(page, QUESTION)
    page.wait_for_selector(".actions")
    words = page.locator(".word")
    assert words.count() > 0
    assert page.locator(".message.assistant .body").inner_text().strip()
    assert "buckets agree" in words.first.get_attribute("title")
    check_for_everybody(page)
    words.first.click()
    rows = page.locator("#view table").first.locator("th").all_inner_texts()
    assert rows[0] == "together"
    assert len(rows) == 3
    check_for_everybody(page)
    page.keyboard.press("Escape")
    assert page.locator("#view").is_hidden()


def test_the_keyboard_is_enough(page: Any) -> None:
    ask(page, QUESTION)
    page.wait_for_selector(".actions")
    page.locator(".message.assistant .body").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#view:not([hidden])")
    assert page.locator(".word.chosen").count() == 1


def test_files_are_text_and_settings_are_kept(page: Any) -> None:
    page.click("#settings-toggle")
    page.fill("#system", "Answer in one word.")
    page.locator("#system").blur()
    check_for_everybody(page)
    files = [
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"<b>bold</b>"},
        {"name": "picture.png", "mimeType": "image/png", "buffer": b"\x89PNG\0"},
    ]
    page.set_input_files("#files", files)
    page.wait_for_selector("#problem:has-text('picture.png is not text')")
    assert page.locator("#attached li").all_inner_texts()[0].startswith("notes.txt")
    ask(page, "What is in the file?")
    # Markup in what was said stays text.
    assert "<b>bold</b>" in page.locator(".message.user .body").inner_text()
    assert page.locator(".message b").count() == 0
    page.reload()
    page.wait_for_selector("#chat-list .open", state="attached")
    assert page.input_value("#system") == "Answer in one word."
    if page.locator("#chats-toggle").is_visible():
        page.click("#chats-toggle")
    page.click("#chat-list .open")
    page.wait_for_selector(".message.user")


def test_an_answer_can_be_stopped(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)
    page.fill("#text", QUESTION)
    page.keyboard.press("Enter")
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    assert page.locator(".message.assistant").count() == 0


def test_calls_of_tools_are_shown_and_their_results_given(page: Any) -> None:
    asked: list[Any] = []
    call = (
        'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"a","type":"function",'
        '"function":{"name":"weather","arguments":"{\\"city\\": \\"Bonn\\"}"}}]},"finish_reason":null}]}\n\n'
    )
    end = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    thought = 'data: {"choices":[{"index":0,"delta":{"reasoning_content":"Hm."},"finish_reason":null}]}\n\n'
    text = 'data: {"choices":[{"index":0,"delta":{"content":"It rains."},"finish_reason":null}]}\n\n'

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json)
        body = thought + (call if len(asked) == 1 else text) + end
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    ask(page, "Weather?")
    page.wait_for_selector(".call textarea")
    assert page.locator("summary").inner_text() == "Thought"
    check_for_everybody(page)
    page.fill(".call textarea", "rain")
    page.click(".call button")
    page.wait_for_selector(".body:has-text('It rains.')")
    assert asked[1]["messages"][-1] == {"role": "tool", "tool_call_id": "a", "content": "rain"}
