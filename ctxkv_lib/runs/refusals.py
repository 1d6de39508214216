"""Checks of a run before it computes anything, as far as possible without a network."""

from collections.abc import Callable
from typing import Any

from ..data.conversations import check_splits
from ..data.embeddings import check_width
from ..errors import UserError
from ..method.config import ModelConfig
from .config import ExperimentConfig

SIZES = {"train": "samples", "val": "validation_samples"}


def refuse_short(tokens: dict[str, int], model: ModelConfig) -> None:
    """Refuse a stream that does not fill one window: it cannot test attention over a full one.

    Args:
        tokens: of the streams, "train" and "val".
    """
    for split, count in tokens.items():
        if count <= model.context_window:
            fitting = (min(tokens.values()) - 1) // model.interval
            fewer = f", or set model.max_contexts to {fitting} or less" if fitting else ""
            raise UserError(
                f"The {split} stream has {count} tokens, no more than one context window "
                f"({model.context_window}); use more or longer conversations (data.{SIZES[split]}){fewer}."
            )


def refusals(config: ExperimentConfig, tokens: dict[str, int | None]) -> list[str]:
    """Collect the error messages with which a run would be refused.

    Args:
        tokens: of both streams, "train" and "val"; None where that is not known.
    """
    checks: list[Callable[[], Any]] = [
        lambda: check_splits(config.data),
        lambda: check_width(config.data.table, config.model.hidden_size),
        lambda: refuse_short({split: n for split, n in tokens.items() if n is not None}, config.model),
    ]
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found
