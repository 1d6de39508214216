"""The built site has none of the problems that a script can find in Chromium."""

import pytest
from conftest import TOP

pytest.importorskip("playwright", reason='pip install -e ".[site]"')
import browser
from playwright.sync_api import sync_playwright


@pytest.fixture
def site():
    """Return the folder of the built site. Skip the test without Chromium, or if a page has changed since."""
    with sync_playwright() as playwright:
        if browser.find_chromium(playwright) is None:
            pytest.skip("Chromium is not installed")
    built = browser.SITE / "index.html"
    sources = [*(TOP / "docs").glob("*.md"), *(TOP / "docs" / "_static").iterdir()]
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("the site is not built, or not up to date: run `make docs`")
    return browser.SITE


@pytest.mark.slow
def test_the_built_site_has_no_problem_in_chromium(site):
    assert browser.find_problems(site) == []
