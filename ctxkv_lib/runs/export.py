"""Save a run's model in a folder that transformers can load."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import UserError, is_disk_full
from ..files import remove, replacing, rust_errors
from ..method.model import ContextKV
from ..method.modeling import ContextKVForCausalLM
from ..plugins.hooks import HOOKS
from ..progress import log
from .config import ExperimentConfig

# Number of tokens on which the saved model's logits are compared with the trained model's logits.
TRIED_TOKENS = 64
# Copies of the tokenizer are cached, since copying it takes a third of the time of a tiny run.
_copy_of = lru_cache(maxsize=1)(deepcopy)


def for_transformers(
    model: ContextKV, config: ExperimentConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[ContextKVForCausalLM, PreTrainedTokenizerFast]:
    """Wrap a trained model so that transformers can generate with it. Also return a copy of the tokenizer.

    Raises:
        UserError: The layer reads tokens instead of contexts, so it cannot generate token by token.
    """
    if model.layer.reads == "tokens":
        raise UserError(
            "The run's layer reads rows of tokens, so it cannot continue token by token; use a run whose "
            "layer reads contexts."
        )
    settings = {hook: plugin.settings for hook, plugin in config.plugins.items() if HOOKS[hook].is_module}
    served, tokenizer = ContextKVForCausalLM.of(model, settings), _copy_of(tokenizer)
    stop_after_text(served, tokenizer)
    return served, tokenizer


def stop_after_text(model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Use the end-of-text token to begin, stop and pad generated text. Padding is on the left."""
    end = tokenizer.eos_token_id
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # `save_pretrained` writes this value
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)


def save_for_transformers(
    model: ContextKV, config: ExperimentConfig, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> list[Path]:
    """Write the model, its code and its tokenizer to `folder`. Say so if a plug-in cannot be saved."""
    bars_were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # bars stay visible in notebooks
    try:
        served, tokenizer = for_transformers(model, config, tokenizer)
        with replacing(folder) as beside, rust_errors(folder):
            # The token table is larger than the maximum shard size, so transformers writes it to a separate
            # file, which is the first shard.
            served.save_pretrained(beside, max_shard_size=model.wte.weight.nbytes - 1)
            tokenizer.save_pretrained(beside)
            # Rewrite the tokenizer's file without indentation, which more than halves its size.
            tokenizer.backend_tokenizer.save(str(beside / "tokenizer.json"), pretty=False)
        if config.has_own_parts:
            _refuse_other_model(served, folder)
    except Exception as error:  # user code may raise anything
        if not config.has_own_parts or is_disk_full(error):
            raise
        remove(folder)
        log(f"The model is not saved for transformers: {error}")
        return []
    finally:
        if bars_were_shown:
            logging.enable_progress_bar()
    return [folder]


@torch.no_grad()
def _refuse_other_model(model: ContextKVForCausalLM, folder: Path) -> None:
    """Raise ValueError if the model that was saved in `folder` computes other logits than `model`."""
    saved: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(TRIED_TOKENS, device=model.device)[None]

    if not torch.allclose(model(ids).logits, saved.to(model.device)(ids).logits, rtol=1e-2, atol=1e-2):
        raise ValueError("loaded from its files, it computes something else than the class that was trained.")
