"""The stages of an experiment in order: Phase 1, caches, Phase 2, model, test. What counts is reused.

Rank 0 computes everything but Phase 2, whose batches all processes share.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .. import ranks
from ..data.tokens import validation_stream
from ..errors import UserError
from ..files import remove, write_parts, write_tensors
from ..method.caches import StreamCache
from ..method.contexts import contexts_by_passes, distinct_rows, exact_contexts
from ..method.loop import Diverged
from ..method.memory import mib, snapshot
from ..method.model import ContextKV, project_inputs
from ..method.oacd import UNTRAINED, train_context_block
from ..method.phase2 import train_attention
from ..method.scoring import effective_rank, perplexity, token_scores
from ..plugins.checks import refuse_unsaved
from ..plugins.mixer import MixerModel, as_read
from ..progress import say, stage
from .build import frozen_model, load_block, load_caches, load_weights, parameter_counts, place_caches
from .device import PRECISIONS
from .experiment import Work
from .export import save_for_transformers
from .folder import Stage
from .provenance import provenance
from .saved_epochs import RunLoop

SCAN_TOKENS = 2**18  # of which contexts are computed at a time: 256 MiB
EMBEDDED_TOKENS = 2**13  # whose embeddings are written at a time


@dataclass(frozen=True)
class Prepared:
    """A run whose contexts are computed: the input of Phase 2.

    Attributes:
        caches: `StreamCache`s of "train" and "val".
        placement: where the caches are held, in words.
        record: `phase1`, `memory`, `caches_mib`, `tokens` and `parameters` of the summary.
    """

    model: ContextKV
    tokenizer: PreTrainedTokenizerFast
    caches: dict[str, StreamCache]
    placement: str
    record: dict[str, Any]


def contexts_stages(work: Work) -> tuple[Stage, Stage]:
    """Train the ContextBlock, cache all contexts, and return both stages."""
    folder, config = work.folder, work.config
    key = work.phase1_key()
    phase1, caches = folder.finished("phase1", key) or folder.linked("phase1", key), None
    if phase1:
        key = work.caches_key(phase1)
        caches = folder.finished("caches", key) or folder.linked("caches", key)
    if phase1 and caches:
        work.report(phase1)
        return phase1, caches
    last = None
    generator = torch.Generator(work.device).manual_seed(config.runtime.seed)
    # Parallel passes begin with the contexts of the last iteration, which no file keeps.
    needs_last = config.phase1.context_method == "passes" and phase1 and phase1.metrics
    if phase1 and not needs_last:
        work.report(phase1)
        load_block(work.model, folder.path)
    else:
        phase1, last = _train_block(work, generator)
    with stage("Computing the contexts of all positions"):
        caches = _make_caches(work, phase1, last, generator)
    return phase1, caches


def _train_block(work: Work, generator: torch.Generator) -> tuple[Stage, Tensor | None]:
    """Run Phase 1, which a mixer does not have; return its stage, and the contexts that passes begin with."""
    folder, config = work.folder, work.config
    ids, model = _phase1_ids(work), work.model
    folder.write_metrics()
    loss = config.plugins.get("loss")
    result, last, files, loop = UNTRAINED, None, [], RunLoop(work.record)
    if not isinstance(model, MixerModel):
        model.set_phase(1)
        model.train()
        torch.manual_seed(config.runtime.seed)  # a block's own dropout, whatever was drawn before
        result, last = train_context_block(
            model.context_block,
            *distinct_rows(model, ids),
            config.phase1,
            generator,
            loss.build() if loss else None,
            loop,
        )
        if loss and result.stop_reason == "untrained":
            raise UserError(f"Phase 1 trains nothing here, so {loss.name} has no effect; leave loss out.")
        model.set_phase(2)
        model.eval()
        files = [folder.path / "checkpoint" / "context_block.safetensors"]
        write_tensors(files[0], model.context_block.state_dict())
    summary = {
        "phase1": {**asdict(result), "seconds": round(result.seconds, 3)},
        "memory": [*work.memory, snapshot("phase 1 done", work.device)],
    }
    made = folder.finish("phase1", work.phase1_key(), files, summary, loop.metrics)
    return made, last if config.phase1.context_method == "passes" else None


def _phase1_ids(work: Work) -> Tensor:
    """Return the tokens that Phase 1 trains on: all `[n]`, or even samples of `phase1.max_tokens`."""
    ids, config = work.ids["train"][:-1], work.config.phase1
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


def _make_caches(work: Work, phase1: Stage, last: Tensor | None, generator: torch.Generator) -> Stage:
    """Write the caches of both streams, from the ContextBlock and Phase 1's last contexts, if it has run."""
    folder = work.folder
    caches = folder.path / "caches"
    for split, ids in work.ids.items():
        precise = split == "val" or work.precision == "fp32"
        dtype = torch.float32 if precise else PRECISIONS[work.precision]
        known = last if split == "train" else None
        width = 0 if isinstance(work.model, MixerModel) else work.config.model.context_dim
        contexts = _stream_contexts(work, ids, known, generator) if width else []
        write_parts(caches / f"{split}_ctx.safetensors", {"contexts": (dtype, (len(ids), width), contexts)})
        write_parts(caches / f"{split}_emb.safetensors", _embedded(work, ids))
    made = load_caches(caches)
    rank_generator = torch.Generator().manual_seed(work.config.runtime.seed)
    rank = effective_rank(made["val"].contexts[1:], rank_generator) if width else None
    summary = {
        "phase1": {"effective_rank": rank, "context_method": work.config.phase1.context_method},
        "tokens": {split: len(ids) for split, ids in work.ids.items()},
        "caches_mib": _held_mib(made),
    }
    return folder.finish("caches", work.caches_key(phase1), [caches], summary)


