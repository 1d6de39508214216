"""Read human small talk from the pip-installed package chitchat-dataset."""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import checksum, read_json, write_json
from ..store import Work, code_inputs, entry, inputs_of
from .hub import package_file

VERSION = 1  # raise it if other code chooses other conversations
FILE = "texts.json"  # in an entry of the store

# Row numbers in `_usable_texts` for each split. All other rows are for training.
# The size of one split does not change which rows another split uses.
HELD_BACK = {"validation": range(0, 50), "test": range(50, 100), "corpus": range(100, 1100)}

_EMAIL = re.compile(r"\S@\S+\.\w")
# Numbers with at least 7 digits. This also excludes some long numbers that are not phone numbers.
_PHONE = re.compile(r"\d(?:[ ().-]{0,2}\d){6}")
# Common English words. They make up about 40% of the words in English chats.
# In the few chats that are in Spanish or are nonsense, the share of common English words is below 20%.
_COMMON_WORDS = """
the a an and or but if i you he she it we they is are am was were be been to of in on for with that this have
has had do does did not no my your me so what how who when where yes can would will just about
"""
_ENGLISH = frozenset(_COMMON_WORDS.split())
_ENGLISH_SHARE = 0.2


def available(split: str) -> int:
    """Return the number of conversations in a split. Raises UserError if chitchat-dataset is missing."""
    return len(_texts_of(split))


def read(split: str, count: int) -> list[str]:
    """Read the first `count` conversations of a split. Raises UserError if chitchat-dataset is missing."""
    return _texts_of(split)[:count]


def _texts_of(split: str) -> list[str]:
    texts = _usable_texts(package_file("chitchat_dataset", "dataset.json"))
    rows = HELD_BACK.get(split, range(HELD_BACK["corpus"].stop, len(texts)))
    return texts[rows.start : rows.stop]


# Keep the texts in memory, since every split is read from them.
@lru_cache(maxsize=1)
def _usable_texts(path: Path) -> list[str]:
    """Return the conversations that pass the filter, from the store if they are there."""

    def compute(work: Work) -> dict[str, Any]:
        write_json(work.folder / FILE, _choose_texts(path))
        return {}

    code = code_inputs("chitchat", VERSION, "data.chitchat")
    folder, _ = entry("chitchat", inputs_of({}, {"file": checksum(path)}, code=code), compute, [FILE])
    return list(read_json(folder / FILE))


def _choose_texts(path: Path) -> list[str]:
    """Return English conversations with 4 or more messages and no contact details, in a fixed order."""
    dataset = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(dataset, key=lambda name: hashlib.sha256(name.encode()).digest())
    chats = (_messages(dataset[name]["messages"]) for name in names)
    return ["\n".join(messages) for messages in chats if _is_usable(messages)]


def _messages(turns: list[list[dict[str, str]]]) -> list[str]:
    """Turn each sender's consecutive utterances into one message, joined by spaces."""
    joined = (" ".join(utterance["text"].strip() for utterance in turn).strip() for turn in turns)
    return [message for message in joined if message]


def _is_usable(messages: list[str]) -> bool:
    text = "\n".join(messages)
    if len(messages) < 4 or _EMAIL.search(text) or _PHONE.search(text):
        return False
    words = re.findall(r"[^\W\d]+", text.lower())
    return sum(word in _ENGLISH for word in words) >= _ENGLISH_SHARE * max(1, len(words))
