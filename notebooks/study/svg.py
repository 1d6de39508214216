"""Draw pictures as SVG text, 380 units wide. Their smallest letters have 12 pixels on a phone.

Font, ink and palette are those of the package's figures. The background is white; the dark theme of the site
inverts the pictures. `exact` is always orange, `tuned` is blue, and what they are compared with is gray.
"""

from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from ctxkv_lib.views.figures import FONTS, INK, OKABE_ITO

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
WIDTH = 380  # units of the drawing
# Width of a picture in pixels, if the page is wide enough.
SHOWN = 570
TUNED, EXACT, *_ = OKABE_ITO
# Dark versions for letters: the contrast with white is at least 4.5.
TUNED_INK, EXACT_INK = "#005a8c", "#a34800"
# Parts of the model that are trained in Phase 1 and Phase 2. White letters are readable on them.
PHASE1, PHASE2 = "#007253", "#8f4b73"
LIGHT = "#c4c9d0"  # fill of shapes, not for letters
FONT = f"{', '.join(FONTS)}, sans-serif"
SMALL = 13  # smallest font size in units


class Picture:
    """A drawing. Its methods add shapes. Coordinates are in units, and y grows downwards."""

    def __init__(self, height: float, alternative: str) -> None:
        self.height, self.alternative = height, alternative
        self.shapes: list[str] = []
        self.rect(0, 0, WIDTH, height, "#ffffff")

    def add(self, tag: str, content: str = "", **attributes: object) -> None:
        """Add an SVG element. Underscores in the names of attributes become hyphens."""
        listed = "".join(
            f" {name.replace('_', '-')}={quoteattr(_written(value))}" for name, value in attributes.items()
        )
        self.shapes.append(f"<{tag}{listed}>{content}</{tag}>" if content else f"<{tag}{listed}/>")

    def text(
        self, x: float, y: float, words: str, fill: str = INK, size: float = SMALL, **more: object
    ) -> None:
        """Write a line of text. x is its start, or its middle or end if `text_anchor` says so."""
        self.add("text", escape(words), x=x, y=y, fill=fill, font_size=size, **more)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str = "none", **more: object
    ) -> None:
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, **more)

    def line(self, *points: tuple[float, float], stroke: str = INK, width: float = 1, **more: object) -> None:
        """Draw a line through points."""
        listed = " ".join(f"{_written(x)},{_written(y)}" for x, y in points)
        self.add("polyline", points=listed, fill="none", stroke=stroke, stroke_width=width, **more)

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], stroke: str = INK, **more: object
    ) -> None:
        """Draw a horizontal or vertical arrow."""
        (x, y), (from_x, from_y) = end, start
        along = (x > from_x) - (x < from_x), (y > from_y) - (y < from_y)
        base = x - 6 * along[0], y - 6 * along[1]
        self.line(start, base, stroke=stroke, width=1.6, **more)
        wings = [(base[0] + side * along[1] * 4, base[1] + side * along[0] * 4) for side in (-1, 1)]
        head = " ".join(f"{_written(a)},{_written(b)}" for a, b in (end, *wings))
        self.add("polygon", points=head, fill=stroke)

    def svg(self) -> str:
        """Return the picture as the text of an SVG file."""
        size = f'width="{SHOWN}" height="{_written(SHOWN * self.height / WIDTH)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_written(self.height)}" {size}'
        head += f' role="img" font-family="{FONT}">\n<title>{escape(self.alternative)}</title>\n'
        return head + "\n".join(self.shapes) + "\n</svg>\n"


def _written(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
