"""Use of trained runs: the model of a run, for explorers, measurements and transformers."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.conversations import read_conversations
from ..data.hub import hub_errors
from ..data.tokens import load_tokenizer
from ..errors import UserError, ended_calmly, is_utf8, memory_advice, values_of_user
from ..hf import inference
from ..hf.configuration import ContextKVConfig
from ..hf.modeling import ContextKVForCausalLM
from ..hf.plugins import NAMED, file_digest, key_of
from ..method.caches import StreamCache
from ..method.model import ContextKV
from ..progress import notice, stage, transformers_bars_hidden
from .caches import load_cache
from .config import ExperimentConfig
from .long_run import LongRun
from .models import frozen_model, load_frozen
from .package_code import code_of, replaced_parts
from .plugins import load, loaded
from .provenance import choose_device
from .records import Records
from .rows import MixerModel, as_read
from .run_folder import Run, RunFolder, load_run, refuse_damaged
from .settings import Sampling

COLDEST = 1e-6  # temperature at which sampling always takes the largest logit


@dataclass(frozen=True)
class Trained:
    """A finished run with model, caches ("train" and "val") and tokenizer, on the CPU."""

    run: Run
    model: ContextKV
    caches: Mapping[str, StreamCache]
    tokenizer: PreTrainedTokenizerBase


def open_run(run: Run | Path | str) -> Trained:
    """Load model, caches and tokenizer of a finished run, or of the one in a folder, on the CPU.

    Raises:
        UserError: the run folder lacks one of them, or it is damaged.
    """
    run = run if isinstance(run, Run) else load_run(run)
    refuse_damaged(run.path, "caches")
    model, tokenizer = load_model(run.path, run.config), load_tokenizer(run.config.data.tokenizer)
    caches = {
        split: as_read(model, load_cache(run.path / "caches", split), trained=False)
        for split in ("train", "val")
    }
    return Trained(run, model, caches, tokenizer)


def load_model(path: Path, config: ExperimentConfig) -> ContextKV:
    """Rebuild the model of a trained run on the CPU, with its plug-ins.

    Raises:
        UserError: a file of the run is damaged, or a plug-in is missing or changed.
    """
    refuse_damaged(path, "phase1")
    refuse_damaged(path, "phase2")
    _tell_of_other_code(path, config)
    (table, counts), records = load_frozen(config), Records.read(path)
    made = records and records.stages["phase2"].result["provenance"]["embeddings"]["fingerprint"]
    if made not in (None, table.fingerprint):
        raise UserError(
            f"The text of the token table has changed since {path} was trained; restore "
            f"{config.data.path or 'it'}, or make a new run."
        )
    folder, model = RunFolder(path), frozen_model(config, table, counts)
    folder.load_block(model)
    folder.load_attention(model)
    return model.eval()


def load_trained(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[ContextKVForCausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer of a finished run as transformers objects.

    Raises:
        UserError: no finished run there, a damaged one, or a mixer without token-by-token inference.
    """
    from transformers import AutoTokenizer

    run = load_run(path)
    folder, records = RunFolder(run.path).model, Records.read(run.path)
    if records and "model" in records.stages and not records.stages["model"].files:  # its code is not saved
        model = for_transformers(load_model(run.path, run.config), run.config, saved=False)
        tokenizer = deepcopy(load_tokenizer(run.config.data.tokenizer))
        stop_after_text(model, tokenizer)
        return model.to(device), tokenizer  # type: ignore[arg-type]
    refuse_damaged(run.path, "model")
    saved = ContextKVConfig.from_pretrained(folder).plugins
    for hook in run.config.plugins.keys() & saved.keys():
        plugin = run.config.plugins[hook]
        key = key_of({**saved[hook], "plugin": plugin.name})  # since a mixer saves others
        NAMED[key] = loaded(plugin)  # which refuses another class of the same name
    _tell_of_other_code(run.path, run.config)
    with transformers_bars_hidden(), values_of_user():
        model = ContextKVForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def stop_after_text(model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin, stop and pad generated text, on the left, with the token that ends a text."""
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # which is what is saved
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)


def _tell_of_other_code(path: Path, config: ExperimentConfig) -> None:
    records = Records.read(path)
    if records and records.code != code_of(config):
        notice(f"{path} was made with other code of the method; what it computes here may be different.")


def push_model(path: Path | str, repo: str, private: bool = False) -> str:
    """Upload the model folder of a finished run to a repository on the Hub, created if missing.

    Args:
        repo: `owner/name`, or `name` for the user who is logged in.
        private: a new repository is seen by its owner only.

    Returns:
        the repository's address.

    Raises:
        UserError: no finished run there, a run without a model folder, a damaged one, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    folder = RunFolder(load_run(path).path)
    refuse_damaged(folder.path, "model")
    if not folder.model.is_dir():
        why = "since one of its plug-ins cannot be saved"
        raise UserError(f"{folder.path} has no model for transformers, {why}; push another run.")
    advice = "log in with `hf auth login` (a token that may write), and check the name, such as owner/name"
    failure = f"{folder.model} could not be uploaded to {repo} on the Hugging Face Hub"
    with values_of_user(), hub_errors(failure, advice, RuntimeError):  # of hf_xet
        made = HfApi().create_repo(repo, private=private or None, exist_ok=True)
        HfApi().upload_folder(repo_id=made.repo_id, folder_path=folder.model)
        return str(made)


@ended_calmly()
@memory_advice("Generating", "lower --max-new-tokens")
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
    return _generated(*_loaded(run), prompt, chosen)


@torch.random.fork_rng(devices=[])
def _generated(
    model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> str:
    if not is_utf8(prompt):
        raise UserError("--prompt is not UTF-8; set the terminal to UTF-8, or write the prompt in ASCII.")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    if encoded["input_ids"].shape[1] == 0:
        raise UserError("--prompt is empty; give at least one character.")
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > COLDEST:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": int(sampling.top_k)}
    torch.manual_seed(sampling.seed)
    ids = model.generate(**encoded, max_new_tokens=sampling.max_new_tokens, **options)
    new = ids[0, encoded["input_ids"].shape[1] :]
    return prompt + str(tokenizer.decode(new, skip_special_tokens=True))


@ended_calmly()
@memory_advice("Evaluation", "evaluate a file with fewer conversations")
def evaluate_texts(run: Run | Path | str, file: Path | str, columns: str | None = None) -> dict[str, Any]:
    """Measure how well a finished run predicts the conversations in a file.

    Args:
        run: or its folder.
        columns: the file's, as `data.columns`.

    Returns:
        `hf.inference.evaluate_texts` of them, with `file` and `fingerprint`.

    Raises:
        UserError: the file cannot be read, or there is no finished run.
    """
    conversations = read_conversations(Path(file), columns)
    made_from = {"file": Path(file).name, "fingerprint": conversations.fingerprint}
    model, tokenizer = _loaded(run)
    loop = LongRun("evaluation", model.device, lambda _: None)
    return {**made_from, **inference.evaluate_texts(model, tokenizer, list(conversations.texts()), loop)}


def _loaded(run: Run | Path | str) -> tuple[ContextKVForCausalLM, PreTrainedTokenizerBase]:
    path = run.path if isinstance(run, Run) else run
    with stage("Loading the model"):
        return load_trained(path, choose_device("auto"))


def for_transformers(model: ContextKV, config: ExperimentConfig, saved: bool = True) -> ContextKVForCausalLM:
    """Wrap a trained model for transformers.

    Args:
        saved: refuse a model that could not be loaded from its folder.

    Raises:
        UserError: a mixer without token-by-token inference, or a plug-in that cannot be exported.
    """
    from ..hf.export import source_file

    mixer = config.plugins.get("mixer")
    if mixer and not hasattr(loaded(mixer), "served"):
        raise UserError(
            f"The run has a mixer ({mixer.name}) without a form that reads token by token (`served`); "
            "generate, evaluate and export with a run that attends to contexts."
        )
    plugins: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for hook in ("block", "attention"):
        if plugin := config.plugins.get(hook):
            parts[hook] = loaded(plugin)
            plugins[hook] = {"plugin": plugin.name, "settings": plugin.settings}
    if isinstance(model, MixerModel):
        model, plugins = model.attention.served(model)  # type: ignore[operator]
        parts = {hook: load(plugin["plugin"]) for hook, plugin in plugins.items()}
    for hook, part in parts.items():
        try:
            source_file(part)
            plugins[hook] |= {"source": file_digest(part)}
        except ValueError as error:
            if saved:
                raise UserError(f"{error}.") from None
        NAMED[key_of(plugins[hook])] = part
    if saved and (replaced := [name for name, _ in replaced_parts()]):
        raise UserError(f"{replaced[0]} was replaced; use a plug-in, whose code is saved with the model.")
    if saved and (lost := dict(model.named_buffers()).keys() - model.state_dict()):
        raise UserError(f"the buffer {min(lost)} is not saved with the weights (persistent=False).")
    return ContextKVForCausalLM.from_model(model, plugins)
