"""A table of the built-in sources of conversations.

To add a source, add an entry to `SOURCES`, and write a module with the functions `available` and `read`. If
the conversations come from an installed package, copy the module `chitchat`, and add an extra to
`pyproject.toml`. If the conversations come from the Hub, copy `ultrachat`, and pin the commit in `hub`. No
other code has to change: the setting `data.source`, the splits, `report.info` and model cards read the table.
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
        license: the license of the text, abbreviated as on the Hub.
        available: takes a split (train, validation, test or corpus) and returns its number of conversations,
            without a download.
        read: takes a split and a number, and returns that many conversations from the start of the split.
    """

    meaning: str
    title: str
    license: str
    available: Callable[[str], int]
    read: Callable[[str, int], list[str]]


SOURCES = {
    "ultrachat": Source(
        "UltraChat-200k on the Hugging Face Hub",
        "UltraChat",
        "mit",
        ultrachat.available,
        ultrachat.read,
    ),
    "chitchat": Source(
        "the pip-installed chitchat-dataset",
        "chitchat-dataset",
        "mit",
        chitchat.available,
        chitchat.read,
    ),
}
