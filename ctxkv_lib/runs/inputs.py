"""What an experiment is made from, conversations, streams and token table, and the keys of its stages."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.conversations import Conversations, check_splits, load_conversations
from ..data.embeddings import TokenTable, check_width
from ..data.tokens import load_tokenizer, train_stream, validation_stream
from ..errors import UserError, memory_advice
from ..files import digest
from ..method.config import ModelConfig
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..progress import stage
from .config import ExperimentConfig
from .models import check_parts, frozen_model, load_frozen
from .plugins import code_key
from .provenance import choose_device, code_version, describe
from .records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Facts = dict[str, Any]  # a part of the summary
SIZES = {"train": "samples", "val": "validation_samples"}


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
        table, counts = load_frozen(config)
        return cls(config, train, validation, table, counts)

    def phase1_key(self) -> str:
        """Digest what Phase 1 depends on; not the window, the heads or Phase 2."""
        shapes = [self.config.model.context_dim, self.config.model.hidden_size]
        made_from = [self.train.fingerprint, self.config.data.tokenizer, self.table.fingerprint]
        settings = [asdict(self.config.phase1), self.config.runtime.seed]
        return digest([shapes, made_from, settings, *self._plugins("block", "loss", "mixer")])

    def caches_key(self, phase1: Record, precision: str) -> str:
        runtime = self.config.runtime
        how = [precision, runtime.embedding_cache, runtime.context_cache]
        return digest([phase1.key, phase1.files, self.validation.fingerprint, how])

    def phase2_key(self, phase1: Record, precision: str) -> str:
        """Digest what Phase 2 depends on; not the caches, whose rounding may differ."""
        runtime, counts = self.config.runtime, self.counts and self.counts.fingerprint
        how = [precision, runtime.embedding_cache, runtime.context_cache]
        settings = [asdict(self.config.model), asdict(self.config.phase2), how]
        made_from = [phase1.key, phase1.files, self.validation.fingerprint, counts]
        return digest([made_from, settings, *self._plugins("attention", "mixer", "optimizer")])

    def model_key(self, phase2: Record) -> str:
        """Digest what the folder depends on that transformers loads; all of the model's code is in it."""
        return digest([phase2.key, phase2.files, code_version("hf")])

    def _plugins(self, *hooks: str) -> list[Any]:
        used = [self.config.plugins.get(hook) for hook in hooks]
        return [[plugin and plugin.to_dict() for plugin in used], code_key(*used)]

    def provenance(self, device: torch.device) -> Facts:
        data = {
            "source": self.config.data.source,
            "train_fingerprint": self.train.fingerprint,
            "validation_fingerprint": self.validation.fingerprint,
        }
        embeddings = {"table": self.config.data.table, "fingerprint": self.table.fingerprint}
        return describe(device, self.config.runtime.seed, data, embeddings)


def tokenize(inputs: Inputs) -> tuple["PreTrainedTokenizerBase", dict[str, Tensor]]:
    """Return the tokenizer and the token ids of both streams, uint16 on the CPU, mapped from their files.

    Raises:
        UserError: a stream is no longer than a window.
    """
    with stage("Reading the tokenizer"):
        tokenizer = load_tokenizer(inputs.config.data.tokenizer)
    ids = {
        "train": train_stream(inputs.train, tokenizer).ids,
        "val": validation_stream(inputs.validation, tokenizer).ids,
    }
    _refuse_short({split: len(stream) for split, stream in ids.items()}, inputs.config.model)
    return tokenizer, ids


def _refuse_short(tokens: dict[str, int], model: ModelConfig) -> None:
    """Refuse a stream that does not fill one window: it says nothing about attention over a full one."""
    for split, count in tokens.items():
        if count <= model.context_window:
            fitting = (min(tokens.values()) - 1) // model.interval
            window = f", or set model.max_contexts to {fitting} or less" if fitting else ""
            raise UserError(
                f"The {split} stream has {count} tokens, no more than one context window "
                f"({model.context_window}); use more or longer conversations (data.{SIZES[split]}){window}."
            )


def refusals(config: ExperimentConfig, tokens: dict[str, int | None]) -> list[str]:
    """Collect the sentences with which a run would be refused, as far as that is known without a network.

    Args:
        tokens: of both streams, "train" and "val"; None where that is not known.
    """
    checks: list[Callable[[], Any]] = [
        lambda: check_splits(config.data),
        lambda: check_width(config.data.table, config.model.hidden_size),
        lambda: choose_device(config.runtime.device),
        lambda: _refuse_short({split: n for split, n in tokens.items() if n is not None}, config.model),
    ]
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


@memory_advice("Building the model", "use fewer conversations or a smaller model, or free the GPU")
def model_on_device(inputs: Inputs, device: torch.device) -> tuple[ContextKV, Facts]:
    """Make the experiment's model on its device; and the memory it takes."""
    with stage("Building the model"):
        model = frozen_model(inputs.config, inputs.table, inputs.counts).to(device)
        check_parts(model, inputs.config)
    return model, snapshot("model built", device)
