"""Draw a map of the model for each notebook, and fill the parts that the notebook explains."""

from svg import EXACT, INK, PHASE1, PHASE2, TUNED, Picture
from tables import read

from ctxkv_lib.views.figures import GRAY

PARTS = ("tokens", "table", "block", "cache", "layer", "head", "slots")
# For each notebook's number: the parts that are filled in its map.
FILLED = {
    0: PARTS,
    1: ("tokens", "slots"),
    2: ("block", "cache"),
    3: ("layer",),
    4: ("tokens", "head"),
    5: ("slots",),
    6: ("block", "layer"),
}
LEFT, RIGHT = 8, 372  # edges of the widest boxes
QUERY = 361  # x of the query's arrow
SPAN = 640  # tokens in the window
NOW = 364  # x of the current token on the axis of slots, with room for half of its label
# The x coordinates of the tokens whose contexts attention reads.
READ = (38, 173, 308)
CENTER = {"text_anchor": "middle"}
ALTERNATIVE = (
    "Map of the model, from the bottom up. Tokens. The frozen token table. The ContextBlock, which makes "
    "each context from the last one and the token. The cache, which holds the context of each token. The "
    "layer, whose attention reads 32 contexts. The output head, which predicts the next token. Below, the "
    "slots of both recipes on one axis: exact reads every 20th token, tuned the last 14 tokens and then "
    "ever farther ones."
)
OFFSETS = {run["recipe"]: run["offsets"] for run in read("keyholes/keyholes")["runs"]}


def draw_map(filled: tuple[str, ...]) -> Picture:
    """Draw the model from the tokens at the bottom to the predicted next token at the top."""
    picture = Picture(594, ALTERNATIVE)
    picture.text(190, 14, "next token", font_weight=600, **CENTER)
    picture.arrow((190, 42), (190, 21))
    draw_box(picture, "head" in filled, 42, RIGHT, GRAY, "Output head", "the token table again, frozen")
    picture.arrow((190, 113), (190, 93))
    trained = "trained in Phase 2: 6.3 million weights"
    draw_box(picture, "layer" in filled, 113, RIGHT, PHASE2, "Layer: attention, feed-forward", trained)
    for x in READ:
        picture.arrow((x, 200), (x, 164), PHASE2)
    picture.text(READ[0] + 9, 187, "keys and values")
    picture.arrow((QUERY, 372), (QUERY, 164), PHASE2)
    picture.text(QUERY - 6, 187, "query", text_anchor="end")
    draw_box(picture, "cache" in filled, 200, 346, PHASE1, "Cache", "the context of each token: 256 numbers")
    for x in READ:
        picture.arrow((x, 280), (x, 251), PHASE1)
    trained = "trained in Phase 1: 0.26 million weights"
    draw_box(
        picture,
        "block" in filled,
        280,
        346,
        PHASE1,
        "ContextBlock",
        "last context, token → next context",
        trained,
    )
    for x in READ:
        picture.arrow((x, 372), (x, 349))
    numbers = "768 numbers for each token, frozen"
    draw_box(picture, "table" in filled, 372, RIGHT, GRAY, "Token table", numbers)
    for place in range(13):
        x = READ[0] + 22.5 * place
        is_read = place % 6 == 0
        color = GRAY if is_read or "tokens" in filled else "none"
        size = 7 if is_read else 4
        picture.rect(x - size, 449 - size, 2 * size, 2 * size, color, stroke=GRAY, rx=2)
        if is_read:
            picture.arrow((x, 441), (x, 423))
    picture.text(RIGHT, 454, "tokens", text_anchor="end", font_weight=600 if "tokens" in filled else 400)
    draw_slots(picture, 486, "slots" in filled)
    return picture


def draw_box(
    picture: Picture, filled: bool, y: float, right: float, color: str, title: str, *lines: str
) -> None:
    """Draw a part of the model as a box, filled or empty, with a title and lines of smaller text."""
    fill, ink = (color, "#ffffff") if filled else ("none", INK)
    height = 32 + 18 * len(lines)
    picture.rect(LEFT, y, right - LEFT, height, fill, stroke=color, stroke_width=1.6, rx=6)
    middle = (LEFT + right) / 2
    picture.text(middle, y + 20, title, ink, 15, font_weight=600, **CENTER)
    for row, line in enumerate(lines, start=1):
        picture.text(middle, y + 21 + 18 * row, line, ink, **CENTER)


def draw_slots(picture: Picture, y: float, filled: bool) -> None:
    """Draw the slots of both recipes on an axis of distances, with the current token at the right."""
    notes = {
        "exact": ("slots every 20 tokens", EXACT),
        "tuned": ("slots 0 to 13, then ever farther apart", TUNED),
    }
    for row, (recipe, (note, color)) in enumerate(notes.items()):
        top = y + 42 * row
        picture.text(LEFT, top, recipe, font_weight=600)
        picture.text(LEFT + 48, top, note)
        for offset in OFFSETS[recipe]:
            x = place_of(offset)
            look = {"stroke": color, "width": 3 if filled else 1.2}
            picture.line((x, top + 6), (x, top + 22), **look)
    base = y + 72
    picture.line((place_of(SPAN), base), (place_of(0), base))
    for back in (600, 400, 200, 0):
        picture.line((place_of(back), base), (place_of(back), base + 5))
    for back, words in {600: "600", 400: "400 tokens back", 200: "200", 0: "now"}.items():
        picture.text(place_of(back), base + 20, words, **CENTER)


def place_of(back: float) -> float:
    """Return the x coordinate of the token that is `back` tokens ago."""
    return NOW - (NOW - LEFT - 2) * back / SPAN
