"""The page, driven in a real browser: Debian's Chromium, with axe to judge whether everybody can use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.live import running_server
from tests.serve.process import served
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_model

pytestmark = pytest.mark.peers

WINDOWS = [(1400, "light"), (400, "dark")]
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


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, common_home: Path) -> Iterator[str]:
    """The address of a server of three models, of which one at a time is loaded, and one makes embeddings."""
    folder = tmp_path_factory.mktemp("several")
    files = [write_tiny_model(folder / "first.gguf"), write_tiny_model(folder / "second.gguf", seed=1)]
    files.append(write_tiny_bert(folder / "third.gguf"))
    with served(*files, "--models-max", 1, "-k", 2, "-c", 512, "-n", 20, "--temp", 0) as server:
        yield f"http://127.0.0.1:{server.port}"


@contextmanager
def opened(
    browser: Any, address: str, width: int, scheme: str, *, shown: str = "2 buckets", allowed: str = ""
) -> Iterator[Any]:
    """The page in a window of its own, as soon as it shows a model. Nothing but what is allowed may go wrong in it."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(90_000)
    page = context.new_page()
    problems: list[str] = []
    # Among them what the policy forbids.
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.wait_for_selector(f"#model:has-text('{shown}')")
    yield page
    context.close()
    assert [text for text in problems if not allowed or allowed not in text] == []


@pytest.fixture(params=WINDOWS, ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address, *request.param) as found:
        yield found


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


@pytest.mark.parametrize(("width", "scheme"), WINDOWS, ids=["wide", "narrow"])
def test_a_model_is_chosen(browser: Any, several: str, width: int, scheme: str) -> None:
    """Of several models: who answers is shown, and kept; one that makes embeddings says so, and is not offered then."""
    with opened(browser, several, width, scheme, shown="first", allowed="501") as page:
        page.click("#settings-toggle")
        assert page.locator("#which option").all_inner_texts()[:2] == ["first", "second"]
        # The keyboard is enough.
        page.locator("#which").focus()
        page.locator("#which").press("ArrowDown")
        assert page.input_value("#which") == "second"
        page.wait_for_selector("#model:has-text('second')")
        check_for_everybody(page)
        page.click("#settings-toggle")
        ask(page, "Hello")
        page.wait_for_selector(".message.assistant h2:has-text('second')")
        # It was loaded for the question, and its buckets are known now.
        page.wait_for_selector("#model:has-text('second · 2 buckets')")
        check_for_everybody(page)
        page.reload()
        page.wait_for_selector("#model:has-text('second · 2 buckets')")
        page.click("#settings-toggle")
        page.select_option("#which", "third")
        ask(page, "Hello")
        page.wait_for_selector("#problem:has-text('third is an embedding model')")
        page.wait_for_selector("#model:has-text('first')")
        assert page.locator("#which option").all_inner_texts() == ["first", "second"]
        check_for_everybody(page)
