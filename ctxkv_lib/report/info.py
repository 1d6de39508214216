"""What a configuration means in parameters, tokens and bytes: arithmetic alone, at once, without torch."""

from typing import Any

from ..config import ExperimentConfig
from ..errors import UserError
from ..model.config import ModelConfig
from ..runs.published import PUBLISHED

BYTES = {"fp32": 4, "bf16": 2}  # of a number
ID_BYTES = 4  # of a token id
COUNTER_BYTES = 8  # of the tokens read so far
MIB = 2**20


def describe(
    config: ExperimentConfig, train_tokens: int | None = None, val_tokens: int | None = None
) -> dict[str, Any]:
    """Facts of `ctxkv info`, under the keys of `summary.json`.

    Token counts that are not given are the published ones if the data are, else None with all that
    depends on them.
    """
    for option, count in (("--train-tokens", train_tokens), ("--val-tokens", val_tokens)):
        if count is not None and count < 1:
            raise UserError(f"{option} is {count}; allowed: 1 or more.")
    known = PUBLISHED.get(config.data.samples) if config.data.source == "ultrachat" else None
    train_tokens = train_tokens or (known["train_tokens"] if known else None)
    val_tokens = val_tokens or (known["val_tokens"] if known else None)
    interval, kept = config.model.interval, config.model.kept_contexts
    return {
        "preset": config.preset,
        "recipe": config.recipe,
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": config.model.parameter_counts(),
        "context_window": {
            "interval": interval,
            "max_contexts": config.model.max_contexts,
            "tokens": config.model.context_window,
            "theoretical_max": train_tokens // interval + 1 if train_tokens else None,
        },
        "kv_cache": {
            "contexts": kept,
            "bytes": kept * config.model.context_dim * BYTES["fp32"] + COUNTER_BYTES,
        },
        **_cache_sizes(config, train_tokens, val_tokens),
    }


def _cache_sizes(
    config: ExperimentConfig, train_tokens: int | None, val_tokens: int | None
) -> dict[str, dict[str, float] | None]:
    """MiB of the caches in either precision, and in the published layout."""
    if not (train_tokens and val_tokens):
        return dict.fromkeys(("caches_fp32_mib", "caches_bf16_mib", "caches_dense_fp32_mib"))
    sizes = (train_tokens, val_tokens, config.model)
    ours = {f"caches_{name}_mib": gathered_mib(*sizes, name) for name in BYTES}
    return {**ours, "caches_dense_fp32_mib": dense_fp32_mib(*sizes)}


def dense_fp32_mib(train_tokens: int, val_tokens: int, model: ModelConfig) -> dict[str, float]:
    """MiB of the published layout: one fp32 context and one fp32 embedding row for each input token."""
    sizes = {}
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        sizes[f"{split}_ctx"] = (tokens - 1) * model.context_dim * BYTES["fp32"]
        sizes[f"{split}_emb"] = (tokens - 1) * model.hidden_size * BYTES["fp32"]
    return _with_total(sizes)


def gathered_mib(train_tokens: int, val_tokens: int, model: ModelConfig, precision: str) -> dict[str, float]:
    """MiB of our layout: padded contexts, in training those of `precision` (see `BYTES`), and token ids."""
    sizes = {}
    for split, tokens, dtype in (("train", train_tokens, precision), ("val", val_tokens, "fp32")):
        sizes[f"{split}_ctx"] = tokens * model.context_dim * BYTES[dtype]
        sizes[f"{split}_emb"] = tokens * ID_BYTES
    return _with_total(sizes)


def _with_total(sizes: dict[str, int]) -> dict[str, float]:
    """Bytes as MiB, and their sum."""
    return {name: round(size / MIB, 2) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def format_info(facts: dict[str, Any]) -> str:
    """`describe` as lines for a terminal."""
    parameters, window = facts["parameters"], facts["context_window"]
    share = parameters["trainable_phase2"] / parameters["total"]
    rows = [
        ("Preset, recipe, samples", f"{facts['preset']}, {facts['recipe']}, {facts['samples']}"),
        ("Parameters", f"{parameters['total']:,}"),
        ("Trainable in Phase 2", f"{parameters['trainable_phase2']:,} ({share:.2%})"),
        ("Context window", f"{window['interval']} x {window['max_contexts']} = {window['tokens']} tokens"),
    ]
    cache = facts["kv_cache"]
    held = f"{cache['contexts']} contexts, {cache['bytes'] / 1024:,.0f} KiB, however long the text"
    rows.append(("KV cache of a sequence", held))
    if window["theoretical_max"]:
        rows += [
            ("Train tokens", f"{facts['train_tokens']:,}"),
            ("Theoretical max contexts", f"{window['theoretical_max']:,}"),
        ]
    if sizes := facts["caches_dense_fp32_mib"]:
        rows.append(("Validation tokens", f"{facts['val_tokens']:,}"))
        rows += [(f"{name} in the published layout", f"{size:,.0f} MiB") for name, size in sizes.items()]
        rows += [
            (f"total in ours, {name}", f"{facts[f'caches_{name}_mib']['total']:,.0f} MiB") for name in BYTES
        ]
    else:
        rows.append(("Cache sizes", "give --train-tokens and --val-tokens"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
