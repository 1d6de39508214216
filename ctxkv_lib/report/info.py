"""Compute what a configuration means in parameters, tokens and bytes, without downloading anything."""

from typing import Any

from ..data.settings import DataConfig
from ..errors import UserError
from ..method.config import GPT2_VOCAB_SIZE, ModelConfig
from ..method.memory import GIB, MIB, mib
from ..method.windows import Window
from ..progress import counted
from ..runs.config import ExperimentConfig
from ..runs.models import shapes
from ..runs.published import PUBLISHED
from ..runs.refusals import refusals

BYTES = {"fp32": 4, "bf16": 2}  # of a number
ID_BYTES = 4  # of a token id
STREAM_BYTES = 2  # of one in the shared token stream
COUNTER_BYTES = 8  # of the tokens read so far
TOKEN_BYTES = 8  # of each token that may be copied
# Dense products a second, from data sheets, and number of devices. The share reached and the minimum time of
# a step are assumptions: neither has been measured.
L4, H100 = {"bf16": 121e12, "fp32": 30.3e12}, {"bf16": 989e12, "fp32": 67e12}
DEVICES = {"L4": (L4, 1), "H100": (H100, 1), "8 x H100": (H100, 8)}
ASSUMED_SHARE = 0.4
ASSUMED_STEP_SECONDS = 2e-3  # of a hundred or two launches, however small the batch
OF_CONTEXTS = ["context_window", "slots", "kv_cache", "computed", "caches_dense_fp32_mib"]
OF_CONTEXTS += [f"caches_{name}_mib" for name in BYTES]


def context_window(model: ModelConfig, train_tokens: int | None) -> dict[str, int | None]:
    """Describe the window; `theoretical_max` is the number of contexts that it would have without a limit."""
    return {
        "interval": model.interval,
        "max_contexts": model.max_contexts,
        "tokens": model.context_window,
        "theoretical_max": train_tokens // model.interval + 1 if train_tokens else None,
    }


def describe(
    config: ExperimentConfig, train_tokens: int | None = None, val_tokens: int | None = None
) -> dict[str, Any]:
    """Collect the output of `ctxkv info`, under the keys of `summary.json` where that has the same value.

    Token counts default to the published ones for the published data, else to None, as do values that depend
    on them; with a mixer, also values that are of contexts.
    """
    for option, count in (("--train-tokens", train_tokens), ("--val-tokens", val_tokens)):
        if count is not None and count < 1:
            raise UserError(f"{option} is {count}; allowed: 1 or more.")
    known = PUBLISHED.get(config.data.samples) if config.data.source == "ultrachat" else None
    if known:
        train_tokens = train_tokens or known["train_tokens"]
        if config.data.validation_samples == DataConfig.validation_samples:
            val_tokens = val_tokens or known["val_tokens"]
    sizes = (train_tokens, val_tokens, config.model) if train_tokens and val_tokens else None
    parameters, window, copies = shapes(config)
    kept = window.offsets[-1] + 1
    held = COUNTER_BYTES + kept * config.model.context_dim * BYTES["fp32"] + copies * (kept - 1) * TOKEN_BYTES
    found = {
        "preset": config.preset,
        "recipe": config.recipe,
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": parameters,
        "context_window": context_window(config.model, train_tokens),
        "slots": slots_in_words(window, config.model),
        "kv_cache": {"contexts": kept, "bytes": held},
        **{f"caches_{name}_mib": sizes and gathered_mib(*sizes, name) for name in BYTES},
        "caches_dense_fp32_mib": sizes and dense_fp32_mib(*sizes),
        "computed": computed_size(config, parameters, train_tokens),
        "refused": refusals(config, {"train": train_tokens, "val": val_tokens}),
    }
    return found | dict.fromkeys(OF_CONTEXTS) if "mixer" in config.plugins else found


def slots_in_words(window: Window, model: ModelConfig) -> str:
    """Describe how many contexts a position sees, and where they lie."""
    if window.offsets == Window(model).offsets and model.interval > 1 < len(window):
        return f"{len(window)} contexts, {model.interval} tokens apart: {model.context_window} tokens"
    reach = "0" if len(window) == 1 else f"0 to {window.offsets[-1]}"
    return f"{counted(len(window), ' contexts')}, {reach} tokens back"


def computed_size(
    config: ExperimentConfig, parameters: dict[str, int], train_tokens: int | None = None
) -> dict[str, Any] | None:
    """Compute disk, memory and time of a run from shapes and data sheets.

    Precision `auto` is taken as that of a GPU with bf16 units.

    Args:
        train_tokens: None takes the published run's mean per conversation, for UltraChat.

    Returns:
        `tokens`; `precision`; `disk_gib` (token stream, training caches, model, checkpoint);
        `pool_gib` (contexts of Phase 2); `phase1_gib` (those of Phase 1); `sent_mib` (by each of several
        processes in a step of Phase 2); `epoch_seconds` by device; None without tokens.
    """
    if train_tokens is None:
        if config.data.source != "ultrachat":
            return None
        known = PUBLISHED[500]
        train_tokens = config.data.samples * known["train_tokens"] // known["samples"]
    model = config.model
    precision = "fp32" if config.runtime.precision == "fp32" else "bf16"
    row = model.context_dim * BYTES[precision]
    is_exact = config.phase1.context_method == "exact"
    read = min(train_tokens, config.phase1.max_tokens) if is_exact else train_tokens
    weights = parameters["total"] + parameters["trainable_phase2"]  # in the model, and beside it
    caches = train_tokens * (row + ID_BYTES)
    # Two products with the table and three with the layer.
    operations = train_tokens * (4 * GPT2_VOCAB_SIZE * model.hidden_size + 6 * parameters["trainable_phase2"])
    least = -(-train_tokens // config.phase2.batch_size) * ASSUMED_STEP_SECONDS
    return {
        "tokens": train_tokens,
        "precision": precision,
        "disk_gib": (train_tokens * STREAM_BYTES + caches + weights * BYTES["fp32"]) / GIB,
        "pool_gib": train_tokens * row / GIB,
        "phase1_gib": read * model.context_dim * BYTES["fp32"] / GIB,
        "sent_mib": parameters["trainable_phase2"] * BYTES["fp32"] / MIB,
        "epoch_seconds": {
            name: max(operations / (products[precision] * ASSUMED_SHARE * count), least)
            for name, (products, count) in DEVICES.items()
        },
    }


def dense_fp32_mib(train_tokens: int, val_tokens: int, model: ModelConfig) -> dict[str, float]:
    """Compute MiB of the original's layout: an fp32 context and embedding row for each input token."""
    sizes = {}
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        sizes[f"{split}_ctx"] = (tokens - 1) * model.context_dim * BYTES["fp32"]
        sizes[f"{split}_emb"] = (tokens - 1) * model.hidden_size * BYTES["fp32"]
    return _with_total(sizes)


def gathered_mib(train_tokens: int, val_tokens: int, model: ModelConfig, precision: str) -> dict[str, float]:
    """Compute MiB of our layout: padded contexts, those of training in `precision`, and token ids."""
    sizes = {}
    for split, tokens, dtype in (("train", train_tokens, precision), ("val", val_tokens, "fp32")):
        sizes[f"{split}_ctx"] = tokens * model.context_dim * BYTES[dtype]
        sizes[f"{split}_emb"] = tokens * ID_BYTES
    return _with_total(sizes)


def _with_total(sizes: dict[str, int]) -> dict[str, float]:
    """Convert bytes to MiB, and add their sum."""
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}
