"""The stages of an experiment in order: Phase 1, caches, Phase 2, model, test. What counts is reused.

Rank 0 computes everything but Phase 2, whose batches all processes share (see `ranks`). `keys` says when a
stage counts, `saved_epochs` what a kill leaves of Phase 2, `folder` which files there are.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..data.tokens import validation_stream
from ..errors import UserError
from ..files import remove, write_parts, write_tensors
from ..method.caches import DTYPES, Cache
from ..method.contexts import contexts_by_passes, distinct_rows, exact_contexts
from ..method.loop import Diverged
from ..method.memory import mib, snapshot
from ..method.oacd import UNTRAINED, train_context_block
from ..method.phase2 import train_layer
from ..method.scoring import effective_rank, perplexity, token_scores
from ..plugins.checks import refuse_unsaved
from ..progress import epochs_ahead, notice, say, stage
from .build import load_block, load_caches, load_weights, parameter_counts, place_caches
from .experiment import Experiment
from .export import save_for_transformers
from .folder import Stage
from .provenance import provenance
from .saved_epochs import RunLoop

SCAN_TOKENS = 2**18  # of which contexts are computed at a time: 256 MiB
EMBEDDED_TOKENS = 2**13  # whose embeddings are written at a time


def contexts_stages(experiment: Experiment) -> None:
    """Finish Phase 1 and the caches on rank 0; all processes then know the stages."""
    experiment.folder.stages = ranks.on_rank_0(lambda: _contexts_stages(experiment))


def _contexts_stages(experiment: Experiment) -> dict[str, Stage]:
    recorded = experiment.folder.stages.get("phase1")
    phase1 = experiment.finished("phase1", linked=True)
    caches = phase1 and experiment.finished("caches", linked=True)
    generator = torch.Generator(experiment.device).manual_seed(experiment.config.runtime.seed)
    by_passes = experiment.config.phase1.context_method == "passes"
    # Parallel passes begin with the contexts of Phase 1's last iteration, which no file has.
    needs_last = by_passes and phase1 and phase1.metrics and not caches
    last = None
    if phase1 and not needs_last:
        if phase1 is recorded and phase1.metrics:  # else it was taken from another run, or trains nothing
            notice("Phase 1 finished: reused.")
        experiment.replay(phase1)
    else:
        if phase1:
            notice("phase1: trained again, since parallel passes begin with its last contexts.")
        last = _train_block(experiment, generator)
    if not caches:
        load_block(experiment.model, experiment.folder.path)
        with stage("Computing the contexts of all positions"):
            _make_caches(experiment, last if by_passes else None, generator)
    return experiment.folder.stages


def _train_block(experiment: Experiment, generator: torch.Generator) -> Tensor | None:
    """Run Phase 1, if the layer reads contexts; return the last iteration's contexts."""
    folder, config = experiment.folder, experiment.config
    ids, model = _phase1_ids(experiment), experiment.model
    folder.write_metrics([])
    result, last, files, loop = UNTRAINED, None, [], RunLoop(experiment.record)
    if model.context_block is not None:
        loss = config.plugins.get("loss")
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
        "memory": [*experiment.memory, snapshot("phase 1 done", experiment.device)],
    }
    folder.finish("phase1", experiment.key("phase1"), files, summary, loop.metrics)
    return last


def _phase1_ids(experiment: Experiment) -> Tensor:
    """Return the tokens that Phase 1 trains on: all `[n]`, or even samples of `phase1.max_tokens`."""
    ids, config = experiment.ids["train"][:-1], experiment.config.phase1
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


def _make_caches(experiment: Experiment, last: Tensor | None, generator: torch.Generator) -> None:
    """Write the caches of both streams; `last` are Phase 1's last contexts, with which passes begin."""
    folder, model = experiment.folder, experiment.model
    path = folder.path / "caches"
    for split, ids in experiment.ids.items():
        if model.context_block is not None:
            dtype = torch.float32 if split == "val" else DTYPES[experiment.precision]
            contexts = _stream_contexts(experiment, ids, last if split == "train" else None, generator)
            shape = (len(ids), experiment.config.model.context_dim)
            write_parts(path / f"{split}_ctx.safetensors", {"contexts": (dtype, shape, contexts)})
        write_parts(path / f"{split}_emb.safetensors", _token_tensors(experiment, ids))
    caches, rank = load_caches(path), None
    if (validation := caches["val"].contexts) is not None:
        draw = torch.Generator().manual_seed(experiment.config.runtime.seed)
        rank = effective_rank(validation[1:], draw)
    summary = {
        "phase1": {"effective_rank": rank, "context_method": experiment.config.phase1.context_method},
        "tokens": {split: len(ids) for split, ids in experiment.ids.items()},
        "caches_mib": _sizes_mib(caches),
    }
    folder.finish("caches", experiment.key("caches"), [path], summary)


