"""The stages of an experiment in order, each done only if its run folder does not hold it intact.

Phase 1 leaves the ContextBlock, from which the caches are computed; Phase 2 leaves attention and
feed-forward; the model is put together from both. Missing or damaged files are rebuilt from intact stages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import ranks
from ..errors import Diverged, UserError, memory_advice
from ..files import read_tensors, replacing, rust_writes, write_tensors
from ..method import loop
from ..method.caches import StreamCache, TrainingStream, dense_embeddings
from ..method.contexts import distinct_rows, stream_contexts
from ..method.evaluation import effective_rank
from ..method.memory import begin_peaks, snapshot
from ..method.model import ContextKV, parameter_counts, project_inputs
from ..method.oacd import UNTRAINED, train_context_block
from ..method.phase2 import Stepper, train_attention
from ..progress import Listener, Metric, notice, say, stage, transformers_bars_hidden
from .caches import held_mib, load_cache, load_starts, place_caches, save_cache
from .capture import use_cuda_graph
from .config import ExperimentConfig
from .inputs import Facts, Inputs, model_on_device, tokenize
from .long_run import Checkpoint, LongRun, forget
from .plugins import built
from .provenance import PRECISIONS, choose_device, choose_precision, use_threads
from .records import Record
from .rows import MixerModel, as_read
from .run_folder import RunFolder
from .scratch import scratch
from .settings import BEGINNING_TOKENS
from .streamed import Streamed, project_vocabulary, read_once, sampled


@dataclass
class Work:
    """An experiment under way in its claimed folder.

    Attributes:
        ids: the token ids of both streams, "train" and "val"; uint16 on the CPU, mapped from their files.
        memory: snapshots taken so far.
    """

    inputs: Inputs
    folder: RunFolder
    listener: Listener
    tokenizer: PreTrainedTokenizerBase
    ids: dict[str, Tensor]
    model: ContextKV
    precision: str
    memory: list[Facts]

    @property
    def config(self) -> ExperimentConfig:
        return self.inputs.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def loop(self, name: str, metrics: list[Metric], checkpoint: Checkpoint) -> LongRun:
        """Return the hooks of a training: each metric goes to metrics.jsonl, `metrics` and the listener."""

        def record(metric: Metric) -> None:
            self.folder.append_metric(metric)
            metrics.append(metric)
            self.listener(metric)

        cuda_graph = use_cuda_graph(self.config, self.device)
        return LongRun(name, self.device, record, checkpoint, cuda_graph)


@dataclass(frozen=True)
class Prepared:
    """A run as far as its contexts: what Phase 2 starts from."""

    tokenizer: PreTrainedTokenizerBase
    model: ContextKV
    placement: str  # where the caches are held, in words
    record: Facts  # `phase1`, `memory`, `caches_mib`, `tokens` and `parameters` of the summary
    caches: dict[str, StreamCache]  # "train" and "val"; of a streamed training stream the beginning
    train: TrainingStream
    stages: tuple[Record, Record]  # Phase 1 and the caches


def run_stages(config: ExperimentConfig, folder: RunFolder, listener: Listener) -> tuple[Facts, Facts]:
    """Bring a claimed run folder to its trained state.

    Args:
        listener: gets every metric in order, those of stages done earlier included.

    Returns:
        What is known of the contexts, and of Phase 2 on them.
    """
    device, precision, inputs = _begin(config)
    if done := _finished(inputs, folder, precision):
        phase1, caches, phase2 = done
        _report_again(folder, listener, phase1, phase2)
    else:
        work = _work(inputs, folder, device, precision, listener)
        prepared = _prepare(work)
        phase1, caches = prepared.stages
        phase2 = _train_attention(work, prepared)
        with stage("Saving the model"):
            _save_model(work, phase2)
    forget(folder.phase1_checkpoint)
    forget(folder.phase2_checkpoint)
    return _context_facts(phase1, caches), {**phase2.result, "epochs": phase2.metrics}


def prepare(config: ExperimentConfig, folder: RunFolder, listener: Listener) -> Prepared:
    """Bring a claimed run folder as far as its contexts; `run_stages` goes on from there.

    Args:
        listener: gets every metric of Phase 1 in order, also if it was done earlier.
    """
    device, precision, inputs = _begin(config)
    return _prepare(_work(inputs, folder, device, precision, listener))


def _begin(config: ExperimentConfig) -> tuple[torch.device, str, Inputs]:
    device = choose_device(config.runtime.device)
    use_threads(config.runtime.threads)
    begin_peaks(device)
    with stage("Reading conversations and token table"):
        inputs = Inputs.load(config)
    return device, choose_precision(config.runtime.precision, device), inputs


def _report_again(
    folder: RunFolder, listener: Listener, *done: Record, after: tuple[Record, ...] = ()
) -> None:
    """Send the metrics of stages that were done to the listener; metrics.jsonl keeps `after`'s, too."""
    folder.keep_metrics(*after, *done)
    for record in done:
        for metric in record.metrics:
            listener(metric)


