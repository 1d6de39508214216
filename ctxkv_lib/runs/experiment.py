"""An experiment under way: its data, its model, and the keys of its stages."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .. import ranks
from ..data.config import Split
from ..data.conversations import Conversations, load_conversations
from ..data.token_table import load_table
from ..data.tokens import load_tokenizer, tokenizer_digest, train_stream, validation_stream
from ..errors import UserError
from ..files import digest
from ..method.loop import Metric
from ..method.memory import begin_peaks, snapshot
from ..method.model import ContextKV
from ..plugins.checks import try_plugins
from ..progress import Listener, stage
from .build import frozen_model, log_frequencies
from .config import ExperimentConfig
from .device import set_threads
from .folder import RunFolder, Stage

SETTING_OF = {"train": "samples", "val": "validation_samples"}


class Work:
    """An experiment under way; data and model are read and made when a stage first needs them.

    Args:
        texts: of `read_splits`, by split.
        folder: claimed.
        listener: gets every metric in order.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        texts: dict[str, Conversations],
        folder: RunFolder,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.config, self.texts, self.folder, self.device = config, texts, folder, device
        self.listener, self.precision = listener, folder.origin["precision"]
        self.memory: list[dict[str, Any]] = []  # snapshots so far
        set_threads(config.runtime.threads)
        begin_peaks(device)
        with stage("Reading the token table"):
            self.table = load_table(config.data, config.model.hidden_size, config.runtime.seed)
            self.log_unigram = log_frequencies(config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        with stage("Reading the tokenizer"):
            return load_tokenizer(self.config.data.tokenizer)

    @cached_property
    def ids(self) -> dict[str, Tensor]:
        """Token ids of both streams, "train" and "val", on the CPU.

        Raises:
            UserError: a stream is no longer than a window.
        """
        ids = {
            "train": train_stream(self.texts["train"], self.tokenizer).ids,
            "val": validation_stream(self.texts["validation"], self.tokenizer).ids,
        }
        window = self.config.model.context_window
        for split, stream in ids.items():
            if len(stream) <= window:
                raise UserError(
                    f"The {split} stream has {len(stream)} tokens, no more than one context window "
                    f"({window}); use more or longer conversations (data.{SETTING_OF[split]}), or lower "
                    "model.max_contexts."
                )
        self.memory.append(snapshot("data loaded", self.device))
        return ids

    @cached_property
    def model(self) -> ContextKV:
        """The model on its device, untrained until a stage trains or loads its parts."""
        with stage("Building the model"):
            model = frozen_model(self.config, self.table.weight, self.log_unigram).to(self.device)
            try_plugins(model, self.config)
        self.memory.append(snapshot("model built", self.device))
        return model

    def record(self, metric: Metric) -> None:
        """Append a metric to metrics.jsonl, and pass it on to the listener."""
        if not ranks.rank():
            self.folder.append_metric(metric)
            self.listener(metric)

    def report(self, done: Stage) -> None:
        """Pass the metrics of a reused stage on to the listener."""
        for metric in done.metrics if not ranks.rank() else ():
            self.listener(metric)

    def phase1_key(self) -> str:
        """Digest what Phase 1 depends on: of the settings not the window, the heads or Phase 2."""
        shapes = [self.config.model.context_dim, self.config.model.hidden_size]
        text = [self.texts["train"].fingerprint, tokenizer_digest(self.tokenizer), self.table.fingerprint]
        settings = [asdict(self.config.phase1), self.config.runtime.seed]
        return digest([shapes, text, settings, self._code("block", "loss", "mixer")])

    def caches_key(self, phase1: Stage) -> str:
        return digest([phase1.key, phase1.files, self.texts["validation"].fingerprint, self._how()])

    def phase2_key(self, phase1: Stage) -> str:
        """Digest what Phase 2 depends on: not the caches, which Phase 1 and the texts determine."""
        made_from = [phase1.key, phase1.files, self.texts["validation"].fingerprint]
        settings = [asdict(self.config.model), asdict(self.config.phase2), self._how()]
        corpus = self.texts["corpus"].fingerprint if self.config.data.unigram == "corpus" else ""
        return digest([made_from, corpus, settings, self._code("attention", "mixer")])

    def model_key(self, phase2: Stage) -> str:
        return digest([phase2.key, phase2.files, self.folder.origin["code"]])

    def test_key(self, caches: Stage, phase2: Stage) -> str:
        return digest([caches.key, phase2.key, phase2.files, self.texts["test"].fingerprint])

    def _how(self) -> list[str]:
        return [self.precision, self.config.runtime.embedding_cache]

    def _code(self, *hooks: str) -> list[Any]:
        used = [self.config.plugins.get(hook) for hook in hooks]
        return [self.folder.origin["code"], *(plugin and plugin.to_dict() for plugin in used)]


def read_splits(config: ExperimentConfig) -> dict[str, Conversations]:
    """Read the conversations of an experiment; a UserError if the source is missing, damaged or too small."""
    with stage("Reading the conversations"):
        splits: list[Split] = ["train", "validation", "test"]
        splits += ["corpus"] if config.data.reads_corpus else []
        return {split: load_conversations(config.data, split) for split in splits}
