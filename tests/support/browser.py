"""A headless browser for tests of pages; they are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium as Playwright drives it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no browser: install Chromium")
    with playwright.sync_playwright() as driver:
        # A container has no user namespaces for Chromium's own sandbox, and the pages are ours.
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def problems(page: Any) -> list[str]:
    """What axe finds wrong with a page, for people who do not see it, or do not use a mouse."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python"
    )
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]
