"""The stages of an experiment, in order: settings, contexts (Phase 1 and the caches), Phase 2, model, test.

Each function computes one stage; `driver` decides whether it has to, and records what it was made from.
Rank 0 computes everything except Phase 2, whose batches all processes share (see `ranks`).
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..data.tokens import validation_stream
from ..errors import UserError
from ..files import mib, write_json, write_parts, write_tensors
from ..method.caches import DTYPES, Cache
from ..method.contexts import contexts_by_passes, distinct_rows, exact_contexts
from ..method.loop import Diverged
from ..method.oacd import UNTRAINED, Phase1Result, train_context_block
from ..method.phase2 import train_layer
from ..method.scoring import effective_rank, perplexity, token_scores
from ..plugins.checks import refuse_unsaved
from ..plugins.hooks import HOOKS
from ..progress import epochs_ahead, log, print_on_terminal, status_line
from .build import load_block, load_caches, load_weights, parameter_counts, place_caches
from .config import GROUPS, ExperimentConfig
from .driver import Stage, Work
from .folder import SETTINGS
from .inputs import Inputs, settings_table
from .presets import usual_epochs
from .provenance import provenance
from .saved_epochs import RunLoop

SCAN_TOKENS = 2**18  # tokens per chunk when contexts are computed: 256 MiB
EMBEDDED_TOKENS = 2**13  # tokens per chunk when embeddings are written
# What the stage `contexts` is made from; `model.interval` and the like only matter to Phase 2.
CONTEXT_SETTINGS: tuple[str, ...] = ("phase1", "block", "loss", "model.context_dim", "model.hidden_size")
CONTEXT_SETTINGS += ("runtime.seed", "runtime.embedding_cache")
CONTEXT_DIGESTS = ("code", "training text", "validation text", "tokenizer", "token table", "precision")


def settings_stage(config: ExperimentConfig) -> Stage:
    """Return the first stage of every run, which holds all settings and writes config.json."""

    def compute(work: Work) -> dict[str, Any]:
        values: dict[str, Any] = config.to_dict()
        write_json(work.folder.path / "config.json", values)
        return values

    table = settings_table(config, "preset", "recipe", *GROUPS, *HOOKS)
    return Stage(SETTINGS, compute, table, files=("config.json",))


def experiment_stages(inputs: Inputs) -> list[Stage]:
    """Return the stages of an experiment in order, from its settings to the test."""

    def made_from(settings: tuple[str, ...], digests: tuple[str, ...]) -> dict[str, Any]:
        return settings_table(inputs.config, *settings) | {name: inputs.digests[name] for name in digests}

    return [
        settings_stage(inputs.config),
        Stage(
            "contexts",
            partial(compute_contexts, inputs),
            made_from(CONTEXT_SETTINGS, CONTEXT_DIGESTS) | {"reads": inputs.config.reads},
            files=("checkpoint/context_block.safetensors", "caches"),
            is_linked=True,
        ),
        Stage(
            "phase2",
            partial(train_phase2, inputs),
            made_from(("model", "phase2", "layer"), (*CONTEXT_DIGESTS, "token frequencies")),
            after=("contexts",),
            files=("checkpoint/layer.safetensors",),
            state="checkpoint/phase2.pt",
            by_all=True,
        ),
        Stage(
            "model",
            partial(save_model, inputs),
            made_from((), ("code of saved models",)),
            after=("phase2",),
            files=("model",),
            is_result=False,
        ),
        Stage(
            "test",
            partial(score_test, inputs),
            made_from((), ("code", "test text")),
            after=("contexts", "phase2"),
        ),
    ]


def compute_contexts(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Train the ContextBlock (Phase 1) and write it and the caches of both streams.

    A model without contexts has no Phase 1, and caches of tokens alone.
    """
    config, ids = inputs.config, inputs.ids
    work.snapshot("data loaded")
    model = inputs.model
    work.snapshot("model built")
    generator = torch.Generator(inputs.device).manual_seed(config.runtime.seed)
    result, last = UNTRAINED, None
    if model.context_block is not None:
        result, last = _train_block(inputs, work, generator)
        block = work.folder.path / "checkpoint" / "context_block.safetensors"
        write_tensors(block, model.context_block.state_dict())
    work.snapshot("phase 1 done")
    with status_line("Computing the contexts of all positions"):
        rank = _write_caches(inputs, work, last, generator)
    phase1 = {**asdict(result), "seconds": round(result.seconds, 3), "effective_rank": rank}
    return {
        "phase1": {**phase1, "context_method": config.phase1.context_method},
        "tokens": {split: len(stream) for split, stream in ids.items()},
        "caches_mib": _sizes_mib(load_caches(work.folder.path / "caches")),
    }


