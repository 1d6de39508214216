"""The first two stages: Phase 1, which trains the ContextBlock, and the caches of all contexts."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import ranks
from ..errors import Diverged, UserError, memory_advice
from ..files import write_tensors
from ..method.caches import StreamCache
from ..method.contexts import distinct_rows, stream_contexts
from ..method.evaluation import effective_rank
from ..method.memory import snapshot
from ..method.model import project_inputs
from ..method.oacd import UNTRAINED, train_context_block
from ..progress import notice, stage
from .caches import held_mib, save_cache
from .long_run import Checkpoint, forget
from .plugins import built
from .provenance import PRECISIONS
from .records import Record, SummaryPart
from .rows import MixerModel
from .scratch import scratch
from .settings import BEGINNING_TOKENS
from .streamed import read_once, sampled
from .work import Work


@memory_advice("Preparing the model and the caches", "use fewer conversations, or a smaller model")
def contexts_of(work: Work) -> tuple[Record, Record]:
    """Train the ContextBlock, cache all contexts, and return the records of both stages.

    Only rank 0 computes them.
    """
    folder = work.folder
    phase1 = folder.shared("phase1", work.phase1_key())
    caches = phase1 and folder.shared("caches", work.caches_key(phase1))
    by_passes = work.config.phase1.context_method == "passes" and phase1 and phase1.metrics
    if phase1 and not caches and by_passes:
        notice("phase1.context_method=passes: caches come from Phase 1's last iteration, so it is repeated.")
        phase1 = None
    if phase1:
        work.report(phase1)
    if not (phase1 and caches):
        phase1, caches = ranks.on_rank_0(lambda: _make_contexts(work, phase1))
    forget(folder.phase1_checkpoint)
    return phase1, caches


def context_summary(phase1: Record, caches: Record) -> SummaryPart:
    """Return `tokens`, `phase1`, `memory` and `caches_mib` of the summary."""
    summary = {**phase1.result, **caches.result}
    return {**summary, "phase1": {**phase1.result["phase1"], **caches.result["phase1"]}}


def sampled_ids(work: Work) -> Tensor:
    """Return the training tokens of Phase 1."""
    return sampled(work.ids["train"][:-1], work.config.phase1)


def _make_contexts(work: Work, phase1: Record | None) -> tuple[Record, Record]:
    folder, rows = work.folder, {split: len(ids) for split, ids in work.ids.items()}
    generator = torch.Generator(work.device).manual_seed(work.config.runtime.seed)
    if phase1:
        folder.load_block(work.model)
    if work.config.is_streamed(rows["train"]):  # the caches do not need Phase 1's contexts
        if getattr(work.model.attention, "chunk", 1) > 1:
            raise UserError("attention.chunk needs contexts that are kept; set runtime.context_cache=cached.")
        phase1 = phase1 or _train_block(
            work, _room(work, len(sampled_ids(work)) + 1, spare_memory=True), generator
        )
        rows["train"] = min(rows["train"], BEGINNING_TOKENS + 1)
    contexts = {split: _room(work, count) for split, count in rows.items()}
    phase1 = phase1 or _train_block(work, contexts["train"], generator)
    made = _make_caches(work, contexts, bool(phase1.metrics), generator)
    return phase1, folder.finish("caches", work.caches_key(phase1), [folder.caches], made)


def _room(work: Work, count: int, dtype: torch.dtype = torch.float32, spare_memory: bool = False) -> Tensor:
    """Allocate `count` contexts; their width is 0 for a mixer."""
    width = 0 if isinstance(work.model, MixerModel) else work.config.model.context_dim
    return scratch((count, width), dtype, work.device, work.folder.caches, spare_memory)


@memory_advice("Phase 1", "lower phase1.batch_size, or use fewer conversations with --samples")
def _train_block(work: Work, contexts: Tensor, generator: torch.Generator) -> Record:
    """Run Phase 1, which a mixer does not have; leave the last iteration's contexts in `contexts`."""
    key, folder, model = work.phase1_key(), work.folder, work.model
    folder.keep_metrics()
    files: list[Path] = []
    result, ids = UNTRAINED, sampled_ids(work)
    if not isinstance(model, MixerModel):
        loss = work.config.plugins.get("loss")
        trains = any(True for _ in model.context_block.parameters()) and work.config.phase1.max_iterations
        if loss and not trains:
            raise UserError(
                f"Phase 1 trains nothing here, so that {loss.name} has no effect; leave loss out."
            )
        model.set_phase(1)
        model.train()
        torch.manual_seed(work.config.runtime.seed)  # a block's own dropout, whatever was drawn before
        hooks = work.loop("Phase 1", Checkpoint(folder.phase1_checkpoint, key))
        result = train_context_block(
            model.context_block,
            *distinct_rows(model, ids),
            work.config.phase1,
            contexts[: len(ids) + 1],
            generator,
            built(loss) if loss else None,
            hooks,
        )
        model.set_phase(2)
        model.eval()
        files = [folder.context_block]
        write_tensors(files[0], model.context_block.state_dict())
    summary = {
        "phase1": {**asdict(result), "seconds": round(result.seconds, 3)},
        "memory": [*work.memory, snapshot("phase 1 done", work.device)],
    }
    return folder.finish("phase1", key, files, summary, [*folder.metric_lines()])


