"""Use of a trained run: its model with caches and tokenizer, generation, evaluation, and a model folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..data.config import Split
from ..data.conversations import load_conversations
from ..data.token_table import load_table
from ..data.tokens import load_tokenizer
from ..errors import UserError, is_utf8, told_in_a_sentence, values_of_user
from ..files import read_tensors
from ..method.caches import StreamCache
from ..method.model import ContextKV
from ..plugins.code_digest import method_digest
from ..plugins.mixer import as_read
from ..progress import notice, stage
from .build import frozen_model, load_caches, load_weights, log_frequencies
from .config import Sampling
from .device import choose_device
from .export import for_transformers
from .folder import RunFolder
from .results import Run, load_run

COLDEST = 1e-6  # temperature at which sampling always takes the largest logit


@dataclass(frozen=True)
class Trained:
    """A finished run with what it takes to look inside.

    Attributes:
        model: trained, in evaluation mode.
        caches: `StreamCache`s of "train" and "val", mapped from their files.
    """

    run: Run
    model: ContextKV
    tokenizer: PreTrainedTokenizerFast
    caches: dict[str, StreamCache]


@told_in_a_sentence()
def open_run(run: Run | Path | str, device: str = "cpu") -> Trained:
    """Open a finished run.

    Args:
        run: or its folder.
        device: where the model computes: cpu, cuda, mps, or auto.

    Raises:
        UserError: there is no finished run, a file is damaged, or a plug-in is missing or changed.
    """
    path = run.path if isinstance(run, Run) else run
    run = load_run(path, "phase1", "caches", "phase2", "model")
    for hook in run.config.plugins.keys() - {"loss"}:
        run.config.plugins[hook].refuse_changed()
    if RunFolder.read(run.path).origin["code"] != method_digest():
        notice(f"{run.path} was made with other code of the method; what it computes here may be different.")
    with stage("Loading the model"):
        model = frozen_model(run.config, *_frozen(run))
        load_weights(model, run.path)
        tokenizer = load_tokenizer(run.config.data.tokenizer)
    streams = load_caches(run.path / "caches").items()
    caches = {split: as_read(model, cache, trained=False) for split, cache in streams}
    return Trained(run, model.to(choose_device(device)), tokenizer, caches)


def _frozen(run: Run) -> tuple[Tensor, Tensor | None]:
    """Return token table and log-frequencies: of the model folder, or made again where it was not saved."""
    saved = run.path / "model" / "model.safetensors"
    if saved.is_file():
        tensors = read_tensors(saved)
        return tensors["model.wte.weight"], tensors.get("model.log_unigram")
    config = run.config
    refuse_other_texts(run, "corpus", run.summary["provenance"]["data"].get("corpus_fingerprint"))
    table = load_table(config.data, config.model.hidden_size, config.runtime.seed)
    if table.fingerprint != run.summary["provenance"]["embeddings"]["fingerprint"]:
        raise UserError(
            f"The text of the token table has changed since {run.path} was trained; restore "
            f"{config.data.path or 'it'}, or make a new run."
        )
    return table.weight, log_frequencies(config)


def refuse_other_texts(run: Run, split: Split, fingerprint: str | None) -> None:
    """Raise a UserError if a split's conversations are not those with this fingerprint; None: any."""
    if fingerprint not in (None, load_conversations(run.config.data, split).fingerprint):
        raise UserError(
            f"The conversations of {run.config.data.path} for {split} are not those that {run.path} was made "
            "from; restore them, or make a new run."
        )


@told_in_a_sentence()
def generate_text(run: Run | Path | str, prompt: str, **sampling: Any) -> str:
    """Generate text with a finished run; the result begins with `prompt`.

    Args:
        run: or its folder.
        sampling: fields of `runs.settings.Sampling`, as in `max_new_tokens=20`.

    Raises:
        UserError: no finished run there, an empty prompt, or a field or value that is not allowed.
    """
    names = [field.name for field in fields(Sampling)]
    if unknown := [name for name in sampling if name not in names]:
        raise UserError(f"sampling has {unknown[0]!r}; allowed: {', '.join(names)}.")
    with values_of_user():
        chosen = Sampling(**sampling)
    if not prompt or not is_utf8(prompt):
        raise UserError("--prompt is empty or not UTF-8; give at least one character, in UTF-8.")
    trained = open_run(run, "auto")
    model, tokenizer = for_transformers(trained.model, trained.run.config, trained.tokenizer)
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"do_sample": False}
    if chosen.temperature > COLDEST:
        options = {"do_sample": True, "temperature": chosen.temperature, "top_k": chosen.top_k}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        ids = model.generate(**encoded, max_new_tokens=chosen.max_new_tokens, **options)
    new = ids[0, encoded["input_ids"].shape[1] :]
    return prompt + str(tokenizer.decode(new, skip_special_tokens=True))