def _train_block(
    inputs: Inputs, work: Work, generator: torch.Generator
) -> tuple[Phase1Result, Tensor | None]:
    """Run Phase 1; also return the contexts of its last iteration, with which parallel passes begin."""
    model, config, loss = inputs.model, inputs.config, inputs.config.plugins.get("loss")
    model.set_phase(1)
    model.train()
    torch.manual_seed(config.runtime.seed)  # a block's own dropout, whatever was drawn before
    result, last = train_context_block(
        model.context_block,
        *distinct_rows(model, phase1_ids(inputs)),
        config.phase1,
        generator,
        loss.build() if loss else None,
        RunLoop(work),
    )
    if loss and result.stop_reason == "untrained":
        raise UserError(f"Phase 1 trains nothing here, so {loss.name} has no effect; leave loss out.")
    model.set_phase(2)
    model.eval()
    return result, last


def phase1_ids(inputs: Inputs) -> Tensor:
    """Return the tokens that Phase 1 trains on: all `[n]`, or even samples of `phase1.max_tokens`."""
    ids, config = inputs.ids["train"][:-1], inputs.config.phase1
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


def _write_caches(
    inputs: Inputs, work: Work, last: Tensor | None, generator: torch.Generator
) -> float | None:
    """Write the caches of both streams; return the effective rank of the validation contexts, if any.

    Args:
        last: the contexts of Phase 1's last iteration, with which parallel passes over its text begin.
    """
    path, model, by_passes = (
        work.folder.path / "caches",
        inputs.model,
        inputs.config.phase1.context_method == "passes",
    )
    rank = None
    for split, ids in inputs.ids.items():
        if model.context_block is not None:
            dtype = torch.float32 if split == "val" else DTYPES[inputs.precision]
            first = last if split == "train" and by_passes else None
            contexts = _stream_contexts(inputs, ids, first, generator)
            shape = (len(ids), inputs.config.model.context_dim)
            write_parts(path / f"{split}_ctx.safetensors", {"contexts": (dtype, shape, contexts)})
        write_parts(path / f"{split}_emb.safetensors", _token_tensors(inputs, ids))
    if (validation := load_caches(path)["val"].contexts) is not None:
        draw = torch.Generator().manual_seed(inputs.config.runtime.seed)
        rank = effective_rank(validation[1:], draw)
    return rank


