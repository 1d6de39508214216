"""One notebook as a reader meets it: in JupyterLab, in a real browser.

Needs selenium (`pip install -e ".[browser]"`), Chromium and its driver (Debian: chromium, chromium-driver).
"""

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SCREENS = Path(__file__).parent / "screens"  # written anew by CTXKV_KEEP_SCREENS=1
SMALL = (96, 48)  # pixels in which screenshots are compared: fonts blur away, curves and bars stay
LEAST_LIKENESS = 0.8  # correlation over the pixels; a blank figure has none, the other theme a negative one
PREFERENCES = {
    "profile.default_content_setting_values.automatic_downloads": 1
}  # several, one after the other
SETTINGS = {  # of JupyterLab: every cell is on the page, whether it is in sight or not
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}
RUN_ALL = "[data-command='runmenu:run-all']"
IDLE = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1800",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and its driver are not installed"),
    pytest.mark.skipif(find_spec("selenium") is None, reason="selenium is not installed"),
]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab over a copy of one notebook; its address."""
    shutil.copy(NOTEBOOKS / "03_phase2_context_kv.ipynb", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "CTXKV_PRESET": "ci", "CTXKV_RUNS": str(tmp_path / "runs")}
    environment["JUPYTER_CONFIG_DIR"] = str(tmp_path / "config")
    for plugin, settings in SETTINGS.items():
        path = tmp_path / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{address}/api"), 90, "JupyterLab to answer")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(option)
    options.add_experimental_option(
        "prefs", PREFERENCES | {"download.default_directory": str(tmp_path / "downloads")}
    )
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def wait_for(condition, seconds, what):
    """The first true value of `condition`, looked at twice a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds} s for {what}")


def find(browser, selector, text=""):
    """The elements that match a CSS selector and hold a text, unless the page has replaced them by now."""
    from selenium.common.exceptions import StaleElementReferenceException

    found = []
    for each in browser.find_elements("css selector", selector):
        with suppress(StaleElementReferenceException):
            if text in each.text:
                found.append(each)
    return found


def run_all(browser):
    """Run > Run All Cells, through JupyterLab's own menu; again where a busy page has missed it."""

    from selenium.common.exceptions import WebDriverException

    def running():
        if find(browser, ".jp-InputArea-prompt", "[*]:"):
            return True
        ways = ((".jp-Dialog button.jp-mod-accept", ""), (".lm-MenuBar-item", "Run"), (RUN_ALL, ""))
        with suppress(WebDriverException):  # a dialog came: "You can not run any cell for now"
            for selector, text in ways:
                for item in find(browser, selector, text)[:1]:
                    item.click()
                    time.sleep(1)
        return False

    wait_for(running, 120, "a cell to run")


def stop_the_training(browser):
    """JupyterLab's own stop button in the live training cell: one calm line, and nothing below it runs."""
    wait_for(lambda: find(browser, ".jp-OutputArea-output .widget-html pre", "Phase 1: "), 200, "Phase 1")
    (button,) = browser.find_elements("css selector", "[data-command='notebook:interrupt-kernel']")
    button.click()
    (said,) = wait_for(lambda: find(browser, ".jp-OutputArea-output", "Stopped."), 60, "the calm line")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", said)
    assert re.fullmatch(r"Stopped\. (Finished stages|Epoch).+ kept; run the cell again\.", said.text)
    wait_for(lambda: find(browser, IDLE), 60, "the kernel to rest")
    for raw in ("Traceback", "KeyboardInterrupt", "NameError"):
        assert not find(browser, ".jp-OutputArea-output", raw)


# Notes every figure that comes on the page: its words, and how many points its curves have.
WATCH = """
window.drawn = [];
new MutationObserver(() => {
    for (const image of document.querySelectorAll('.ctxkv img')) {
        if (image.noted) continue;
        image.noted = true;
        drawn.push([image.alt, image.parentElement.querySelectorAll('span[title^="this run"]').length]);
    }
}).observe(document.body, {childList: true, subtree: true});"""


# Chooses the fourth of the tokens offered, and returns its position.
CHOOSE = """
const select = [...arguments[0].querySelectorAll('select')].pop();
select.selectedIndex = 4;
select.dispatchEvent(new Event('change', {bubbles: true}));
return select.options[4].text.split(':')[0].replace(',', '');"""


def output_of(browser, cell):
    """The output area under the cell with `cell` in its source, once there is a figure in it."""
    for area in browser.find_elements("css selector", ".jp-CodeCell"):
        if cell in area.get_attribute("textContent") and area.find_elements("css selector", ".ctxkv img"):
            return area.find_element("css selector", ".jp-Cell-outputWrapper")
    return None


def picture(output):
    """Its source, in one step: the next one may come at any moment."""
    return output.parent.execute_script("return arguments[0].querySelector('.ctxkv img').src", output)


def click_and_see(browser, output, element):
    """Click, and wait until the figure of the output is another one."""
    before = picture(output)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)
    wait_for(lambda: picture(output) != before, 60, "the plot to change")


def too_wide(browser):
    """Texts of the outputs that would need a horizontal scrollbar."""
    script = """
    return [...document.querySelectorAll('.jp-OutputArea-output, .jp-OutputArea-output *')]
        .filter(box => ['auto', 'scroll'].includes(getComputedStyle(box).overflowX))
        .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.outerHTML.slice(0, 200));"""
    return browser.execute_script(script)


