"""Export a run's model as a folder that transformers can load."""

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import DamagedFile, UserError, friendly_errors
from ..files import expanded, read_json, replacing
from ..method.modeling import ContextKVConfig, ContextKVForCausalLM
from ..plugins.plugins import KINDS
from ..progress import status_line
from ..runs.opened import OpenRun, open_run
from ..runs.summary import Run
from .model_card import model_card

# Number of tokens on which the exported model's logits are compared with the trained model's logits.
TRIED_TOKENS = 64
MODEL_CARD = "README.md"  # the model card


@friendly_errors()
def export(run: Run | Path | str, to: Path | str | None = None) -> Path:
    """Write a finished run's model, tokenizer, code and model card to a folder for transformers.

    The folder appears when it is complete. An earlier export in the same place is replaced.

    Args:
        run: a run, or its folder.
        to: the folder to write. The default is the run's folder with `-model` behind it.

    Returns:
        the folder.

    Raises:
        UserError: There is no finished run, `to` contains something else, the layer reads tokens, or a class
            of the user cannot be exported, since its file cannot be saved with the model.
    """
    opened = open_run(run)
    path = opened.run.path
    folder = Path(f"{path}-model") if to is None else expanded(to)
    _refuse_taken(folder)
    if not opened.model.has_contexts:
        raise UserError(
            f"The layer of {path} reads rows of tokens, so it cannot continue a text token by token; export "
            "a run whose layer reads contexts."
        )
    with status_line("Exporting the model"), _quiet(), replacing(folder) as temporary_path:
        _write(opened, temporary_path)
    return folder


def _refuse_taken(folder: Path) -> None:
    """Raise UserError if a folder contains anything but an exported model."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        with suppress(DamagedFile, OSError, AttributeError):
            if read_json(folder / "config.json").get("model_type") == ContextKVConfig.model_type:
                return
        raise UserError(f"{folder} contains something other than an exported model; choose another folder.")


class _quiet:
    """A context manager that hides transformers' own progress bars."""

    def __enter__(self) -> None:
        self.were_shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: Any) -> None:
        if self.were_shown:
            logging.enable_progress_bar()


def _write(opened: OpenRun, folder: Path) -> None:
    config = opened.run.config
    settings = {kind: plugin.settings for kind, plugin in config.plugins.items() if KINDS[kind].is_module}
    model, tokenizer = ContextKVForCausalLM.of(opened.model, settings), deepcopy(opened.tokenizer)
    stop_after_text(model, tokenizer)
    try:
        model.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:  # a class of the user that cannot be saved
        if not config.has_own_modules:
            raise
        raise UserError(f"The model of {opened.run.path} cannot be exported: {error}") from error
    tokenizer.save_pretrained(folder)
    # Rewrite the tokenizer's file without indentation, which more than halves its size.
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / MODEL_CARD).write_text(model_card(opened.run), encoding="utf-8")
    if config.has_own_modules:
        _refuse_other_model(model, folder)


def stop_after_text(model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Use the end-of-text token to begin, stop and pad generated text. Padding is on the left."""
    end = tokenizer.eos_token_id
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # `save_pretrained` writes this value
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)


@torch.no_grad()
def _refuse_other_model(model: ContextKVForCausalLM, folder: Path) -> None:
    """Raise UserError if the model that was written to `folder` computes other logits than `model`."""
    written: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(TRIED_TOKENS, device=model.device)[None]
    if not torch.allclose(model(ids).logits, written.to(model.device)(ids).logits, rtol=1e-2, atol=1e-2):
        raise UserError(
            "The model cannot be exported: loaded from its files, it computes something else than the class "
            "that was trained."
        )