@torch.no_grad()
def _stream_contexts(
    inputs: Inputs, ids: Tensor, last: Tensor | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Compute the padded contexts of a stream, `[n + 1, context_dim]` in all, part by part."""
    block, config = inputs.model.context_block, inputs.config.phase1
    embeddings, tokens = distinct_rows(inputs.model, ids[:-1])
    projected = block.project_inputs(embeddings)
    if config.context_method == "passes":
        yield _finite(contexts_by_passes(block, projected, tokens, config, generator, last))
        return
    before = projected.new_zeros(inputs.config.model.context_dim)
    yield before[None]
    for part in tokens.split(SCAN_TOKENS):
        contexts = exact_contexts(block, projected, part, config.tolerance, before)
        before = contexts[-1].clone()
        yield _finite(contexts[1:])


def _finite(contexts: Tensor) -> Tensor:
    if not contexts.sum().isfinite():
        raise Diverged(
            "Contexts grow beyond all numbers; bound what the block returns, as a LayerNorm does, or lower "
            "phase1.learning_rate."
        )
    return contexts


def _token_tensors(inputs: Inputs, ids: Tensor) -> dict[str, Any]:
    """Return what a stream's `emb` file holds: token ids and, with the dense layout, their embeddings."""
    tensors: dict[str, Any] = {"ids": (torch.int32, (len(ids),), [ids])}
    if inputs.config.runtime.embedding_cache == "dense" and inputs.model.context_block is not None:
        parts = ids[:-1].split(EMBEDDED_TOKENS)
        rows = (inputs.model.embed(part.to(inputs.device).int()) for part in parts)
        shape = (len(ids) - 1, inputs.config.model.hidden_size)
        tensors["embeddings"] = (torch.float32, shape, rows)
    return tensors


def _sizes_mib(caches: dict[str, Cache]) -> dict[str, float]:
    """Return the MiB that contexts and embeddings (or ids) of each stream take."""
    sizes = dict[str, int]()
    for split, cache in caches.items():
        contexts = 0 if cache.contexts is None else cache.contexts.nbytes
        sizes |= {f"{split}_ctx": contexts, f"{split}_emb": cache.nbytes - contexts}
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def load_streams(inputs: Inputs, path: Path) -> tuple[dict[str, Cache], str]:
    """Load the ContextBlock; return both streams as Phase 2 reads them, and where they lie, in words."""
    load_block(inputs.model, path)
    caches, placement = place_caches(load_caches(path / "caches"), inputs.device)
    print_on_terminal(f"Caches: {placement}")
    return caches, placement


def train_phase2(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Train Phase 2 in all processes, and write the best epoch's weights."""
    config, model, path = inputs.config, inputs.model, work.folder.path
    streams, placement = load_streams(inputs, path)
    work.snapshot("phase 2 prepared")
    train, phase2 = streams["train"], config.phase2
    # Cost of validating one position, relative to training on one.
    scoring = 1.0 if inputs.precision == "bf16" else 0.5

    def tell(seconds: float) -> None:
        seconds *= 1 + scoring * len(streams["val"]) / len(train)
        epochs = phase2.least_epochs, phase2.max_epochs, usual_epochs(config)
        log(f"{len(train) + 1:,} tokens: {epochs_ahead(seconds, *epochs)}.")

    loop = RunLoop(work, path / "checkpoint" / "phase2.pt")
    loop.tell = tell
    torch.manual_seed(config.runtime.seed)  # in each process, and whether Phase 1 was reused or not
    model.init_layer(phase1_ids(inputs), config.phase1)
    result = train_layer(model, train, streams["val"], phase2, config.runtime.seed, inputs.precision, loop)

    def save() -> None:
        weights = path / "checkpoint" / "layer.safetensors"
        buffers = {f"layer.{name}": buffer for name, buffer in model.layer.named_buffers()}
        write_tensors(weights, {**buffers, **model.trained_weights()})
        if config.has_own_parts:
            loaded = inputs.new_model(other_seed=True)
            load_weights(loaded, path)
            refuse_unsaved(model, loaded, streams["val"])

    ranks.on_rank_0(save)
    return {
        "parameters": parameter_counts(model),
        "offsets": model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": provenance(inputs, placement),
    }


@status_line("Saving the model")
def save_model(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Write the model folder for transformers."""
    from .export import save_for_transformers  # imports transformers' models, which take seconds

    load_weights(inputs.model, work.folder.path)
    save_for_transformers(inputs.model, inputs.config, inputs.tokenizer, work.folder.path / "model")
    return {}


@status_line("Scoring the test split")
def score_test(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Score the test split, once.

    Returns:
        `ppl`, `acc` and `tokens`; `conversations`, with the number of predicted tokens and the mean loss in
        nats of each; and `fingerprint`. Empty if there is no token to predict.
    """
    texts, model, device = inputs.texts["test"], inputs.model, inputs.device
    if not len(texts) or len((stream := validation_stream(texts, inputs.tokenizer)).ids) < 2:
        return {}
    load_weights(model, work.folder.path)
    cache = Cache(stream.ids.int().to(device))
    if model.context_block is not None:  # contexts are computed as those of validation
        generator = torch.Generator(device).manual_seed(inputs.config.runtime.seed)
        contexts = torch.cat([*_stream_contexts(inputs, stream.ids, None, generator)])
        cache = Cache(cache.ids, contexts)
    losses, correct = token_scores(model, cache, torch.arange(len(cache)))
    parts = losses.tensor_split((stream.starts[1:] - 1).clamp(min=0).cpu())  # from the second token on
    return {
        "ppl": perplexity(losses.mean().item()),
        "acc": correct.float().mean().item(),
        "tokens": len(stream.ids),
        "conversations": [[len(part), part.mean().item()] for part in parts if len(part)],
        "fingerprint": texts.fingerprint,
    }
