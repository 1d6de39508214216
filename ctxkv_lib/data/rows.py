"""What every source of conversations gives: named rows, and a refusal when there are too few of them."""

from typing import Literal

from ..config import DataConfig
from ..errors import UserError

Split = Literal["train", "validation", "test", "corpus"]
Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
Row = tuple[str, Messages]  # a stable name, and the conversation


def first_rows(available: range, data: DataConfig, split: Split, where: str) -> range:
    """The first rows of `available`, as many as `data` asks for."""
    name = "samples" if split == "train" else f"{split}_samples"
    wanted = getattr(data, name)
    if wanted > len(available):
        raise UserError(
            f"data.{name} is {wanted}, but {where} has only {len(available)} conversations for {split}; "
            f"lower data.{name} or use a larger source."
        )
    return available[:wanted]
