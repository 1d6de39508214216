"""One notebook as a reader meets it: in JupyterLab, in a real browser.

Needs selenium (`pip install -e ".[browser]"`), Chromium and its driver (Debian: chromium, chromium-driver).
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
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
    """The elements that match a CSS selector and hold a text."""
    return [each for each in browser.find_elements("css selector", selector) if text in each.text]


def run_all(browser):
    """Run > Run All Cells, through JupyterLab's own menu."""
    (menu,) = wait_for(lambda: find(browser, ".lm-MenuBar-item", "Run"), 60, "the menu")[:1]
    menu.click()
    command = "[data-command='runmenu:run-all']"
    (item,) = wait_for(lambda: find(browser, command), 30, "Run All Cells")[:1]
    item.click()


def picture_under(browser, cell):
    """Content of the image that a widget shows under the cell with `cell` in its source; None if none yet."""
    script = """
    for (const cell of document.querySelectorAll('.jp-CodeCell')) {
        const source = cell.querySelector('.cm-content');
        const image = cell.querySelector('.jp-OutputArea img');
        if (source && source.textContent.includes(arguments[0]) && image && image.naturalWidth > 100) {
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext('2d').drawImage(image, 0, 0);
            image.scrollIntoView({block: 'center'});
            return canvas.toDataURL();
        }
    }"""
    return browser.execute_script(script, cell)


def scroll_to(browser, fraction):
    """JupyterLab renders only cells near the view, so the reader has to scroll."""
    script = """
    for (const box of document.querySelectorAll('.jp-WindowedPanel-outer'))
        box.scrollTop = arguments[0] * box.scrollHeight;"""
    browser.execute_script(script, fraction)


def look_for(browser, cell):
    """Scroll through the notebook until the widget of a cell is drawn."""
    for step in range(21):
        scroll_to(browser, step / 20)
        time.sleep(0.3)
        if picture := picture_under(browser, cell):
            return picture
    return None


def test_a_control_moves_and_the_plot_follows(lab, browser, tmp_path):
    browser.get(f"{lab}/lab/tree/03_phase2_context_kv.ipynb")
    wait_for(lambda: find(browser, ".jp-Notebook"), 90, "the notebook")
    wait_for(lambda: find(browser, ".jp-Notebook-ExecutionIndicator[data-status='idle']"), 90, "a kernel")
    run_all(browser)
    summary = tmp_path / "runs" / "ci-exact-10" / "summary.json"
    wait_for(summary.exists, 240, "the run to finish")
    before = wait_for(lambda: look_for(browser, "explore_runs([folder])"), 120, "the curves")

    (log_scale,) = wait_for(lambda: find(browser, ".widget-checkbox", "log scale"), 30, "the check box")
    log_scale.find_element("css selector", "input").click()
    after = wait_for(
        lambda: (now := picture_under(browser, "explore_runs([folder])")) != before and now,
        30,
        "the plot to change",
    )
    assert after.startswith("data:image/png;base64,")
    browser.save_screenshot(str(tmp_path / "after.png"))
    assert not find(browser, ".jp-OutputArea-output", "Traceback")
