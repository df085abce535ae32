"""A real browser for the tests of reports: it opens a page, waits for it, and notes what it says and asks for."""

import os
import shutil
import time

import pytest

__all__ = ["SETTLED", "browser", "opened", "wait"]

CHROMIUM = shutil.which("chromium")
SETTLED = "[...document.querySelectorAll('canvas.map')].every((c) => c.dataset.missing === '0')"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make install)")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox"] if os.getuid() == 0 else []  # chromium has no sandbox for root
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a report; when the test ends nothing may have been said on the console or asked of a network."""
    said, asked, contexts = [], [], []

    def open_page(path, width=1280, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        wait(page, SETTLED)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


def wait(page, condition):
    """Until the expression is true. The page's policy forbids what Playwright would poll with."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)