@torch.no_grad()
def _stream_contexts(
    experiment: Experiment, ids: Tensor, last: Tensor | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Compute the padded contexts of a stream, `[n + 1, context_dim]` in all, part by part."""
    model, config = experiment.model, experiment.config.phase1
    embeddings, tokens = distinct_rows(model, ids[:-1])
    inputs = model.context_block.project_inputs(embeddings)
    if config.context_method == "passes":
        yield _finite(contexts_by_passes(model.context_block, inputs, tokens, config, generator, last))
        return
    before = inputs.new_zeros(experiment.config.model.context_dim)
    yield before[None]
    for part in tokens.split(SCAN_TOKENS):
        contexts = exact_contexts(model.context_block, inputs, part, config.tolerance, before)
        before = contexts[-1].clone()
        yield _finite(contexts[1:])


def _finite(contexts: Tensor) -> Tensor:
    if not contexts.sum().isfinite():
        raise Diverged(
            "Contexts grow beyond all numbers; bound what the block returns, as a LayerNorm does, or lower "
            "phase1.learning_rate."
        )
    return contexts


def _token_tensors(experiment: Experiment, ids: Tensor) -> dict[str, Any]:
    """Return what a stream's `emb` file holds: token ids and, with the dense layout, their embeddings."""
    tensors: dict[str, Any] = {"ids": (torch.int32, (len(ids),), [ids])}
    if experiment.config.runtime.embedding_cache == "dense" and experiment.model.context_block is not None:
        parts = ids[:-1].split(EMBEDDED_TOKENS)
        rows = (experiment.model.embed(part.to(experiment.device).int()) for part in parts)
        shape = (len(ids) - 1, experiment.config.model.hidden_size)
        tensors["embeddings"] = (torch.float32, shape, rows)
    return tensors


def _sizes_mib(caches: dict[str, Cache]) -> dict[str, float]:
    """Return the MiB that contexts and embeddings (or ids) of each stream take."""
    sizes = dict[str, int]()
    for split, cache in caches.items():
        contexts = 0 if cache.contexts is None else cache.contexts.nbytes
        sizes |= {f"{split}_ctx": contexts, f"{split}_emb": cache.nbytes - contexts}
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def load_streams(experiment: Experiment) -> tuple[dict[str, Cache], str]:
    """Load the ContextBlock; return both streams as Phase 2 reads them, and where they are, in words."""
    load_block(experiment.model, experiment.folder.path)
    caches, placement = place_caches(load_caches(experiment.folder.path / "caches"), experiment.device)
    say(f"Caches: {placement}")
    return caches, placement


def phase2_stage(experiment: Experiment) -> None:
    """Train Phase 2, and write the best epoch's weights to the folder."""
    saved = experiment.folder.path / "checkpoint" / "phase2.safetensors"
    if finished := ranks.on_rank_0(lambda: experiment.finished("phase2")):
        notice("Phase 2 finished: reused.")
        experiment.replay(finished)
    else:
        _train_layer(experiment, RunLoop(experiment.record, saved, experiment.key("phase2")))
    ranks.on_rank_0(lambda: remove(saved))  # after the record, also that of a run that was killed between


def _train_layer(experiment: Experiment, loop: RunLoop) -> None:
    """Run Phase 2, in all processes; `loop` has its key."""
    folder, config, model = experiment.folder, experiment.config, experiment.model
    streams, placement = load_streams(experiment)
    prepared = snapshot("phase 2 prepared", experiment.device)
    ranks.on_rank_0(lambda: folder.write_metrics(["phase1"]))
    train, phase2 = streams["train"], config.phase2
    scoring = 1.0 if experiment.precision == "bf16" else 0.5  # time of a position against one of training

    def tell(seconds: float) -> None:
        seconds *= 1 + scoring * len(streams["val"]) / len(train)
        notice(f"{len(train) + 1:,} tokens: {epochs_ahead(seconds, phase2.least_epochs, phase2.max_epochs)}.")

    loop.tell = tell
    torch.manual_seed(config.runtime.seed)  # in each process, and whether Phase 1 was reused or not
    model.init_layer(_phase1_ids(experiment), config.phase1)
    result = train_layer(
        model,
        train,
        streams["val"],
        config.phase2,
        config.runtime.seed,
        experiment.precision,
        loop,
    )
    summary = {
        "parameters": parameter_counts(model),
        "offsets": model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": provenance(experiment, placement),
        "memory": [prepared],
    }

    def finish() -> None:
        weights = folder.path / "checkpoint" / "layer.safetensors"
        buffers = {f"layer.{name}": buffer for name, buffer in model.layer.named_buffers()}
        write_tensors(weights, {**buffers, **model.trained_weights()})
        if config.has_own_parts:
            loaded = experiment.new_model(other_seed=True)
            load_weights(loaded, folder.path)
            refuse_unsaved(model, loaded, streams["val"])
        folder.finish("phase2", loop.key, [weights], summary, loop.metrics)

    ranks.on_rank_0(finish)


def model_stage(experiment: Experiment) -> None:
    """Write the model folder for transformers."""
    folder = experiment.folder
    if experiment.finished("model"):
        return
    with stage("Saving the model"):
        load_weights(experiment.model, folder.path)
        files = save_for_transformers(
            experiment.model, experiment.config, experiment.tokenizer, folder.path / "model"
        )
    folder.finish("model", experiment.key("model"), files)


def test_stage(experiment: Experiment) -> None:
    """Score the test split, once.

    The result has `ppl`, `acc` and `tokens`; `conversations`, of each the number of predicted tokens and
    their mean loss in nats; and `fingerprint`. It is empty if there is no token to predict.
    """
    if not experiment.finished("test"):
        experiment.folder.finish("test", experiment.key("test"), (), _test_result(experiment))


@stage("Scoring the test split")
def _test_result(experiment: Experiment) -> dict[str, Any]:
    texts, model, device = experiment.texts["test"], experiment.model, experiment.device
    if not len(texts) or len((stream := validation_stream(texts, experiment.tokenizer)).ids) < 2:
        return {}
    load_weights(model, experiment.folder.path)
    cache = Cache(stream.ids.int().to(device))
    if model.context_block is not None:  # contexts are computed as those of validation
        generator = torch.Generator(device).manual_seed(experiment.config.runtime.seed)
        contexts = torch.cat([*_stream_contexts(experiment, stream.ids, None, generator)])
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
