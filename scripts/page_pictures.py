"""Save charts of a page of `abcli eval`, `calibrate` or `bench` (`--html`) as PNG, as headless Chromium shows them."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH = 760


def main() -> int:
    """Write FILE.png for each TITLE=FILE.png; 1 if there is no browser, or no chart of that title."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("pictures", nargs="+", metavar="TITLE=FILE.png")
    arguments = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        print("error: there is no browser\ninstall Chromium", file=sys.stderr)
        return 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(arguments.page.resolve().as_uri())
        for picture in arguments.pictures:
            title, _, name = picture.partition("=")
            figures = page.locator("figure", has_text=title)
            if not figures.count():
                print(f"error: {arguments.page} has no chart {title!r}", file=sys.stderr)
                return 1
            figures.first.screenshot(path=name)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
