"""Phase 1, and the contexts of a stream: computed in memory, or as an entry of the store.

The entry `contexts` has the trained block and both streams. Runs that differ only in Phase 2 share it.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import mib, read_tensors, write_parts, write_tensors
from ..method.block import project_inputs
from ..method.callback import Diverged
from ..method.config import Phase1Config
from ..method.contexts import contexts_by_passes, distinct_rows, exact_contexts
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..method.oacd import Phase1Result, train_context_block
from ..method.objective import asked_tensors
from ..method.scoring import effective_rank
from ..method.streams import DTYPES, Stream
from ..progress import log, status_line
from ..store import Work, entry
from .callback import RunCallback
from .plan import Plan

BLOCK = "block.safetensors"
STREAMS = ("train", "val")
FILES = (BLOCK, *(f"{split}_{part}.safetensors" for split in STREAMS for part in ("ctx", "emb")))
SCAN_TOKENS = 2**18  # tokens per chunk of contexts (256 MiB)
COLLAPSED = 2  # contexts with a smaller effective rank carry next to nothing
EMBEDDED_TOKENS = 2**13  # tokens per chunk of embeddings


def contexts_entry(plan: Plan, table: str | None, listen: Any = lambda metric: None) -> tuple[Path, Any]:
    """Return the folder and the record of a run's contexts in the store, which are computed first if missing.

    Args:
        table: the digest of the run's token vectors; None if its token table is not computed from text.
        listen: called with the metrics of Phase 1.
    """
    uses = {} if table is None else {"table": table}
    return entry(
        "contexts", plan.inputs["contexts"], lambda work: compute_contexts(plan, work), FILES, uses, listen
    )


def compute_contexts(plan: Plan, work: Work) -> dict[str, Any]:
    """Train the ContextBlock (Phase 1), and write the block and both streams.

    Returns:
        `phase1`, `tokens` and `caches_mib` of the summary, and `objective`, the number of weights in the
        user's own loss, which are not saved.
    """
    config, ids = plan.config, plan.ids
    work.memory.append(snapshot("data loaded", plan.device))
    model = plan.model
    work.memory.append(snapshot("model built", plan.device))
    generator = torch.Generator(plan.device).manual_seed(config.runtime.seed)
    result, trained_on, loss_weights = _train_block(plan, work, generator)
    write_tensors(work.folder / BLOCK, model.context_block.state_dict())
    work.memory.append(snapshot("phase 1 done", plan.device))
    with status_line("Computing the contexts of all positions"):
        _write_streams(plan, work.folder, trained_on, generator)
    streams = load_streams(work.folder)
    rank_generator = torch.Generator().manual_seed(config.runtime.seed)
    validation = streams["val"].contexts
    assert validation is not None
    rank = effective_rank(validation[1:], rank_generator)
    phase1 = {**asdict(result), "seconds": round(result.seconds, 3), "effective_rank": rank}
    return {
        "phase1": {**phase1, "context_method": config.phase1.context_method},
        "tokens": {split: len(stream) for split, stream in ids.items()},
        "caches_mib": sizes_mib(streams),
        "objective": loss_weights,
    }


def _train_block(
    plan: Plan, work: Work, generator: torch.Generator
) -> tuple[Phase1Result, Tensor | None, int]:
    """Train the ContextBlock (Phase 1).

    Returns:
        the result; the contexts of the last iteration, from which parallel passes start; and the number of
        weights in the user's own loss.
    """
    model, config, loss = plan.model, plan.config, plan.config.plugins.get("loss")
    model.set_phase(1)
    model.train()
    # Reset the seed, so that earlier random draws do not affect the weights of the user's loss or the block's
    # dropout.
    torch.manual_seed(config.runtime.seed)
    objective: Any = loss.make_loss(model) if loss else None
    reads_ahead = loss and "next_embeddings" in asked_tensors(objective)
    ids = plan.ids["train"]
    embeddings, tokens = distinct_rows(model, phase1_ids(ids, config.phase1))
    result, trained_on = train_context_block(
        model.context_block,
        embeddings,
        tokens,
        config.model.context_dim,
        config.phase1,
        generator,
        loss=objective,
        callback=RunCallback(work),
        next_tokens=distinct_rows(model, phase1_ids(ids, config.phase1, ahead=1)) if reads_ahead else None,
    )
    width = config.model.context_dim
    if work.metrics and (rank := width * work.metrics[-1]["effective_rank"]) < COLLAPSED:
        log(f"Phase 1: the contexts have collapsed: of {width} dimensions, they use about {rank:.1f}.")
    if loss and result.stop_reason == "untrained":
        raise UserError(f"Phase 1 trains nothing here, so {loss.name} has no effect; leave loss out.")
    model.set_phase(2)
    model.eval()
    weights = objective.parameters() if isinstance(objective, nn.Module) else ()
    return result, trained_on, sum(weight.numel() for weight in weights)


def phase1_ids(stream: Tensor, config: Phase1Config, ahead: int = 0) -> Tensor:
    """Return the tokens that Phase 1 trains on, int `[n]`, from a stream `[n + 1]`.

    These are all tokens except the last. If there are more than `max_tokens` and the method is not `passes`,
    only evenly spaced chunks of the stream are used. With `ahead=1`, return the token that follows each of
    these tokens in the stream.
    """
    ids = stream[ahead : len(stream) - 1 + ahead]
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


def _write_streams(plan: Plan, folder: Path, trained_on: Tensor | None, generator: torch.Generator) -> None:
    """Write the contexts and the token ids (or embeddings) of both streams.

    Args:
        trained_on: the contexts of Phase 1's last iteration, from which parallel passes over the same text
            start.
    """
    config, by_passes = plan.config, plan.config.phase1.context_method == "passes"
    for split, ids in plan.ids.items():
        dtype = torch.float32 if split == "val" else DTYPES[plan.precision]
        start = trained_on if split == "train" and by_passes else None
        contexts = _stream_contexts(plan.model, config.phase1, ids, generator, start)
        shape = (len(ids), config.model.context_dim)
        write_parts(folder / f"{split}_ctx.safetensors", {"contexts": (dtype, shape, contexts)})
        tensors: dict[str, Any] = {"ids": (torch.int32, (len(ids),), [ids])}
        if config.runtime.embedding_cache == "dense":
            parts = ids[:-1].split(EMBEDDED_TOKENS)
            rows = (plan.model.embed(part.to(plan.device).int()) for part in parts)
            tensors["embeddings"] = (torch.float32, (len(ids) - 1, config.model.hidden_size), rows)
        write_parts(folder / f"{split}_emb.safetensors", tensors)


def load_streams(folder: Path) -> dict[str, Stream]:
    """Memory-map both streams of an entry, "train" and "val", on the CPU."""
    return {
        split: Stream(
            **read_tensors(folder / f"{split}_emb.safetensors"),
            **read_tensors(folder / f"{split}_ctx.safetensors"),
        )
        for split in STREAMS
    }


def sizes_mib(streams: dict[str, Stream]) -> dict[str, float]:
    """Return the size in MiB of each stream's contexts and embeddings (or token ids)."""
    sizes = dict[str, int]()
    for split, stream in streams.items():
        contexts = 0 if stream.contexts is None else stream.contexts.nbytes
        sizes |= {f"{split}_ctx": contexts, f"{split}_emb": stream.nbytes - contexts}
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def read_stream(model: ContextKV, config: Phase1Config, ids: Tensor, seed: int = 0) -> Stream:
    """Compute a stream in memory. With the method `exact`, the result equals the stored stream.

    Args:
        ids: the tokens, integers `[n + 1]`.
        seed: random seed for the contexts from which parallel passes start.
    """
    tokens = ids.int().to(model.device)
    if not model.has_contexts:
        return Stream(tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    return Stream(tokens, torch.cat([*_stream_contexts(model, config, tokens, generator)]))


@torch.no_grad()
def _stream_contexts(
    model: ContextKV,
    config: Phase1Config,
    ids: Tensor,
    generator: torch.Generator,
    trained_on: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the contexts of a stream in parts, `[n + 1, context_dim]` in total. Row 0 precedes all tokens."""
    block, width = model.context_block, model.config.context_dim
    embeddings, tokens = distinct_rows(model, ids[:-1])
    projected = project_inputs(block, embeddings)
    if config.context_method == "passes":
        yield _finite(contexts_by_passes(block, projected, tokens, width, config, generator, trained_on))
        return
    before = embeddings.new_zeros(width)
    yield before[None]
    for part in tokens.split(SCAN_TOKENS):
        contexts = exact_contexts(block, projected, part, before, config.tolerance)
        before = contexts[-1].clone()
        yield _finite(contexts[1:])


def _finite(contexts: Tensor) -> Tensor:
    if not contexts.sum().isfinite():
        raise Diverged(
            "The contexts overflow; bound what the block returns, as a LayerNorm does, or lower "
            "phase1.learning_rate."
        )
    return contexts
