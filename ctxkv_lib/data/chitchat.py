"""Human small talk from the pip-installed package chitchat-dataset."""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from .hub import package_file
from .rows import Messages, Row, Rows, Split, rows_asked
from .settings import DataConfig

# Rows in the order of `_usable_rows`; all others are for training. Fixed blocks, so that no setting moves the
# rows of another split.
HELD_BACK = {"validation": range(0, 50), "test": range(50, 100), "corpus": range(100, 1100)}

_EMAIL = re.compile(r"\S@\S+\.\w")
_PHONE = re.compile(r"\d(?:[ ().-]{0,2}\d){6}")  # 7 digits or more, so some other long numbers, too
# Words that make up about 0.4 of running English, and less than 0.2 of the few chats in Spanish or nonsense.
_COMMON_WORDS = """
the a an and or but if i you he she it we they is are am was were be been to of in on for with that this have
has had do does did not no my your me so what how who when where yes can would will just about
"""
_ENGLISH = frozenset(_COMMON_WORDS.split())
_ENGLISH_SHARE = 0.2


def chitchat_rows(data: DataConfig, split: Split) -> Rows:
    """Read the first rows of a split; a UserError if it has fewer, or the package is not installed."""
    rows = _usable_rows(package_file("chitchat_dataset", "dataset.json"))
    available = HELD_BACK.get(split, range(HELD_BACK["corpus"].stop, len(rows)))
    wanted = available[: rows_asked(data, split, len(available), "chitchat-dataset")]
    return Rows(((wanted, lambda part: rows[part.start : part.stop]),))


@lru_cache(maxsize=1)  # reading takes a second, and every split needs it
def _usable_rows(path: Path) -> list[Row]:
    """List English conversations of 4 messages or more without contact details, in hash order."""
    dataset = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(dataset, key=lambda name: hashlib.sha256(name.encode()).digest())
    rows = ((f"chitchat:{name}", _chitchat_messages(dataset[name]["messages"])) for name in names)
    return [(name, messages) for name, messages in rows if _is_usable(messages)]


def _chitchat_messages(turns: list[list[dict[str, str]]]) -> Messages:
    """Join consecutive utterances of one sender with spaces to one message."""
    first = turns[0][0]["sender"]
    joined = [(turn[0]["sender"], " ".join(u["text"].strip() for u in turn).strip()) for turn in turns]
    return [{"role": "user" if by == first else "assistant", "content": text} for by, text in joined if text]


def _is_usable(messages: Messages) -> bool:
    text = "\n".join(message["content"] for message in messages)
    if len(messages) < 4 or _EMAIL.search(text) or _PHONE.search(text):
        return False
    words = re.findall(r"[^\W\d]+", text.lower())
    return sum(word in _ENGLISH for word in words) >= _ENGLISH_SHARE * max(1, len(words))
