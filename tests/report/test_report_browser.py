"""Pages in a real browser, headless: they render in light and dark, say nothing on the console, and fetch nothing.

Runs where Chromium is installed by the system's packages and playwright drives it; skips with the reason elsewhere.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxprune.artifact.compare import compare, render

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (path := shutil.which(name))
    ),
    None,
)
if BROWSER is None:
    pytest.skip("no Chromium among the system's packages", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # a sandbox of Chromium's own does not start for root; the pages are ours, and their policy forbids scripts
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        running = started.chromium.launch(executable_path=BROWSER, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    other = tmp_path_factory.mktemp("pages") / "compare.html"
    other.write_text(render(compare([reported, reported])), encoding="utf-8")
    return {"report": reported / "report.html", "compare": other}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_renders(name: str, scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    from PIL import Image

    said, asked = list[str](), list[str]()
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.scripts.length") == 0
    # nothing is wider than the window, every drawing has a size, and every picture was decoded
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000
    for kind in ("svg", "img"):
        for element in page.query_selector_all(f"figure {kind}"):
            box = element.bounding_box()
            assert box["width"] > 200
            assert box["height"] > 40
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.query_selector_all("figure svg")
    # letters of drawings stand out from the page, whatever the scheme
    back, ink = (
        page.evaluate(f"getComputedStyle({where}).{what}")
        for where, what in (("document.body", "backgroundColor"), ("document.querySelector('figure svg text')", "fill"))
    )
    assert contrast(back, ink) > 4.5
    assert (luminance(back) < 0.2) == (scheme == "dark")
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L")
    histogram = picture.histogram()
    assert histogram[0:64] != [0] * 64  # something is dark, something is light
    assert histogram[192:] != [0] * 64
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    parts = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    """Contrast ratio, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


def test_a_narrow_window_needs_no_sideways_scrolling(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(pages["report"].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
