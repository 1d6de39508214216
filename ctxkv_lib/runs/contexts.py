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
from .plugins import built
from .provenance import PRECISIONS
from .records import Record, SummaryPart
from .rows import MixerModel
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
    return phase1, caches


def context_summary(phase1: Record, caches: Record) -> SummaryPart:
    """Return `tokens`, `phase1`, `memory` and `caches_mib` of the summary."""
    summary = {**phase1.result, **caches.result}
    return {**summary, "phase1": {**phase1.result["phase1"], **caches.result["phase1"]}}


def sampled_ids(work: Work) -> Tensor:
    """Return the tokens that Phase 1 trains on: all, or even samples of them (`phase1.max_tokens`)."""
    ids, config = work.ids["train"][:-1], work.config.phase1
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


def _make_contexts(work: Work, phase1: Record | None) -> tuple[Record, Record]:
    folder, trained_on = work.folder, None
    generator = torch.Generator(work.device).manual_seed(work.config.runtime.seed)
    if phase1:
        folder.load_block(work.model)
    else:
        phase1, trained_on = _train_block(work, generator)
    made = _make_caches(work, trained_on, generator)
    return phase1, folder.finish("caches", work.caches_key(phase1), [folder.caches], made)


@memory_advice("Phase 1", "lower phase1.batch_size, or use fewer conversations with --samples")
def _train_block(work: Work, generator: torch.Generator) -> tuple[Record, Tensor | None]:
    """Run Phase 1, which a mixer does not have; return the last iteration's contexts, too."""
    key, folder, model = work.phase1_key(), work.folder, work.model
    folder.keep_metrics()
    files: list[Path] = []
    result, ids, contexts = UNTRAINED, sampled_ids(work), None
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
        result, contexts = train_context_block(
            model.context_block,
            *distinct_rows(model, ids),
            work.config.phase1,
            generator,
            built(loss) if loss else None,
            work.loop(),
        )
        model.set_phase(2)
        model.eval()
        files = [folder.context_block]
        write_tensors(files[0], model.context_block.state_dict())
    summary = {
        "phase1": {**asdict(result), "seconds": round(result.seconds, 3)},
        "memory": [*work.memory, snapshot("phase 1 done", work.device)],
    }
    return folder.finish("phase1", key, files, summary, [*folder.metric_lines()]), contexts


def _make_caches(work: Work, trained_on: Tensor | None, generator: torch.Generator) -> SummaryPart:
    """Write the caches, from the ContextBlock and, if it was trained just now, Phase 1's last contexts."""
    known = {"train": trained_on, "val": None}
    with stage("Computing the contexts of all positions"):
        made = {split: _make_cache(work, split, known[split], generator) for split in work.ids}
    rank_generator, contexts = torch.Generator().manual_seed(work.config.runtime.seed), made["val"].contexts
    return {
        "phase1": {
            "effective_rank": effective_rank(contexts[1:], rank_generator) if contexts.shape[1] else None,
            "context_method": work.config.phase1.context_method,
        },
        "tokens": {split: len(ids) for split, ids in work.ids.items()},
        "precision": work.precision,
        "caches_mib": held_mib(made["train"], made["val"]),
    }


def _make_cache(work: Work, split: str, trained_on: Tensor | None, generator: torch.Generator) -> StreamCache:
    """Compute a stream's contexts, and write its cache."""
    config, model = work.config, work.model
    ids = work.ids[split].to(model.device, torch.int32)
    contexts = torch.empty(len(ids), 0, device=model.device)
    if not isinstance(model, MixerModel):
        embeddings, tokens = distinct_rows(model, ids[:-1])
        inputs = project_inputs(model.context_block, embeddings)
        block = model.context_block
        contexts = stream_contexts(block, inputs, tokens, config.phase1, generator, trained_on)
    if not contexts[-1].isfinite().all():  # from where a recurrence overflows, it stays so
        raise Diverged(
            f"The contexts of the {split} stream grow beyond all numbers; bound what the block returns, as a "
            "LayerNorm does, or lower phase1.learning_rate."
        )
    contexts = contexts.to(PRECISIONS[work.precision]) if split == "train" else contexts
    cache = StreamCache(ids, contexts)
    if config.runtime.embedding_cache == "dense":
        cache = replace(cache, embeddings=torch.cat([model.embed(part) for part in ids[:-1].split(8192)]))
    save_cache(work.folder.caches, split, cache)
    return cache
