"""Use of trained runs: the model of a run, for explorers, measurements and transformers."""

from contextlib import suppress
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.conversations import read_conversations
from ..data.tokens import load_tokenizer
from ..errors import DamagedFile, UserError, ended_calmly, is_utf8, memory_advice, values_of_user
from ..evaluate import evaluate
from ..files import read_json
from ..method.model import ContextKV
from ..method.modeling import ContextKVForCausalLM
from ..progress import notice, stage
from .config import ExperimentConfig
from .models import frozen_model, load_frozen
from .package_code import code_of
from .provenance import choose_device
from .records import Records
from .rows import MixerModel
from .run_folder import Run, RunFolder, load_run, refuse_damaged
from .settings import Sampling

PARTS = ("block", "attention")  # hooks whose classes a model for transformers has
COLDEST = 1e-6  # temperature at which sampling always takes the largest logit


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
        UserError: no finished run there, a damaged one, or one with a mixer.
    """
    run = load_run(path)
    model = for_transformers(load_model(run.path, run.config), run.config)
    tokenizer = deepcopy(load_tokenizer(run.config.data.tokenizer))
    stop_after_text(model, tokenizer)
    return model.to(device), tokenizer  # type: ignore[arg-type]


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
        `evaluate.evaluate` of them, with `file` and `fingerprint`.

    Raises:
        UserError: the file cannot be read, or there is no finished run.
    """
    conversations = read_conversations(Path(file), columns)
    made_from = {"file": Path(file).name, "fingerprint": conversations.fingerprint}
    model, tokenizer = _loaded(run)
    return {**made_from, **evaluate(model, tokenizer, list(conversations.texts()))}


def _loaded(run: Run | Path | str) -> tuple[ContextKVForCausalLM, PreTrainedTokenizerBase]:
    path = run.path if isinstance(run, Run) else run
    with stage("Loading the model"):
        return load_trained(path, choose_device("auto"))


def for_transformers(model: ContextKV, config: ExperimentConfig) -> ContextKVForCausalLM:
    """Wrap a trained model for transformers.

    Raises:
        UserError: a mixer, which cannot read token by token.
    """
    if isinstance(model, MixerModel):
        raise UserError(
            f"The run has a mixer ({config.plugins['mixer'].name}), which does not read token by token; "
            "generate, evaluate and export with a run that attends to contexts."
        )
    settings = {hook: plugin.settings for hook, plugin in config.plugins.items() if hook in PARTS}
    return ContextKVForCausalLM.of(model, settings)


def evaluation_file(run: Path, data: Path, fingerprint: str) -> Path:
    """Return the JSON path for the scores of a file of conversations; the figure has the same name.

    It is named like the file, plus six digits of the fingerprint if another text of that name was evaluated
    before.
    """
    folder, name = run / "evaluation", Path(data.name.removesuffix(".gz")).stem
    plain = folder / f"{name}.json"
    with suppress(FileNotFoundError, DamagedFile, LookupError, TypeError):  # written anew
        if read_json(plain)["fingerprint"] != fingerprint:
            return folder / f"{name}-{fingerprint[:6]}.json"
    return plain
