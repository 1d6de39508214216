"""The two training stages of an experiment, each done only if its run folder does not hold it yet."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..config import ExperimentConfig
from ..data.conversations import Conversations, load_conversations
from ..data.embeddings import TokenTable, load_table
from ..data.tokens import load_tokenizer, train_stream, validation_stream
from ..errors import UserError
from ..files import digest, read_tensors, replacing, write_tensors
from ..memory import snapshot
from ..model.config import ModelConfig
from ..model.modeling import ContextKVConfig, ContextKVForCausalLM, parameter_counts
from ..progress import Listener, Metric, say, stage, transformers_bars_hidden
from ..runs.provenance import PRECISIONS, choose_device, choose_precision, code_version, describe
from ..runs.run_folder import RunFolder
from ..training.caches import StreamCache, dense_embeddings, held_mib, load_cache, place_caches, save_cache
from ..training.evaluation import effective_rank
from ..training.phase1 import train_context_block
from ..training.phase2 import train_attention
from ..training.placement import scratch
from ..training.recurrence import distinct_rows, stream_contexts

CONTEXT_CODE = code_version(
    "data/tokens",
    "model/modeling",
    "training/recurrence",
    "training/phase1",
    "training/caches",
    "training/evaluation",
    "experiments/stages",
)
ATTENTION_CODE = code_version("model/windows", "training/losses", "training/phase2")

Record = dict[str, Any]
Caches = dict[str, StreamCache]  # "train" and "val"


@dataclass(frozen=True)
class Inputs:
    """What an experiment is made from, and the keys by which its finished stages are known."""

    config: ExperimentConfig
    train: Conversations
    validation: Conversations
    table: TokenTable

    @classmethod
    def load(cls, config: ExperimentConfig) -> "Inputs":
        """Read conversations and token table, from the network or this machine's copy.

        Raises:
            UserError: a source is missing, damaged, too small or out of reach.
        """
        train = load_conversations(config.data, "train")
        validation = load_conversations(config.data, "validation")
        return cls(config, train, validation, load_table(config.data, config.model, config.runtime.seed))

    def context_key(self) -> str:
        settings = [asdict(self.config.model), asdict(self.config.phase1), asdict(self.config.runtime)]
        data = [self.train.fingerprint, self.validation.fingerprint, self.config.data.tokenizer]
        return digest([settings, data, self.table.fingerprint, CONTEXT_CODE])

    def attention_key(self) -> str:
        return digest([self.context_key(), asdict(self.config.phase2), ATTENTION_CODE])

    def provenance(self, prepared: "Prepared") -> Record:
        data = {
            "source": self.config.data.source,
            "train_fingerprint": self.train.fingerprint,
            "validation_fingerprint": self.validation.fingerprint,
        }
        embeddings = {"table": self.config.data.table, "fingerprint": self.table.fingerprint}
        dtype = prepared.caches["train"].contexts.dtype
        precision = next(name for name, known in PRECISIONS.items() if known == dtype)
        made = describe(prepared.model.device, self.config.runtime.seed, data, embeddings)
        return {**made, "precision": precision, "caches": prepared.placement}


@dataclass(frozen=True)
class Prepared:
    """A run as far as its contexts: what Phase 2 starts from."""

    tokenizer: PreTrainedTokenizerBase
    model: ContextKVForCausalLM
    placement: str  # where the caches are held, in words
    record: Record  # `phase1`, `memory`, `caches_mib`, `tokens` and `parameters` of the summary
    caches: Caches


def run_stages(config: ExperimentConfig, folder: RunFolder, listener: Listener) -> tuple[Record, Record]:
    """Bring a claimed run folder to its trained state.

    Args:
        listener: gets every metric in order, those of stages done earlier included.

    Returns:
        The records of the context stage and of the attention stage.
    """
    device = choose_device(config.runtime.device)
    with stage("Reading conversations and token table"):
        inputs = Inputs.load(config)
    contexts = folder.finished("contexts", inputs.context_key())
    attention = folder.finished("attention", inputs.attention_key())
    if contexts and attention:
        for metric in (*folder.metrics("phase1"), *folder.metrics("phase2")):
            listener(metric)
        return contexts, attention
    return _train(inputs, folder, device, listener)


def prepare(config: ExperimentConfig, folder: RunFolder, listener: Listener) -> Prepared:
    """Bring a claimed run folder as far as its contexts; `run_stages` goes on from there.

    Args:
        listener: gets every metric of Phase 1 in order, also if it was done earlier.
    """
    return _prepare(Inputs.load(config), folder, choose_device(config.runtime.device), listener)


def _train(
    inputs: Inputs, folder: RunFolder, device: torch.device, listener: Listener
) -> tuple[Record, Record]:
    prepared = _prepare(inputs, folder, device, listener)
    folder.forget_metrics("phase2")
    attention = _make_attention(inputs, prepared, folder, listener)
    with stage("Saving the model"):
        _save_model(prepared.model, prepared.tokenizer, folder)
    folder.finish("attention", inputs.attention_key(), attention)
    folder.phase2_checkpoint.unlink(missing_ok=True)
    return prepared.record, attention


def _prepare(inputs: Inputs, folder: RunFolder, device: torch.device, listener: Listener) -> Prepared:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with stage("Building the model"):
        tokenizer, ids = _tokenize(inputs, device)
        memory = [snapshot("data loaded", device)]
        model = _build_model(inputs, device)
    memory.append(snapshot("model built", device))
    key = inputs.context_key()
    record = folder.finished("contexts", key)
    if record is None:
        folder.forget_metrics("phase1", "phase2")
        phase1 = _make_contexts(inputs.config, model, ids, folder, memory, listener)
    else:
        model.context_block.load_state_dict(read_tensors(folder.context_block))
        for metric in folder.metrics("phase1"):
            listener(metric)
    caches, placement = place_caches({split: load_cache(folder.caches, split) for split in ids}, device)
    say(f"Caches: {placement}")
    if record is None:
        record = {
            "tokens": {split: len(stream) for split, stream in ids.items()},
            "phase1": phase1,
            "caches_mib": held_mib(caches["train"], caches["val"]),
            "parameters": parameter_counts(model),
            "memory": [*memory, snapshot("phase 2 prepared", device)],
        }
        folder.finish("contexts", key, record)
    return Prepared(tokenizer, model, placement, record, caches)


def _save_model(model: ContextKVForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> None:
    """Everything transformers needs to load and run the model, its code included."""
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with replacing(folder.model) as beside, transformers_bars_hidden():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _tokenize(inputs: Inputs, device: torch.device) -> tuple[PreTrainedTokenizerBase, dict[str, Tensor]]:
    """The tokenizer, and the token ids of both streams as int32 on the device."""
    config = inputs.config
    tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) != config.model.vocab_size:
        raise UserError(f"model.vocab_size is {config.model.vocab_size}; allowed: {len(tokenizer)}.")
    streams = {
        "train": train_stream(inputs.train, tokenizer),
        "val": validation_stream(inputs.validation, tokenizer),
    }
    _refuse_short({split: len(stream.ids) for split, stream in streams.items()}, config.model)
    return tokenizer, {split: stream.ids.int().to(device) for split, stream in streams.items()}


def _refuse_short(tokens: dict[str, int], model: ModelConfig) -> None:
    """A stream that does not fill one window says nothing about attention over a full one."""
    for split, count in tokens.items():
        if count <= model.context_window:
            fitting = (min(tokens.values()) - 1) // model.interval
            window = f", or set model.max_contexts to {fitting} or less" if fitting else ""
            raise UserError(
                f"The {split} stream has {count} tokens, no more than one context window "
                f"({model.context_window}); use more or longer conversations{window}."
            )


def _build_model(inputs: Inputs, device: torch.device) -> ContextKVForCausalLM:
    """The untrained model; its weights depend on the seed and the shapes alone."""
    torch.manual_seed(inputs.config.runtime.seed)
    model = ContextKVForCausalLM(ContextKVConfig(**asdict(inputs.config.model)))
    model.load_table(inputs.table.weight)
    model.to(device)  # type: ignore[arg-type]  # transformers hides nn.Module's signature
    return model


def _make_contexts(
    config: ExperimentConfig,
    model: ContextKVForCausalLM,
    ids: dict[str, Tensor],
    folder: RunFolder,
    memory: list[Record],
    listener: Listener,
) -> Record:
    """Phase 1, and the caches made from it, which are left in the folder; returns `phase1` of the summary."""
    settings, dim, seed = config.phase1, config.model.context_dim, config.runtime.seed
    generator = torch.Generator(model.device).manual_seed(seed)
    contexts = {
        split: scratch((len(stream), dim), torch.float32, model.device, folder.caches)
        for split, stream in ids.items()
    }
    model.set_phase(1)
    result = train_context_block(
        model.context_block,
        *distinct_rows(model, ids["train"][:-1]),
        settings,
        contexts["train"],
        generator,
        _recorded(folder, listener),
    )
    model.set_phase(2)
    write_tensors(folder.context_block, model.context_block.state_dict())
    memory.append(snapshot("phase 1 done", model.device))
    with stage("Computing the contexts of all positions"):
        errors = [
            _cache(config, model, ids[split], contexts[split], split, generator, folder) for split in ids
        ]
    rank_generator = torch.Generator().manual_seed(seed)
    return {
        "iterations": result.iterations,
        "convergence_rate": result.convergence_rate,
        "stop_reason": result.stop_reason,
        "seconds": round(result.seconds, 3),
        "effective_rank": effective_rank(contexts["val"][1:], settings.rank_rows, rank_generator),
        "contexts": settings.contexts,
        "contexts_max_error": max((error for error in errors if error is not None), default=None),
    }


def _cache(
    config: ExperimentConfig,
    model: ContextKVForCausalLM,
    ids: Tensor,
    contexts: Tensor,
    split: str,
    generator: torch.Generator,
    folder: RunFolder,
) -> float | None:
    """Make a stream's contexts, in place, and leave its cache in the folder; returns their largest error."""
    block, trained = model.context_block, split == "train"
    embeddings, tokens = distinct_rows(model, ids[:-1])
    half = block.project_tokens(embeddings)
    error = stream_contexts(block, half, tokens, config.phase1, contexts, trained, generator)
    precision = choose_precision(config.runtime.precision, model.device)
    if trained and precision != contexts.dtype:
        shape = len(ids), contexts.shape[1]
        contexts = scratch(shape, precision, model.device, folder.caches).copy_(contexts)
    dense = dense_embeddings(model, ids) if config.runtime.embedding_cache == "dense" else None
    save_cache(folder.caches, split, StreamCache(ids, contexts, dense))
    return error


def _make_attention(inputs: Inputs, prepared: Prepared, folder: RunFolder, listener: Listener) -> Record:
    config = inputs.config
    result = train_attention(
        prepared.model,
        prepared.caches["train"],
        prepared.caches["val"],
        config.phase2,
        config.runtime.seed,
        folder.phase2_checkpoint,
        inputs.attention_key(),
        _recorded(folder, listener),
    )
    return {
        "epochs": result.epochs,
        "stop_reason": result.stop_reason,
        "provenance": inputs.provenance(prepared),
    }


def _recorded(folder: RunFolder, listener: Listener) -> Listener:
    """`listener`, with each metric written to metrics.jsonl first."""

    def record(metric: Metric) -> None:
        folder.append_metric({name: value for name, value in metric.items() if name != "memory"})
        listener(metric)

    return record