def _work(
    inputs: Inputs, folder: RunFolder, device: torch.device, precision: str, listener: Listener
) -> Work:
    tokenizer, ids = tokenize(inputs)
    loaded = snapshot("data loaded", device)
    model, built_memory = model_on_device(inputs, device)
    return Work(inputs, folder, listener, tokenizer, ids, model, precision, [loaded, built_memory])


def _finished(inputs: Inputs, folder: RunFolder, precision: str) -> tuple[Record, Record, Record] | None:
    """Return the records of Phase 1, caches and Phase 2, if these and the model are finished and intact."""
    phase1 = folder.finished("phase1", inputs.phase1_key())
    phase2 = phase1 and folder.finished("phase2", inputs.phase2_key(phase1, precision))
    if not (phase1 and phase2 and folder.finished("model", inputs.model_key(phase2))):
        return None
    caches = folder.finished("caches", inputs.caches_key(phase1, precision))
    return (phase1, caches, phase2) if caches else None


@memory_advice("Preparing the model and the caches", "use fewer conversations, or a smaller model")
def _prepare(work: Work) -> Prepared:
    phase1, cached = _contexts(work)
    forget(work.folder.phase1_checkpoint)
    files = work.folder.caches
    loaded = {split: as_read(work.model, load_cache(files, split), split == "train") for split in work.ids}
    caches, placement = place_caches(loaded, work.device)
    train: TrainingStream = caches["train"]
    if (starts := load_starts(work.folder.caches, "train")) is not None:
        placement += ", training contexts computed when needed"
        train = Streamed(work.ids["train"], starts, project_vocabulary(work.model), train.dtype)
    say(f"Caches: {placement}")
    facts = _context_facts(phase1, cached)
    facts["memory"] = [*facts["memory"], snapshot("phase 2 prepared", work.device)]
    facts["parameters"] = parameter_counts(work.model)
    return Prepared(work.tokenizer, work.model, placement, facts, caches, train, (phase1, cached))


def _contexts(work: Work) -> tuple[Record, Record]:
    """Leave the trained ContextBlock in model and folder, and the caches in the folder; return both records.

    Of several processes rank 0 computes them.
    """
    inputs, folder = work.inputs, work.folder
    phase1 = folder.shared("phase1", inputs.phase1_key())
    _say_new_precision(work)
    caches = phase1 and folder.shared("caches", inputs.caches_key(phase1, work.precision))
    by_passes = work.config.phase1.context_method == "passes" and phase1 and phase1.metrics
    if phase1 and not caches and by_passes:
        notice("phase1.context_method=passes: caches come from Phase 1's last iteration, so it is repeated.")
        phase1 = None
    if phase1:
        _report_again(folder, work.listener, phase1)
        _load_block(work)
    if not (phase1 and caches):
        with _diverging():
            phase1, caches = ranks.on_rank_0(lambda: _make_contexts(work, phase1))
        folder.keep("phase1", phase1)
        folder.keep("caches", caches)
        _load_block(work)  # on the other ranks, too
    return phase1, caches


def _load_block(work: Work) -> None:
    if not isinstance(work.model, MixerModel):
        work.model.context_block.load_state_dict(read_tensors(work.folder.context_block))


def _say_new_precision(work: Work) -> None:
    held = work.folder.records.stages.get("caches")
    if held and held.result["precision"] != work.precision:
        notice(
            f"runtime.precision=auto was {held.result['precision']} where the run began and is "
            f"{work.precision} here: its caches and Phase 2 are made again."
        )


def _make_contexts(work: Work, phase1: Record | None) -> tuple[Record, Record]:
    inputs, folder = work.inputs, work.folder
    generator = torch.Generator(work.device).manual_seed(work.config.runtime.seed)
    rows = {split: len(ids) for split, ids in work.ids.items()}
    if work.config.is_streamed(rows["train"]):  # the caches do not need Phase 1's contexts
        phase1 = phase1 or _train_block(
            work, _room(work, len(_sampled(work)) + 1, spare_memory=True), generator
        )
        rows["train"] = min(rows["train"], BEGINNING_TOKENS + 1)
    contexts = {split: _room(work, count) for split, count in rows.items()}
    phase1 = phase1 or _train_block(work, contexts["train"], generator)
    made = _make_caches(work, contexts, bool(phase1.metrics), generator)
    return phase1, folder.finish("caches", inputs.caches_key(phase1, work.precision), [folder.caches], made)


def _room(work: Work, count: int, dtype: torch.dtype = torch.float32, spare_memory: bool = False) -> Tensor:
    """Make room for `count` contexts; for a mixer they have no width."""
    width = 0 if isinstance(work.model, MixerModel) else work.config.model.context_dim
    return scratch((count, width), dtype, work.device, work.folder.caches, spare_memory)


def _context_facts(phase1: Record, caches: Record) -> Facts:
    """Return `tokens`, `phase1`, `memory` and `caches_mib` of the summary."""
    facts = {**phase1.result, **caches.result}
    return {**facts, "phase1": {**phase1.result["phase1"], **caches.result["phase1"]}}


