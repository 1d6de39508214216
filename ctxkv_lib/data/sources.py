"""The sources of conversations besides the user's own data, in one table.

To add a source, write an entry in `SOURCES` and a module with two functions. Follow `chitchat` if an
installed package has the conversations, and add an extra to `pyproject.toml`. Follow `ultrachat` if the Hub
has the conversations, and pin the commit in `hub`. All other code reads this table: the setting `data.source`
(`config`), the splits (`conversations`), `report.info` and the licence in `report.model_card`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import chitchat, ultrachat


@dataclass(frozen=True)
class Source:
    """A source of conversations.

    Attributes:
        meaning: describes the source in the list of settings.
        title: names the source in messages.
        licence: the licence of its text, as the Hub abbreviates it.
        available: counts the conversations of a split (train, validation, test or corpus) without a download.
        read: returns the first conversations of a split, called with the split and a number.
        is_installed: whether `read` works without a download.
    """

    meaning: str
    title: str
    licence: str
    available: Callable[[str], int]
    read: Callable[[str, int], list[str]]
    is_installed: bool


SOURCES = {
    "ultrachat": Source(
        "UltraChat-200k on the Hugging Face Hub",
        "UltraChat",
        "mit",
        ultrachat.available,
        ultrachat.read,
        is_installed=False,
    ),
    "chitchat": Source(
        "the pip-installed chitchat-dataset",
        "chitchat-dataset",
        "mit",
        chitchat.available,
        chitchat.read,
        is_installed=True,
    ),
}
