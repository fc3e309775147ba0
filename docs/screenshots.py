"""Takes the screenshots for docs/report.md: `python docs/screenshots.py outputs/demo/report.html`.

It requires Chromium and Playwright (`make browser`).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main(report: Path) -> None:
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)

        def opened(scheme: Any, width: int, height: int) -> Any:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(report.resolve().as_uri())
            page.wait_for_selector("html[data-ready]")
            page.add_style_tag(content="html { scroll-behavior: auto !important }")
            return page

        def shot(page: Any, name: str, at: str | None = None) -> None:
            if at is not None:
                page.evaluate("at => document.querySelector(at).scrollIntoView()", at)
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / f"report-{name}.png")

        page = opened("light", 1280, 1240)
        shot(page, "light")
        page.set_viewport_size({"width": 1280, "height": 1060})
        page.get_by_role("combobox", name="sorted by").select_option("clear")
        shot(page, "pairs", "#pairs")
        page.set_viewport_size({"width": 1280, "height": 1130})
        page.locator("button.match").nth(4).click()
        page.mouse.move(0, 0)
        shot(page, "tournament", "#tournaments")
        shot(opened("dark", 1280, 960), "dark", "#curves")
        shot(opened("light", 400, 860), "phone", "#judge")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