@memory_advice("Phase 1", "lower phase1.batch_size, or use fewer conversations with --samples")
def _train_block(work: Work, contexts: Tensor, generator: torch.Generator) -> Record:
    """Do Phase 1, unless a mixer has none; leaves the last iteration's contexts in `contexts`."""
    key, folder, model = work.inputs.phase1_key(), work.folder, work.model
    folder.keep_metrics()
    metrics: list[Metric] = []
    files: list[Path] = []
    result, ids = UNTRAINED, _sampled(work)
    if not isinstance(model, MixerModel):
        model.set_phase(1)
        hooks = work.loop("Phase 1", metrics, Checkpoint(folder.phase1_checkpoint, key))
        loss = work.config.plugins.get("loss")
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
        files = [folder.context_block]
        write_tensors(files[0], model.context_block.state_dict())
    facts = {
        "phase1": {**asdict(result), "seconds": round(result.seconds, 3)},
        "memory": [*work.memory, snapshot("phase 1 done", work.device)],
    }
    return folder.finish("phase1", key, files, facts, metrics)


def _sampled(work: Work) -> Tensor:
    """Return the training tokens of Phase 1."""
    return sampled(work.ids["train"][:-1], work.config.phase1)


def _make_caches(work: Work, contexts: dict[str, Tensor], trained: bool, generator: torch.Generator) -> Facts:
    """Leave the caches, from the ContextBlock and, if it was `trained`, Phase 1's last `contexts`."""
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
        the cache; of a streamed stream what it is read on from; and the largest error of exact contexts.
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
    dtype = PRECISIONS[work.precision]
    if training and dtype != contexts.dtype:
        contexts = _room(work, len(contexts), dtype).copy_(contexts)
    dense = dense_embeddings(model, ids) if config.runtime.embedding_cache == "dense" else None
    cache = StreamCache(ids, contexts, dense)
    save_cache(work.folder.caches, split, cache, starts)
    return cache, starts, error


@memory_advice("Phase 2", "lower phase2.batch_size")
def _train_attention(work: Work, prepared: Prepared) -> Record:
    """Do Phase 2: leaves what its best epoch trained in the model and in the folder."""
    model, folder, config = work.model, work.folder, work.config
    phase1 = prepared.stages[0]
    key = work.inputs.phase2_key(phase1, work.precision)
    if done := folder.finished("phase2", key):
        model.load_state_dict(read_tensors(folder.attention), strict=False)
        _report_again(folder, work.listener, done, after=(phase1,))
        return done
    folder.keep_metrics(phase1)
    _init_attention(work)
    metrics: list[Metric] = []
    optimizer = config.plugins.get("optimizer")
    with _diverging():
        result = train_attention(
            model,
            prepared.train,
            prepared.caches["val"],
            config.phase2,
            config.runtime.seed,
            built(optimizer) if optimizer else Stepper,
            work.loop("Phase 2", metrics, Checkpoint(folder.phase2_checkpoint, key)),
        )
    trained = model.trained_weights()
    ranks.on_rank_0(lambda: write_tensors(folder.attention, trained))
    made = work.inputs.provenance(model.device)
    facts = {
        "parameters": parameter_counts(model),
        "offsets": None if isinstance(model, MixerModel) else model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": {
            **made,
            "precision": work.precision,
            "threads": torch.get_num_threads(),
            "caches": prepared.placement,
        },
        "memory": prepared.record["memory"][-1:],
    }
    return folder.finish("phase2", key, [folder.attention], facts, result.epochs)


def _init_attention(work: Work) -> None:
    """Let a plug-in initialise what Phase 2 trains from the trained ContextBlock, or from the tokens."""
    attention: Any = work.model.attention
    if hasattr(attention, "init_from_block"):
        attention.init_from_block(work.model.context_block)
    elif isinstance(work.model, MixerModel) and hasattr(attention, "init_weights"):
        attention.init_weights(*distinct_rows(work.model, _sampled(work)), work.config.phase1)


@contextmanager
def _diverging() -> Iterator[None]:
    """Inside, a training that diverges is the user's error."""
    try:
        yield
    except loop.Diverged as error:
        raise Diverged(f"{error} Use a new run folder.") from error


def _save_model(work: Work, phase2: Record) -> None:
    """Leave everything transformers needs to load and run the model, its code included."""
    folder, key = work.folder, work.inputs.model_key(phase2)
    if not folder.finished("model", key):
        files = ranks.on_rank_0(lambda: _write_model(work))
        folder.finish("model", key, files)


def _write_model(work: Work) -> list[Path]:
    """Write the model for transformers; nothing where its code cannot be carried along, which is said."""
    from transformers import GenerationConfig

    from .trained import for_transformers

    folder, end = work.folder, work.tokenizer.eos_token_id
    try:
        model = for_transformers(work.model, work.config)
        model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
        with replacing(folder.model) as beside, rust_writes(folder.model), transformers_bars_hidden():
            model.save_pretrained(beside)
            work.tokenizer.save_pretrained(beside)
    except UserError as error:
        notice(f"The model is not saved for transformers: {error}")
        return []
    return [folder.model]