def _make_caches(
    work: Work, contexts: dict[str, Tensor], trained: bool, generator: torch.Generator
) -> SummaryPart:
    """Write the caches, from the ContextBlock and, if it was `trained`, Phase 1's last `contexts`."""
    with stage("Computing the contexts of all positions"):
        made = {split: _make_cache(work, split, contexts[split], trained, generator) for split in work.ids}
    errors = [error for *_, error in made.values() if error is not None]
    rank_generator = torch.Generator().manual_seed(work.config.runtime.seed)
    width = contexts["val"].shape[1]
    return {
        "phase1": {
            "effective_rank": effective_rank(contexts["val"][1:], rank_generator) if width else None,
            "context_method": work.config.phase1.context_method,
            "contexts_max_error": max(errors, default=None),
        },
        "tokens": {split: len(ids) for split, ids in work.ids.items()},
        "precision": work.precision,
        "caches_mib": held_mib(made["train"][0], made["val"][0], made["train"][1]),
    }


def _make_cache(
    work: Work, split: str, contexts: Tensor, trained: bool, generator: torch.Generator
) -> tuple[StreamCache, Tensor | None, float | None]:
    """Compute a stream's contexts, in place, and write its cache.

    Returns:
        the cache; the contexts that continue a streamed stream; the largest error of exact contexts.
    """
    config, model, ids = work.config, work.model, work.ids[split]
    training, starts, error = split == "train", None, None
    if training and config.is_streamed(len(ids)):
        starts, error = read_once(model, ids, config.phase1.tolerance, contexts)
    else:
        ids = ids.to(model.device, torch.int32)
        if contexts.shape[1]:
            embeddings, tokens = distinct_rows(model, ids[:-1])
            inputs = project_inputs(model.context_block, embeddings)
            known = training and trained
            error = stream_contexts(
                model.context_block, inputs, tokens, config.phase1, contexts, known, generator
            )
    if not contexts[-1].isfinite().all():  # from where a recurrence overflows, it stays so
        raise Diverged(
            f"The contexts of the {split} stream grow beyond all numbers; bound what the block returns, as a "
            "LayerNorm does, or lower phase1.learning_rate."
        )
    dtype = PRECISIONS[work.precision]
    if training and dtype != contexts.dtype:
        contexts = _room(work, len(contexts), dtype).copy_(contexts)
    cache = StreamCache(ids, contexts)
    if config.runtime.embedding_cache == "dense":
        cache = replace(cache, embeddings=torch.cat([model.embed(part) for part in ids[:-1].split(8192)]))
    save_cache(work.folder.caches, split, cache, starts)
    return cache, starts, error
