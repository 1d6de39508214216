"""The stages of an experiment in order, each done only if its run folder does not hold it intact.

Phase 1 leaves the ContextBlock, from which the caches are made; Phase 2 leaves attention and feed-forward;
the model is put together from both. What is lost is made again from what is left.
"""

from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedTokenizerBase

from .. import ranks
from ..errors import memory_advice
from ..files import read_tensors, replacing, rust_writes, write_tensors
from ..hf.modeling import ContextKVForCausalLM
from ..method.caches import StreamCache, TrainingStream, load_cache, load_starts
from ..method.memory import begin_peaks, snapshot
from ..method.phase2 import train_attention
from ..progress import Listener, say, stage, transformers_bars_hidden
from ..research.models import stream_of
from ..threads import set_threads
from .checkpoint import forget
from .config import ExperimentConfig
from .contexts import context_facts, make_contexts
from .inputs import Facts, Inputs, Work
from .placement import place_caches
from .provenance import choose_device
from .records import Record
from .run_folder import RunFolder
from .streamed import Streamed, vocabulary_half

Caches = dict[str, StreamCache]  # "train" and "val"


@dataclass(frozen=True)
class Prepared:
    """A run as far as its contexts: what Phase 2 starts from."""

    tokenizer: PreTrainedTokenizerBase
    model: ContextKVForCausalLM
    placement: str  # where the caches are held, in words
    record: Facts  # `phase1`, `memory`, `caches_mib`, `tokens` and `parameters` of the summary
    caches: Caches  # of a streamed training stream the beginning
    train: TrainingStream
    stages: tuple[Record, Record]  # Phase 1 and the caches


def run_stages(config: ExperimentConfig, folder: RunFolder, listener: Listener) -> tuple[Facts, Facts]:
    """Bring a claimed run folder to its trained state.

    Args:
        listener: gets every metric in order, those of stages done earlier included.

    Returns:
        What is known of the contexts, and of Phase 2 on them.
    """
    device = choose_device(config.runtime.device)
    begin_peaks(device)
    with stage("Reading conversations and token table"):
        inputs = Inputs.load(config)
    done = _finished(inputs, folder)
    if done:
        phase1, caches, phase2 = done
        set_threads(phase2.result["provenance"]["threads"])  # for measures that are made again
        folder.keep_metrics(phase1, phase2)
        for metric in (*phase1.metrics, *phase2.metrics):
            listener(metric)
    else:
        work = Work.begin(inputs, folder, device, listener)
        prepared = _prepare(work)
        phase1, caches = prepared.stages
        phase2 = _attention(work, prepared)
        with stage("Saving the model"):
            _model(work, phase2)
    forget(folder.phase1_checkpoint)
    forget(folder.phase2_checkpoint)
    return context_facts(phase1, caches), {**phase2.result, "epochs": phase2.metrics}


def prepare(config: ExperimentConfig, folder: RunFolder, listener: Listener) -> Prepared:
    """Bring a claimed run folder as far as its contexts; `run_stages` goes on from there.

    Args:
        listener: gets every metric of Phase 1 in order, also if it was done earlier.
    """
    device = choose_device(config.runtime.device)
    begin_peaks(device)
    with stage("Reading conversations and token table"):
        inputs = Inputs.load(config)
    return _prepare(Work.begin(inputs, folder, device, listener))


def _finished(inputs: Inputs, folder: RunFolder) -> tuple[Record, Record, Record] | None:
    """The records of Phase 1, caches and Phase 2, if these and the model are finished and intact."""
    phase1 = folder.finished("phase1", inputs.phase1_key())
    phase2 = phase1 and folder.finished("phase2", inputs.phase2_key(phase1))
    if not (phase1 and phase2 and folder.finished("model", inputs.model_key(phase2))):
        return None
    caches = folder.finished("caches", inputs.caches_key(phase1, phase2.result["provenance"]["precision"]))
    return (phase1, caches, phase2) if caches else None


@memory_advice("Preparing the model and the caches", "use fewer conversations, or a smaller model")
def _prepare(work: Work) -> Prepared:
    phase1, cached = make_contexts(work)
    forget(work.folder.phase1_checkpoint)
    shapes = work.inputs.config.model
    loaded = {
        split: stream_of(load_cache(work.folder.caches, split), shapes, split == "train")
        for split in work.ids
    }
    caches, placement = place_caches(loaded, work.model.device)
    train: TrainingStream = caches["train"]
    if (starts := load_starts(work.folder.caches, "train")) is not None:
        placement += ", training contexts made when needed"
        train = Streamed(work.ids["train"], starts, vocabulary_half(work.model), train.dtype)
    say(f"Caches: {placement}")
    facts = context_facts(phase1, cached)
    facts["memory"] = [*facts["memory"], snapshot("phase 2 prepared", work.model.device)]
    return Prepared(work.tokenizer, work.model, placement, facts, caches, train, (phase1, cached))


@memory_advice("Phase 2", "lower phase2.batch_size")
def _attention(work: Work, prepared: Prepared) -> Record:
    """Phase 2: leaves attention and feed-forward of its best epoch in the model and in the folder."""
    model, folder, config = work.model, work.folder, work.inputs.config
    phase1 = prepared.stages[0]
    key = work.inputs.phase2_key(phase1)
    if done := folder.finished("phase2", key):
        model.load_state_dict(read_tensors(folder.attention), strict=False)
        folder.keep_metrics(phase1, done)
        work.replay(done)
        return done
    folder.keep_metrics(phase1)
    if config.model.heads == "look_up":
        model.attention.look_up(model.context_block, config.phase1.last_tokens)
    result = train_attention(
        model,
        prepared.train,
        prepared.caches["val"],
        config.phase2,
        config.runtime.seed,
        folder.phase2_checkpoint,
        key,
        work.recorded([]),
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ranks.from_first(lambda: write_tensors(folder.attention, trained))
    made = work.inputs.provenance(model.device)
    facts = {
        "stop_reason": result.stop_reason,
        "provenance": {**folder.records.stages["machine"].result, **made, "caches": prepared.placement},
        "memory": prepared.record["memory"][-1:],
    }
    return folder.finish("phase2", key, [folder.attention], facts, result.epochs)


def _model(work: Work, phase2: Record) -> None:
    """Leave everything transformers needs to load and run the model, its code included."""
    folder, key = work.folder, work.inputs.model_key(phase2)
    if not folder.finished("model", key):
        ranks.from_first(lambda: _save_model(work))
        folder.finish("model", key, [folder.model])


def _save_model(work: Work) -> None:
    folder, end = work.folder, work.tokenizer.eos_token_id
    work.model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with replacing(folder.model) as beside, rust_writes(folder.model), transformers_bars_hidden():
        work.model.save_pretrained(beside)
        work.tokenizer.save_pretrained(beside)
