"""Source `recall`, made-up conversations for multi-query associative recall.

After Zoology (Arora et al., 2023). A pair of words, a key and its value ("river seven"), is stated once.
Later the key is repeated, and only a model that remembers the pair can predict the value. All other words
are random. Every word is one token of GPT-2, so distances are exact.
"""

import json
import random
from pathlib import Path

from ..errors import UserError
from .rows import Messages, Row, Rows, Split, rows_asked
from .settings import DataConfig

_WORDS = json.loads(Path(__file__).with_name("recall_words.json").read_text(encoding="utf-8"))
KEYS, VALUES, FILLERS = _WORDS["keys"], _WORDS["values"], _WORDS["fillers"]
OPENERS = _WORDS["openers"]  # of a message: no space stands before it
MESSAGE = 40  # tokens of a message, about
PAIR_SHARE = 0.5  # of a conversation's tokens are in pairs, stated or asked for

# Blocks of row numbers, so that no setting moves the rows of another split.
SPLITS = {
    "validation": range(0, 10_000),
    "test": range(10_000, 20_000),
    "corpus": range(20_000, 30_000),
    "train": range(30_000, 10_000_000),
}


def recall_rows(data: DataConfig, split: Split) -> Rows:
    """Make the first rows of a split.

    Raises:
        UserError: the split has fewer rows, or the token table would be made from them.
    """
    if data.table == "cooccurrence":
        raise UserError(
            "data.table is 'cooccurrence', which separates words by their neighbours; those of "
            "data.source=recall are random. Allowed with it: random, gpt2."
        )
    available, window = SPLITS[split], data.recall_window
    rows = available[: rows_asked(data, split, len(available), "the recall task")]

    def make(part: range) -> list[Row]:
        return [(f"recall:{window}:{row}", recall_conversation(row, window)) for row in part]

    return Rows(((rows, make),))


def recall_conversation(row: int, window: int) -> Messages:
    """Make the conversation of this number, a quarter longer than `window` tokens.

    Each pair is stated once and asked for once. From the value that was stated to the key that asks for it
    there are 1 to `window - 1` tokens, each distance with equal probability. Rows of even and of odd numbers
    use different keys: within a window of the stream, a key has one value.
    """
    draw = random.Random(f"recall {window} {row}")  # its sequence is the same in every version of Python
    words: list[str | None] = [None] * (window + window // 4)
    pairs = pairs_in(window)
    values = sorted(VALUES[:pairs], key=lambda _: draw.random())
    for pair in zip(KEYS[row % 2 :: 2][:pairs], values, strict=True):
        stated, asked = _places(words, window, draw)
        words[stated : stated + 2] = words[asked : asked + 2] = pair
    return _messages(words, draw)


def pairs_in(window: int) -> int:
    """Count the pairs of a conversation: half of its tokens, as far as there are words."""
    return min(len(KEYS) // 2, len(VALUES), int(PAIR_SHARE * (window + window // 4) / 4))


def _places(words: list[str | None], window: int, draw: random.Random) -> tuple[int, int]:
    """Draw two free places of two tokens each; never the first token."""
    while True:
        distance = 1 + int(draw.random() * (window - 1))
        stated = 1 + int(draw.random() * (len(words) - distance - 3))
        asked = stated + 1 + distance
        if words[stated : stated + 2] + words[asked : asked + 2] == [None] * 4:
            return stated, asked


def _messages(words: list[str | None], draw: random.Random) -> Messages:
    """Fill the gaps of a conversation, and cut it into messages at two adjacent free places.

    The newline between two messages takes the first place, the opening word of a message the second.
    """
    messages: list[list[str]] = [[]]
    for place, word in enumerate(words):
        if word is None and len(messages[-1]) >= MESSAGE and words[place + 1 : place + 2] == [None]:
            messages.append([])
        else:
            fillers = FILLERS if messages[-1] else OPENERS
            messages[-1].append(word or fillers[int(draw.random() * len(fillers))])
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": " ".join(message)} for n, message in enumerate(messages)]
