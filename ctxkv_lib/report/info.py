"""What a configuration means in parameters, tokens and bytes: computed, without downloading anything."""

from typing import Any

from ..errors import UserError
from ..method.config import GPT2_VOCAB_SIZE, ModelConfig
from ..method.windows import Window
from ..runs.config import ExperimentConfig
from ..runs.models import shapes
from ..runs.published import PUBLISHED
from ..runs.settings import BEGINNING_TOKENS, BLOCK_TOKENS, POOL_BLOCKS, STRIDE

BYTES = {"fp32": 4, "bf16": 2}  # of a number
ID_BYTES = 4  # of a token id
STREAM_BYTES = 2  # of one in the shared token stream, and of a streamed run
COUNTER_BYTES = 8  # of the tokens read so far
MIB = 2**20
GIB = 2**30
# Dense bf16 products a second, from the makers' data sheets, and the share of them that is taken for granted.
# Neither this share nor the least time of a step has been measured: no GPU was at hand.
PRODUCTS_A_SECOND = {"L4": 121e12, "H100": 989e12}
ASSUMED_SHARE = 0.4
ASSUMED_STEP_SECONDS = 2e-3  # of a hundred or two launches, however small the batch
DEVICES = {"L4": ("L4", 1), "H100": ("H100", 1), "8 x H100": ("H100", 8)}


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
    interval = config.model.interval
    parameters, window = shapes(config)
    kept = window.kept_contexts
    return {
        "preset": config.preset,
        "recipe": config.recipe,
        "samples": config.data.samples,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "parameters": parameters,
        "context_window": {
            "interval": interval,
            "max_contexts": config.model.max_contexts,
            "tokens": config.model.context_window,
            "theoretical_max": train_tokens // interval + 1 if train_tokens else None,
        },
        "slots": slots_in_words(window, config.model),
        "kv_cache": {
            "contexts": kept,
            "bytes": kept * config.model.context_dim * BYTES["fp32"] + COUNTER_BYTES,
        },
        **_cache_sizes(config, train_tokens, val_tokens),
        "computed": computed_size(config, parameters, train_tokens),
    }


def slots_in_words(window: Window, model: ModelConfig) -> str:
    """Say how many contexts a position sees, and where they lie."""
    if window.offsets == Window(model).offsets:
        return f"{len(window)} contexts, {model.interval} tokens apart: {model.context_window} tokens"
    return f"{len(window)} contexts, 0 to {window.offsets[-1]} tokens back, ever further apart"


def computed_size(
    config: ExperimentConfig, parameters: dict[str, int], train_tokens: int | None = None
) -> dict[str, Any] | None:
    """Disk, memory and time of a run with bf16 caches, computed from shapes and data sheets.

    Args:
        train_tokens: None takes the published run's mean a conversation, if the data are UltraChat's.

    Returns:
        `tokens`; `is_streamed`; `disk_gib` (token stream, caches, model); `pool_gib` (contexts of Phase 2 in
        memory, those of an epoch's pool if streamed); `phase1_gib` (contexts of Phase 1: on the GPU, or on a
        CPU in memory, in a file if streamed); `sent_mib` (by each of several processes in a step of Phase 2);
        `epoch_seconds` by device; None without tokens.
    """
    if train_tokens is None:
        if config.data.source != "ultrachat":
            return None
        known = PUBLISHED[500]
        train_tokens = config.data.samples * known["train_tokens"] // known["samples"]
    model = config.model
    is_streamed, row = config.is_streamed(train_tokens), model.context_dim * BYTES["bf16"]
    pool = min(train_tokens, BLOCK_TOKENS * POOL_BLOCKS) if is_streamed else train_tokens
    read = (
        min(train_tokens, config.phase1.max_tokens)
        if config.phase1.context_method == "exact"
        else train_tokens
    )
    caches = train_tokens * (row + ID_BYTES)
    if is_streamed:
        starts = model.context_dim * BYTES["fp32"] // STRIDE
        caches = train_tokens * (starts + STREAM_BYTES) + BEGINNING_TOKENS * row
    return {
        "tokens": train_tokens,
        "is_streamed": is_streamed,
        "disk_gib": (train_tokens * STREAM_BYTES + caches + parameters["total"] * BYTES["fp32"]) / GIB,
        "pool_gib": pool * row / GIB,
        "phase1_gib": read * model.context_dim * BYTES["fp32"] / GIB,
        "sent_mib": parameters["trainable_phase2"] * BYTES["fp32"] / MIB,
        "epoch_seconds": {
            name: _epoch_seconds(config, parameters, train_tokens, *which) for name, which in DEVICES.items()
        },
    }


def _epoch_seconds(
    config: ExperimentConfig, parameters: dict[str, int], tokens: int, device: str, count: int
) -> float:
    """Two products with the table and three with the layer's weights, or the least time of the steps."""
    model = config.model
    operations = 4 * GPT2_VOCAB_SIZE * model.hidden_size + 6 * parameters["trainable_phase2"]
    computing = tokens * operations / (PRODUCTS_A_SECOND[device] * ASSUMED_SHARE * count)
    return max(computing, -(-tokens // config.phase2.batch_size) * ASSUMED_STEP_SECONDS)


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
        ("Context window", facts["slots"]),
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
    rows += _size_rows(facts["computed"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _size_rows(size: dict[str, Any] | None) -> list[tuple[str, str]]:
    if size is None:
        return []
    how, aside = ("streamed", " (on a CPU in a file)") if size["is_streamed"] else ("cached", "")
    phase1 = f"{size['phase1_gib']:,.1f} GiB{aside}"
    seconds = ", ".join(
        f"{name} {taken:,.0f} s" if taken >= 1 else f"{name} under 1 s"
        for name, taken in size["epoch_seconds"].items()
    )
    return [
        ("Computed, not measured", f"{size['tokens']:,} training tokens, contexts {how}, bf16"),
        ("Disk", f"{size['disk_gib']:,.1f} GiB: tokens, caches, model"),
        ("Contexts held", f"Phase 1 {phase1}, Phase 2 {size['pool_gib']:,.2f} GiB"),
        ("An epoch of Phase 2", seconds),
        ("Sent by each process in a step", f"{size['sent_mib']:,.0f} MiB"),
    ]