@torch.no_grad()
def _stream_contexts(
    work: Work, ids: Tensor, last: Tensor | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Compute the padded contexts of a stream, `[n + 1, context_dim]` in all, part by part."""
    model, config = work.model, work.config.phase1
    embeddings, tokens = distinct_rows(model, ids[:-1])
    inputs = project_inputs(model.context_block, embeddings)
    if config.context_method == "passes":
        yield _finite(contexts_by_passes(model.context_block, inputs, tokens, config, generator, last))
        return
    before = inputs.new_zeros(work.config.model.context_dim)
    yield before[None]
    for part in tokens.split(SCAN_TOKENS):
        made = exact_contexts(model.context_block, inputs, part, config.tolerance, before)
        before = made[-1].clone()
        yield _finite(made[1:])


def _finite(contexts: Tensor) -> Tensor:
    if not contexts[-1].isfinite().all():  # from where a recurrence overflows, it stays so
        raise Diverged(
            "Contexts grow beyond all numbers; bound what the block returns, as a LayerNorm does, or lower "
            "phase1.learning_rate."
        )
    return contexts


def _embedded(work: Work, ids: Tensor) -> dict[str, Any]:
    """Return what a stream's `emb` file holds: token ids and, with the dense layout, their embeddings."""
    held: dict[str, Any] = {"ids": (torch.int32, (len(ids),), [ids])}
    if work.config.runtime.embedding_cache == "dense":
        rows = (work.model.embed(part.to(work.device).int()) for part in ids[:-1].split(EMBEDDED_TOKENS))
        held["embeddings"] = (torch.float32, (len(ids) - 1, work.config.model.hidden_size), rows)
    return held


def _held_mib(caches: dict[str, StreamCache]) -> dict[str, float]:
    """Return the MiB that contexts and embeddings (or ids) of each stream hold."""
    sizes = {}
    for split, cache in caches.items():
        sizes[f"{split}_ctx"] = cache.contexts.nbytes
        sizes[f"{split}_emb"] = cache.nbytes - cache.contexts.nbytes
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def load_prepared(work: Work, phase1: Stage, caches: Stage) -> Prepared:
    """Load the ContextBlock and the caches, as Phase 2 reads them."""
    load_block(work.model, work.folder.path)
    loaded = load_caches(work.folder.path / "caches")
    streams = {split: as_read(work.model, cache, split == "train") for split, cache in loaded.items()}
    placed, placement = place_caches(streams, work.device)
    say(f"Caches: {placement}")
    record = context_summary(phase1, caches)
    record["memory"] = [*record["memory"], snapshot("phase 2 prepared", work.device)]
    record["parameters"] = parameter_counts(work.model)
    return Prepared(work.model, work.tokenizer, placed, placement, record)


def context_summary(phase1: Stage, caches: Stage) -> dict[str, Any]:
    """Return `tokens`, `phase1`, `memory` and `caches_mib` of the summary."""
    both = {**phase1.result["phase1"], **caches.result["phase1"]}
    return {**phase1.result, **caches.result, "phase1": both}


def phase2_stage(work: Work, phase1: Stage, caches: Stage) -> Stage:
    """Train Phase 2, and write the best epoch's weights to the folder."""
    key, saved = work.phase2_key(phase1), work.folder.path / "checkpoint" / "phase2.safetensors"
    if done := ranks.on_rank_0(lambda: work.folder.finished("phase2", key)):
        work.report(done)
    else:
        done = _train_attention(work, phase1, caches, RunLoop(work.record, saved, key))
    ranks.on_rank_0(lambda: remove(saved))  # after the record, also that of a run that was killed between
    return done


def _train_attention(work: Work, phase1: Stage, caches: Stage, loop: RunLoop) -> Stage:
    """Run Phase 2, in all processes, and return its stage; `loop` has its key."""
    folder, config = work.folder, work.config
    prepared, model = load_prepared(work, phase1, caches), work.model
    ranks.on_rank_0(lambda: folder.write_metrics(phase1))
    _init_attention(work)
    result = train_attention(
        model,
        prepared.caches["train"],
        prepared.caches["val"],
        config.phase2,
        config.runtime.seed,
        loop,
    )
    summary = {
        "parameters": prepared.record["parameters"],
        "offsets": None if isinstance(model, MixerModel) else model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": provenance(work, prepared.placement),
        "memory": prepared.record["memory"][-1:],
    }

    def finish() -> Stage:
        weights = folder.path / "checkpoint" / "attention.safetensors"
        buffers = {f"attention.{name}": each for name, each in model.attention.named_buffers()}
        write_tensors(weights, {**buffers, **model.trained_weights()})
        if config.has_own_parts:
            again = frozen_model(config, work.table.weight, work.log_unigram).to(work.device)
            load_weights(again, folder.path)
            refuse_unsaved(model, again, prepared.caches["val"])
        return folder.finish("phase2", loop.key, [weights], summary, result.epochs)

    return ranks.on_rank_0(finish)


def _init_attention(work: Work) -> None:
    """Let a plug-in initialise Phase 2's weights from the trained ContextBlock or the tokens."""
    attention: Any = work.model.attention
    torch.manual_seed(work.config.runtime.seed)  # in each process, and whether Phase 1 was reused or not
    if hasattr(attention, "init_from_block"):
        attention.init_from_block(work.model.context_block)
    elif isinstance(work.model, MixerModel) and hasattr(attention, "init_weights"):
        attention.init_weights(*distinct_rows(work.model, _phase1_ids(work)), work.config.phase1)


def model_stage(work: Work, phase2: Stage) -> Stage:
    """Write the model folder for transformers."""
    folder, key = work.folder, work.model_key(phase2)
    if done := folder.finished("model", key):
        return done
    with stage("Saving the model"):
        load_weights(work.model, folder.path)
        files = save_for_transformers(work.model, work.config, work.tokenizer, folder.path / "model")
    return folder.finish("model", key, files)


def test_stage(work: Work, caches: Stage, phase2: Stage) -> Stage:
    """Score the test split, once.

    The result has `ppl`, `acc` and `tokens`; `conversations`, of each the number of predicted tokens and
    their mean loss in nats; and `fingerprint`. It is empty if there is no token to predict.
    """
    folder, key = work.folder, work.test_key(caches, phase2)
    if done := folder.finished("test", key):
        return done
    texts, found = work.texts["test"], {}
    with stage("Scoring the test split"):
        if len(texts) and len((stream := validation_stream(texts, work.tokenizer)).ids) > 1:
            load_weights(work.model, folder.path)
            losses, correct = test_scores(work, stream.ids)
            # The losses start at the stream's second token.
            parts = losses.tensor_split((stream.starts[1:] - 1).clamp(min=0).cpu())
            found = {
                "ppl": perplexity(losses.mean().item()),
                "acc": correct.float().mean().item(),
                "tokens": len(stream.ids),
                "conversations": [[len(part), part.mean().item()] for part in parts if len(part)],
                "fingerprint": texts.fingerprint,
            }
    return folder.finish("test", key, (), found)


@torch.no_grad()
def test_scores(work: Work, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `token_scores` of a text whose contexts are computed as those of validation."""
    model, generator = work.model, torch.Generator(work.device).manual_seed(work.config.runtime.seed)
    if isinstance(model, MixerModel):
        contexts = torch.empty(len(ids), 0, device=work.device)
    else:
        contexts = torch.cat([*_stream_contexts(work, ids, None, generator)])
    cache = as_read(model, StreamCache(ids.int().to(work.device), contexts), trained=False)
    return token_scores(model, cache, torch.arange(len(cache)))
