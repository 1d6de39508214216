"""What a configuration means, without a download: counts for `ctxkv info`, settings for `ctxkv settings`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..data.conversations import check_splits
from ..data.embeddings import check_width
from ..data.settings import DataConfig
from ..errors import UserError
from ..method.config import ModelConfig
from ..method.memory import mib
from ..runs.config import GROUPS, ExperimentConfig, build_config, flat
from ..runs.model import parameter_counts, unallocated_model
from ..runs.published import PUBLISHED
from .tables import aligned, slots_text

FP32_BYTES, TOKEN_BYTES = 4, 8


def describe(
    config: ExperimentConfig, train_tokens: int | None = None, val_tokens: int | None = None
) -> dict[str, Any]:
    """Count parameters, tokens and bytes of a configuration, under the keys of `summary.json`.

    Token counts default to the original's for its data, else to None. `kv_cache` is what one sequence keeps,
    `refused` why a run would be refused. A mixer has no contexts, hence neither window nor caches.

    Raises:
        UserError: a token count below 1.
    """
    for option, count in (("--train-tokens", train_tokens), ("--val-tokens", val_tokens)):
        if count is not None and count < 1:
            raise UserError(f"{option} is {count}; allowed: 1 or more.")
    known = PUBLISHED.get(config.data.samples) if config.data.source == "ultrachat" else None
    if known:
        train_tokens = train_tokens or known["train_tokens"]
        if config.data.validation_samples == DataConfig.validation_samples:
            val_tokens = val_tokens or known["val_tokens"]
    model = unallocated_model(config)
    found = {
        "preset": config.preset,
        "recipe": config.recipe,
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": parameter_counts(model),
        "refused": refusals(config),
    }
    if "mixer" in config.plugins:
        return found
    window = model.window
    kept = window.offsets[-1] + 1
    held = kept * (config.model.context_dim * FP32_BYTES + TOKEN_BYTES)  # contexts and their tokens
    found["context_window"] = {**context_window(config.model, train_tokens), "offsets": window.offsets}
    found["kv_cache"] = {"contexts": kept, "bytes": held}
    if train_tokens and val_tokens:
        found["caches_dense_fp32_mib"] = dense_fp32_mib(train_tokens, val_tokens, config.model)
    return found


def refusals(config: ExperimentConfig) -> list[str]:
    """Return the sentences with which a run would be refused, as far as they are known without a network."""
    checks: list[Callable[[], object]] = [
        lambda: check_splits(config.data),
        lambda: check_width(config.data.table, config.model.hidden_size),
    ]
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def context_window(model: ModelConfig, train_tokens: int | None) -> dict[str, int | None]:
    """Describe the window; `theoretical_max` is the number of contexts that it would have without a limit."""
    return {
        "interval": model.interval,
        "max_contexts": model.max_contexts,
        "tokens": model.context_window,
        "theoretical_max": train_tokens // model.interval + 1 if train_tokens else None,
    }


def dense_fp32_mib(train_tokens: int, val_tokens: int, model: ModelConfig) -> dict[str, float]:
    """Compute MiB of the original's layout: an fp32 context and embedding row for each input token."""
    sizes = {}
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        sizes[f"{split}_ctx"] = (tokens - 1) * model.context_dim * FP32_BYTES
        sizes[f"{split}_emb"] = (tokens - 1) * model.hidden_size * FP32_BYTES
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def format_info(sizes: dict[str, Any]) -> str:
    """Format `describe` for a terminal."""
    parameters = sizes["parameters"]
    rows = {
        "Preset, recipe, samples": f"{sizes['preset']}, {sizes['recipe']}, {sizes['samples']:,}",
        "Parameters": f"{parameters['total']:,}",
        "Trainable in Phase 2": f"{parameters['trainable_phase2']:,} "
        f"({parameters['trainable_phase2'] / parameters['total']:.2%})",
    }
    names = {"train_tokens": "Train tokens", "val_tokens": "Validation tokens"}
    rows |= {name: f"{sizes[key]:,}" for key, name in names.items() if sizes[key]}
    if cache := sizes.get("kv_cache"):
        rows["Contexts read (tokens back)"] = slots_text(sizes["context_window"]["offsets"])
        kept = f"{cache['contexts']:,} contexts, {cache['bytes'] / 1024:,.0f} KiB, however long the text"
        rows["KV cache of a sequence"] = kept
    dense = sizes.get("caches_dense_fp32_mib", {})
    rows |= {f"{name} in the original's layout": f"{size:,.1f} MiB" for name, size in dense.items()}
    refused = (f"\n`ctxkv run` would refuse this: {why}" for why in sizes["refused"])
    return "\n".join([aligned(rows), *refused])


def describe_settings(preset: str | None = None, recipe: str | None = None) -> list[dict[str, Any]]:
    """List every setting: `setting`, `value`, `unit`, `reason`, `allowed`, `meanings` of allowed names.

    Args:
        preset: whose values to give; None gives the defaults, or with a recipe those of `colab`.
        recipe: whose values to give, with the settings of its plug-ins; None takes the preset's own.

    Raises:
        UserError: an unknown preset or recipe.
    """
    chosen = build_config(preset or "colab", recipe) if preset or recipe else None
    values = dict(flat(chosen.to_dict())) if chosen else {}
    plugins = chosen.plugins if chosen else {}
    groups = {**GROUPS, **{hook: getattr(each.load(), "Settings", None) for hook, each in plugins.items()}}
    return [
        {
            "setting": f"{group}.{known.name}",
            "value": values.get(f"{group}.{known.name}", known.default),
            **known.metadata,
            "allowed": known.metadata["allowed"].text,
        }
        for group, settings in groups.items()
        for known in (dataclasses.fields(settings) if settings else ())
    ]


def format_settings(rows: list[dict[str, Any]]) -> str:
    """Format `describe_settings` for a terminal: a setting a line, and what is allowed below it."""
    found = []
    for row in rows:
        found.append(f"{row['setting']} = {row['value']} {row['unit']}".rstrip())
        allowed = f"; allowed: {row['allowed']}" if row["allowed"] != "any" else ""
        found.append(f"    {row['reason']}{allowed}")
        found += [f"      {name}: {meaning}" for name, meaning in row["meanings"].items() if meaning]
    return "\n".join(found)
