"""Open the built site in Chromium and report what is wrong: `make site-check`.

The checks cover every page on a phone and on a wide screen, the search, the explorer of attention, the curves
of runs, and the pictures. They find errors of scripts, boxes that are cut off, texts that overlap, and
controls that do not answer. They cannot say whether a page is clear, so look at it, too.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from threading import Thread
from typing import Any

from playwright.sync_api import Browser, Error, Locator, Page, Playwright, Route, sync_playwright

TOP = Path(__file__).resolve().parents[2]
SITE = TOP / "build" / "docs"
PICTURES = TOP / "notebooks" / "pictures"
PHONE, WIDE = 400, 1_400  # widths of the window in pixels
# Searched words, and the page that must be found first, if any. Titles of hidden icons contain "mode".
SEARCHES = {"install": "start.html", "mode": ""}
# True if an element lies in the visible part of a box.
IN_VIEW = """([item, box]) => {
  const inner = item.getBoundingClientRect(), outer = box.getBoundingClientRect();
  return inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
}"""
# Copy buttons that cover letters of the code.
COVERING = """() => [...document.querySelectorAll("button.copybtn")].filter((button) => {
  const area = button.getBoundingClientRect(), code = button.closest(".highlight").querySelector("pre");
  const right = code.getBoundingClientRect().left + code.clientLeft + code.clientWidth;
  const range = document.createRange(), texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    range.selectNodeContents(texts.currentNode);
    for (const box of texts.currentNode.data.trim() ? range.getClientRects() : [])
      if (Math.min(box.right, right) > area.left && box.top < area.bottom - 3 && box.bottom > area.top + 3)
        return true;
  }
}).map((button) => button.closest(".highlight").textContent.slice(0, 40))"""
AXES = """() => {
  const { xaxis, yaxis, yaxis2 } = document.querySelector(".js-plotly-plot")._fullLayout;
  const ends = ({ range }) => range.map((end) => end.toFixed(3)).join();
  return [yaxis.type, ...[xaxis, yaxis, yaxis2].map(ends)];
}"""
VISIBLE = """() => document.querySelector(".js-plotly-plot")._fullData.map(({ visible }) => `${visible}`)"""


class Quiet(SimpleHTTPRequestHandler):
    """A handler that serves files without a line per request."""

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def find_chromium(playwright: Playwright) -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", playwright.chromium.executable_path)
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def opened(browser: Browser, width: int, problems: list[str]) -> Iterator[Page]:
    """Open a window, with a touch screen on a phone. Every error of a script is added to `problems`."""
    is_phone = width == PHONE
    context = browser.new_context(
        viewport={"width": width, "height": 900}, has_touch=is_phone, is_mobile=is_phone
    )
    context.set_default_timeout(10_000)  # milliseconds
    page = context.new_page()

    def report(what: str) -> None:
        problems.append(f"{page.url} at {width} px: {what}")

    page.on("pageerror", lambda error: report(str(error)))
    page.on("console", lambda line: report(line.text) if "404" in line.text else None)
    yield page
    context.close()


def press(target: Locator, width: int) -> None:
    """Tap on a phone, and click on a wide screen."""
    target.tap() if width == PHONE else target.click()


def check_page(page: Page, width: int) -> Iterator[str]:
    """Open all folds of the page. Nothing may be wider than the window, and buttons may not cover text."""
    for fold in page.locator("summary:visible").all():
        press(fold, width)
    page.wait_for_timeout(200)
    if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
        yield "the page scrolls sideways"
    yield from (f"a copy button covers: {text}" for text in page.evaluate(COVERING))
    foreign = (
        "[...document.scripts].map(({ src }) => src).filter((src) => src && !src.startsWith(location.origin))"
    )
    yield from (f"loads a script from elsewhere: {source}" for source in page.evaluate(foreign))
    if width == WIDE and "/notebooks/" not in page.url:
        cut_off = page.locator(".scrolls").evaluate_all(
            "(boxes) => boxes.map((box) => box.textContent.slice(0, 40))"
        )
        yield from (f"is cut off: {text.strip()}" for text in cut_off)


def check_search(page: Page, address: str) -> Iterator[str]:
    """Search, open the first result, and look for marked words."""
    for word, expected in SEARCHES.items():
        page.goto(f"{address}/search.html?q={word}")
        first = page.locator("#search-results li a").first
        first.wait_for()
        page.wait_for_timeout(1_000)  # results are sorted in as they arrive
        found = first.get_attribute("href")
        if expected not in found:
            yield f"a search for {word!r} finds {found} first instead of {expected}"
        first.click()
        page.wait_for_timeout(300)
        if not page.locator("article .highlighted").count():
            yield f"{found} has no mark on the word {word!r}"


def check_explorer(page: Page, width: int) -> Iterator[str]:
    """Choose tokens and bars of the explorer with the mouse or a finger, and with the keyboard."""
    now, bars = page.locator(".window-text .now"), page.locator(".window-bars button")
    now.wait_for()
    text, box = page.locator(".window-text"), page.locator(".window-text").element_handle()
    steps = page.locator(".window-steps button")

    def in_view(item: Locator) -> bool:
        return page.evaluate(IN_VIEW, [item.element_handle(), box])

    def state() -> tuple[str, str]:
        return page.locator(".window-says").inner_text(), page.locator(".window-guesses").inner_text()

    def changes(name: str, act: Callable[[], None], *, bars_too: bool = True) -> Iterator[str]:
        before, heights = (
            state(),
            bars.locator("i").evaluate_all("(all) => all.map((bar) => bar.style.height)"),
        )
        act()
        after = bars.locator("i").evaluate_all("(all) => all.map((bar) => bar.style.height)")
        if (before == state()) or (bars_too and heights == after):
            yield f"the explorer does not answer to {name}"
        if not in_view(now):
            yield f"after {name}, the chosen token is out of view"

    yield from changes("a click on a token", lambda: press(page.locator(".window-text .token").nth(3), width))
    axis = page.locator(".window-top").inner_text()
    press(bars.last, width)
    if not in_view(page.locator(".window-text .led")):
        yield "a click on a bar does not show its token"
    yield from changes("“next token” after a bar", lambda: press(steps.last, width))
    press(bars.last, width)
    text.focus()
    yield from changes("the right arrow key", lambda: page.keyboard.press("ArrowRight"))
    yield from changes("“previous token”", lambda: press(steps.first, width))
    if page.locator(".window-top").inner_text() != axis:
        yield "the axis changes from token to token"

    stops = page.locator(".window-bars button[tabindex='0']")
    if stops.count() != 1:
        yield f"{stops.count()} bars are stops of the Tab key instead of one"
    stops.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    focused = bars.nth(1)
    if not focused.evaluate("(bar) => bar === document.activeElement && bar.tabIndex === 0"):
        yield "the arrow keys do not move between the bars"
    if page.locator(".window-text .led").count() != 1 or not in_view(page.locator(".window-text .led")):
        yield "the arrow keys do not show the token of a bar"
    boxes = [bar.bounding_box()["x"] for bar in (bars.first, bars.last)]
    if boxes[0] < boxes[1]:
        yield "“now” is not at the right of the bars"

    press(bars.last, width)
    page.locator(".window-controls select").last.select_option(index=1)
    if page.locator(".window-text .led").count():
        yield "a token of this conversation is marked for contexts of another conversation"
    page.locator(".window-controls select").first.select_option(index=1)
    if page.locator(".window-top").inner_text() == axis:
        yield "the axis of one head is that of the mean"


def show_curves(route: Route) -> None:
    """Answer a request with HTML that shows the curves of two runs, as Colab and the site get it."""
    sys.path.insert(0, str(TOP / "tests"))
    from sample_runs import sample_run

    import ctxkv_lib as ctxkv

    shown = ctxkv.explore_runs({f"exact, {n} conversations": sample_run(n) for n in (100, 500)})
    html = shown._repr_mimebundle_()["text/html"]
    start = html.index("https://cdn.plot.ly")
    script = html[start : html.index('"', start)]
    head = '<!doctype html><meta name="viewport" content="width=device-width"><body>'
    body = head + html.replace(script, "_static/plotly-basic.min.js")
    route.fulfill(body=body, content_type="text/html")


def check_curves(page: Page, width: int) -> Iterator[str]:
    """Only the buttons change the axes of the curves; legend and hover answer."""
    page.locator(".modebar-btn").first.wait_for()
    buttons = page.locator(".modebar-btn").evaluate_all("(all) => all.map((button) => button.dataset.title)")
    if [title.split()[0] for title in buttons] != ["Zoom", "Zoom", "Reset", "Download"]:
        yield f"the toolbar of the curves has the buttons {buttons}"
    plot = page.locator(".nsewdrag").first.bounding_box()
    left, top, wide, high = (plot[key] for key in ("x", "y", "width", "height"))
    axes, visible = page.evaluate(AXES), page.evaluate(VISIBLE)
    points = [(left + wide * x, top + high * y) for x in (-15 / wide, 0.3, 0.9) for y in (0.05, 0.5, 0.95)]
    for x, y in points:
        for _ in range(2):
            (page.touchscreen.tap if width == PHONE else page.mouse.click)(x, y)
        page.wait_for_timeout(400)  # longer than a double-click
        if page.evaluate(AXES) != axes:
            yield f"a double click at {x:.0f}, {y:.0f} changes the axes of the curves"
    if not page.locator(".hoverlayer").text_content().startswith("Epoch"):
        yield "the curves do not show their values"
    if width == WIDE:
        page.mouse.move(left + 100, top + 50)
        page.mouse.down()
        page.mouse.move(left + 300, top + 150, steps=4)
        page.mouse.up()
        page.mouse.wheel(0, 40)
        page.wait_for_timeout(400)
        if page.evaluate(AXES) != axes:
            yield "dragging or scrolling changes the axes of the curves"

    def after(name: str) -> list[str]:
        press(page.locator(name).first, width)
        page.wait_for_timeout(500)
        return page.evaluate(AXES)

    zoom, reset = ".modebar-btn[data-title='Zoom in']", ".modebar-btn[data-title='Reset axes']"
    if after(zoom) == axes or after(reset) != axes:
        yield "the buttons do not zoom and reset the curves"
    linear = after(".updatemenu-button:nth-of-type(2)")
    if linear[0] != "linear" or after(zoom) == linear or after(reset) != linear:
        yield "the buttons do not zoom and reset the linear axis"
    if after(".updatemenu-button:nth-of-type(1)") != axes:
        yield "the button “log” does not bring back the logarithmic axis"
    after(".legendtoggle")
    if page.evaluate(VISIBLE) == visible:
        yield "a click in the legend does not hide a run"


def check_picture(page: Page, path: Path) -> Iterator[str]:
    """Texts must lie in the picture, and neighbours in a line need more than a space between them."""
    page.set_content(path.read_text(encoding="utf-8"))
    outer = page.locator("svg").bounding_box()
    texts = [(text.text_content(), text.bounding_box()) for text in page.locator("svg text").all()]
    for text, box in texts:
        if box["x"] < outer["x"] or box["x"] + box["width"] > outer["x"] + outer["width"]:
            yield f"{text!r} is cut off"
    for (text, box), (other, beside) in combinations(texts, 2):
        # A box is as high as the line. Letters fill about two thirds of it, and a space is a quarter as wide.
        height = min(box["height"], beside["height"])
        left, right = sorted((box, beside), key=lambda each: each["x"])
        is_close = right["x"] - left["x"] - left["width"] < 0.4 * height
        if is_close and abs(box["y"] - beside["y"]) < 0.66 * height:
            yield f"{text!r} and {other!r} run together"


def find_problems(site: Path = SITE) -> list[str]:
    """Run all checks on a built site and return a sentence for each problem."""
    problems: list[str] = []

    def run(where: str, check: Iterator[str]) -> None:
        try:
            problems.extend(f"{where}: {what}" for what in check)
        except Error as error:  # an element is missing, or does not answer
            problems.append(f"{where}: {error.message}")

    with sync_playwright() as playwright, served(site) as address:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright))
        for width in (PHONE, WIDE):
            with opened(browser, width, problems) as page:
                for path in sorted(site.rglob("*.html")):
                    page.goto(f"{address}/{path.relative_to(site)}", wait_until="load")
                    page.wait_for_timeout(300)
                    run(f"{path.relative_to(site)} at {width} px", check_page(page, width))
                page.goto(f"{address}/index.html")
                run(f"explorer at {width} px", check_explorer(page, width))
                page.route("**/curves.html", show_curves)
                page.goto(f"{address}/curves.html")
                run(f"curves at {width} px", check_curves(page, width))
        with opened(browser, WIDE, problems) as page:
            run("search", check_search(page, address))
            for path in sorted(PICTURES.glob("*.svg")):
                run(path.name, check_picture(page, path))
        browser.close()
    return problems


if __name__ == "__main__":
    found = find_problems(*map(Path, sys.argv[1:]))
    print(*found, sep="\n")
    sys.exit(bool(found))
