"""Use of a trained run: its model with caches and tokenizer, generation, evaluation, and a model folder."""

from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from ..data.config import Split
from ..data.conversations import load_conversations, read_conversations
from ..data.token_table import load_table
from ..data.tokens import load_tokenizer
from ..errors import UserError, is_disk_full, is_utf8, told_in_a_sentence, values_of_user
from ..files import read_tensors, remove, replacing, rust_errors
from ..measure.other_text import evaluate
from ..method.caches import StreamCache
from ..method.model import ContextKV
from ..method.modeling import ContextKVForCausalLM
from ..plugins.code_digest import method_digest
from ..plugins.mixer import MixerModel, as_read
from ..progress import notice, stage
from .build import frozen_model, load_caches, load_weights, log_frequencies
from .config import ExperimentConfig
from .folder import Run, RunFolder, load_run
from .provenance import choose_device
from .settings import Sampling

TRIED_TOKENS = 64  # on which a saved model is compared with the trained one
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


def for_transformers(
    model: ContextKV, config: ExperimentConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[ContextKVForCausalLM, PreTrainedTokenizerFast]:
    """Wrap a trained model, and a copy of its tokenizer, for generation.

    Raises:
        UserError: the run has a mixer, which does not read token by token.
    """
    if isinstance(model, MixerModel):
        raise UserError("The run has a mixer, which does not read token by token; take a run with contexts.")
    settings = {hook: plugin.settings for hook, plugin in config.plugins.items() if hook != "loss"}
    served, tokenizer = ContextKVForCausalLM.of(model, settings), deepcopy(tokenizer)
    stop_after_text(served, tokenizer)
    return served, tokenizer


def stop_after_text(model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Begin, stop and pad generated text, on the left, with the token that ends a text."""
    end = tokenizer.eos_token_id
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # which is what is saved
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)


def save_for_transformers(
    model: ContextKV, config: ExperimentConfig, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> list[Path]:
    """Write model, code and tokenizer into `folder`; a notice instead if a plug-in cannot be saved."""
    is_own = config.has_own_parts
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # which would stay visible in a notebook
    try:
        served, tokenizer = for_transformers(model, config, tokenizer)
        with replacing(folder) as beside, rust_errors(folder):
            served.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        if is_own:
            _refuse_other_model(served, folder)
    except Exception as error:  # whatever code of the user's raises where it is loaded
        if not is_own or is_disk_full(error):
            raise
        remove(folder)
        notice(f"The model is not saved for transformers: {error}")
        return []
    finally:
        if were_shown:
            logging.enable_progress_bar()
    return [folder]


@torch.no_grad()
def _refuse_other_model(model: ContextKVForCausalLM, folder: Path) -> None:
    """Raise a ValueError if a model loaded from `folder`, with the code there, computes something else."""
    saved: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found, ids = [], torch.arange(TRIED_TOKENS, device=model.device)[None]
    for each in (model, saved.to(model.device)):
        torch.manual_seed(0)  # where it draws
        found.append(each(ids).logits)
    if not torch.allclose(found[0], found[1], rtol=1e-2, atol=1e-2):
        raise ValueError("loaded from its files, it computes something else than the class that was trained.")


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


@told_in_a_sentence()
def evaluate_texts(run: Run | Path | str, data: Path | str, split: str | None = None) -> dict[str, Any]:
    """Measure how well a finished run predicts other conversations.

    Args:
        run: or its folder.
        data: a file, a folder of files, or the name of a data set on the Hub; `split` is one of its splits.

    Returns:
        `evaluate` of the texts, with `file` and `fingerprint`.

    Raises:
        UserError: the conversations cannot be read, or there is no finished run.
    """
    conversations = read_conversations(data, split)
    trained = open_run(run, "auto")
    model, tokenizer = for_transformers(trained.model, trained.run.config, trained.tokenizer)
    made_from = {"file": Path(data).name, "fingerprint": conversations.fingerprint}
    return made_from | evaluate(model, tokenizer, conversations.texts)