def compare_screens(name, figure):
    """A figure as it is seen, against the kept screenshot of it."""
    seen = Image.open(io.BytesIO(figure.screenshot_as_png)).convert("L").resize(SMALL)
    if os.environ.get("CTXKV_KEEP_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        seen.save(SCREENS / f"{name}.png")
    kept = Image.open(SCREENS / f"{name}.png")
    likeness = np.corrcoef(np.asarray(seen, dtype=float).flat, np.asarray(kept, dtype=float).flat)[0, 1]
    assert likeness > LEAST_LIKENESS, f"{name} looks different: correlation {likeness:.2f}"


def follow_the_training(browser, summary):
    """Phase 1's points are on the page before Phase 2's first, and all curves at the end."""
    wait_for(summary.exists, 400, "the run to finish")
    curves = wait_for(lambda: output_of(browser, "explore_runs([folder])"), 120, "the curves")
    drawn = browser.execute_script("return drawn")
    first = next(i for i, (alt, _) in enumerate(drawn) if alt.startswith("Perplexity"))
    assert any(alt.startswith("Convergence") and points for alt, points in drawn[:first]), drawn
    return curves


def look_at_the_curves(browser, curves, downloads):
    assert curves.find_element("css selector", ".ctxkv img").get_attribute("alt")
    log_scale = next(
        box for box in curves.find_elements("css selector", ".widget-checkbox") if box.text == "log scale"
    )
    click_and_see(browser, curves, log_scale.find_element("css selector", "input"))
    for link in curves.find_elements("css selector", "a[download]"):
        browser.execute_script("arguments[0].click()", link)
    table = wait_for(lambda: next(downloads.glob("*.csv"), None), 30, "the download")
    wait_for(lambda: next(downloads.glob("*.png"), None), 30, "the picture")
    assert "val_ppl" in next(csv.reader(table.read_text().splitlines()))


def look_through_the_window(browser, window):
    def position():
        return int(window.find_element("css selector", ".widget-readout").text.replace(",", ""))

    begun = position()
    for label, moved in (("+1", 1), ("−1", 0)):
        button = next(b for b in window.find_elements("css selector", "button") if b.text == label)
        click_and_see(browser, window, button)
        wait_for(lambda moved=moved: position() == begun + moved, 30, "the slider to move")
    script = """
    const token = arguments[0].querySelector('span[style*=outline]').getBoundingClientRect();
    const box = arguments[0].querySelector('div[style*=column-reverse]').getBoundingClientRect();
    return token.top >= box.top && token.bottom <= box.bottom;"""
    assert browser.execute_script(script, window), "the position itself is out of sight"
    time.sleep(1)  # the choices come after the picture
    before = picture(window)
    chosen = browser.execute_script(CHOOSE, window)
    wait_for(lambda: picture(window) != before and position() == int(chosen), 60, "the jump")
    time.sleep(1)
    token = window.find_elements("css selector", ".widget-toggle-button")[3]
    chosen = token.get_attribute("title").partition(":")[0].replace(",", "")
    click_and_see(browser, window, token)
    wait_for(lambda: position() == int(chosen), 60, "the token that was clicked")
    pressed = f".widget-toggle-button.mod-active[title^='{int(chosen):,}:']"
    wait_for(lambda: window.find_elements("css selector", pressed), 30, "its button to be the pressed one")
    shown = "return arguments[0].querySelectorAll('select')[2].selectedOptions[0].text"
    assert browser.execute_script(shown, window).split() == ["an", "attended", "token", "..."]


def test_a_notebook_as_a_reader_sees_it(lab, browser, tmp_path):
    browser.get(f"{lab}/lab/tree/03_phase2_context_kv.ipynb")
    wait_for(lambda: find(browser, ".jp-Notebook"), 90, "the notebook")
    wait_for(lambda: find(browser, IDLE), 90, "a kernel")
    wait_for(lambda: find(browser, IDLE), 90, "a notebook that knows it")
    browser.execute_script(WATCH)
    run_all(browser)
    stop_the_training(browser)
    browser.save_screenshot(str(tmp_path / "stopped.png"))
    run_all(browser)
    curves = follow_the_training(browser, tmp_path / "runs" / "ci-exact-10" / "summary.json")
    wait_for(lambda: find(browser, IDLE), 400, "all cells")  # a busy kernel answers no control
    look_at_the_curves(browser, curves, tmp_path / "downloads")
    window = wait_for(lambda: output_of(browser, "explore_window(trained"), 120, "the window")
    look_through_the_window(browser, window)
    for width in (1400, 900):
        browser.set_window_size(width, 1800)
        time.sleep(1)
        assert too_wide(browser) == []
    browser.set_window_size(1400, 1800)
    for theme, light in (("light", "true"), ("dark", "false")):
        browser.execute_script("document.body.dataset.jpThemeLight = arguments[0]", light)
        for name, output in (("curves", curves), ("window", window)):
            compare_screens(f"{name}-{theme}", output.find_element("css selector", ".ctxkv img"))
    browser.save_screenshot(str(tmp_path / "after.png"))
    assert not find(browser, ".jp-OutputArea-output", "Traceback")
