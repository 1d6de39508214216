"""What an experiment is made from: conversations, token table, tokenizer, streams and the untrained model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.conversations import Conversations, load_conversations
from ..data.counts import unigram_floor
from ..data.embeddings import TokenTable, corpus_counts, load_table
from ..data.tokens import load_tokenizer, train_stream, validation_stream
from ..errors import UserError, memory_advice
from ..files import digest
from ..hf.modeling import ContextKVForCausalLM
from ..method.config import ModelConfig
from ..method.memory import snapshot
from ..progress import Listener, Metric, stage
from ..research.models import model_class
from .config import ExperimentConfig
from .provenance import code_version, describe
from .records import Record
from .run_folder import RunFolder

METHOD = code_version("method")
MODEL_CODE = code_version("hf")

Facts = dict[str, Any]  # a part of the summary


@dataclass(frozen=True)
class Inputs:
    """What an experiment is made from, and the keys by which its finished stages are known."""

    config: ExperimentConfig
    train: Conversations
    validation: Conversations
    table: TokenTable
    counts: TokenTable | None  # of tokens, if the model adds their log-frequencies

    @classmethod
    @memory_advice("Reading the data", "use fewer conversations with --samples")
    def load(cls, config: ExperimentConfig) -> "Inputs":
        """Read conversations and token table, from the network or this machine's copy.

        Raises:
            UserError: a source is missing, damaged, too small or out of reach.
        """
        train = load_conversations(config.data, "train")
        validation = load_conversations(config.data, "validation")
        table = load_table(config.data, config.model.hidden_size, config.runtime.seed)
        counted = config.data.unigram == "corpus"
        counts = corpus_counts(config.data) if counted else None
        return cls(config, train, validation, table, counts)

    def phase1_key(self) -> str:
        settings = [asdict(self.config.model), asdict(self.config.phase1), self.config.runtime.seed]
        data = [self.train.fingerprint, self.validation.fingerprint, self.config.data.tokenizer]
        made = [self.table.fingerprint, self.counts and self.counts.fingerprint]
        return digest([settings, data, made, METHOD])

    def caches_key(self, phase1: Record, precision: str) -> str:
        runtime = self.config.runtime
        return digest([phase1.key, phase1.files, precision, runtime.embedding_cache, runtime.contexts])

    def phase2_key(self, phase1: Record) -> str:
        """Not bound to the caches: made again elsewhere, they may differ by a rounding."""
        runtime = self.config.runtime
        settings = [asdict(self.config.phase2), runtime.precision, runtime.embedding_cache, runtime.contexts]
        return digest([phase1.key, phase1.files, settings, METHOD])

    def model_key(self, phase2: Record) -> str:
        """Of the folder that transformers loads, in which all of the model's code is, too."""
        return digest([phase2.key, phase2.files, MODEL_CODE])

    def provenance(self, device: torch.device) -> Facts:
        data = {
            "source": self.config.data.source,
            "train_fingerprint": self.train.fingerprint,
            "validation_fingerprint": self.validation.fingerprint,
        }
        embeddings = {"table": self.config.data.table, "fingerprint": self.table.fingerprint}
        return describe(device, self.config.runtime.seed, data, embeddings)


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
    model: ContextKVForCausalLM
    memory: list[Facts]

    @classmethod
    @memory_advice("Building the model", "use fewer conversations or a smaller model, or free the GPU")
    def begin(cls, inputs: Inputs, folder: RunFolder, device: torch.device, listener: Listener) -> "Work":
        """With streams and the untrained model in memory.

        Raises:
            UserError: the model's shapes do not fit the data.
        """
        tokenizer, ids = _tokenize(inputs)
        memory = [snapshot("data loaded", device)]
        with stage("Building the model"):
            model = _build_model(inputs, device)
        memory.append(snapshot("model built", device))
        return cls(inputs, folder, listener, tokenizer, ids, model, memory)

    def recorded(self, metrics: list[Metric]) -> Listener:
        """The listener, with each metric written to metrics.jsonl, and put into `metrics`, first."""

        def record(metric: Metric) -> None:
            self.folder.append_metric(metric)
            metrics.append(metric)
            self.listener(metric)

        return record

    def replay(self, record: Record) -> None:
        """Let the listener hear a stage that was done earlier."""
        for metric in record.metrics:
            self.listener(metric)


def _tokenize(inputs: Inputs) -> tuple[PreTrainedTokenizerBase, dict[str, Tensor]]:
    """The tokenizer, and the token ids of both streams."""
    config = inputs.config
    with stage("Reading the tokenizer"):
        tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) != config.model.vocab_size:
        raise UserError(f"model.vocab_size is {config.model.vocab_size}; allowed: {len(tokenizer)}.")
    ids = {
        "train": train_stream(inputs.train, tokenizer).ids,
        "val": validation_stream(inputs.validation, tokenizer).ids,
    }
    _refuse_short({split: len(stream) for split, stream in ids.items()}, config.model)
    return tokenizer, ids


SIZES = {"train": "samples", "val": "validation_samples"}


def _refuse_short(tokens: dict[str, int], model: ModelConfig) -> None:
    """A stream that does not fill one window says nothing about attention over a full one."""
    for split, count in tokens.items():
        if count <= model.context_window:
            fitting = (min(tokens.values()) - 1) // model.interval
            window = f", or set model.max_contexts to {fitting} or less" if fitting else ""
            raise UserError(
                f"The {split} stream has {count} tokens, no more than one context window "
                f"({model.context_window}); use more or longer conversations (data.{SIZES[split]}){window}."
            )


def _build_model(inputs: Inputs, device: torch.device) -> ContextKVForCausalLM:
    """The untrained model; its weights depend on the seed and the shapes alone."""
    torch.manual_seed(inputs.config.runtime.seed)
    kind, has_unigram = model_class(inputs.config.model.memory), inputs.counts is not None
    model = kind(kind.config_class(**asdict(inputs.config.model), has_unigram=has_unigram))
    model.load_table(inputs.table.weight)
    if inputs.counts is not None:
        model.load_unigram(torch.from_numpy(unigram_floor(inputs.counts.weight.numpy())))
    model.to(device)  # type: ignore[arg-type]  # transformers hides nn.Module's signature
    return model
