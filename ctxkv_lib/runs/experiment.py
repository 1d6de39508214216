"""An experiment under way: its folder, data and model."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .. import ranks
from ..data.config import Split
from ..data.conversations import Conversations, load_conversations
from ..data.token_table import TokenTable, load_table
from ..data.tokens import load_tokenizer, tokenizer_digest, train_stream, validation_stream
from ..errors import UserError
from ..method.loop import Metric
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..plugins.checks import try_plugins
from ..progress import Listener, stage
from .build import frozen_model, log_frequencies
from .config import ExperimentConfig
from .folder import RunFolder, Stage
from .keys import stage_key

SETTING_OF = {"train": "samples", "val": "validation_samples"}


class Experiment:
    """An experiment under way; data and model are read and made when a stage first needs them.

    Args:
        folder: claimed; it has the settings and the precision of Phase 2's matrix products.
        texts: of `read_splits`, by split.
        listener: gets every metric in order.
    """

    def __init__(
        self, folder: RunFolder, texts: dict[str, Conversations], device: torch.device, listener: Listener
    ) -> None:
        self.folder, self.texts, self.device, self.listener = folder, texts, device, listener
        self.config, self.precision = folder.config, folder.origin["precision"]
        self.memory: list[dict[str, Any]] = []  # snapshots so far

    @cached_property
    @stage("Reading the token table")
    def table(self) -> TokenTable:
        config, corpus = self.config, self.texts.get("corpus")
        return load_table(config.data, config.model.hidden_size, config.runtime.seed, corpus)

    @cached_property
    @stage("Reading the tokenizer")
    def tokenizer(self) -> PreTrainedTokenizerFast:
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
        has_contexts = self.config.reads == "contexts"
        window = self.config.model.context_window if has_contexts else 1
        for split, stream in ids.items():
            if len(stream) <= window:
                shorter = ", or lower model.max_contexts" if has_contexts else ""
                raise UserError(
                    f"The {split} stream has {len(stream)} tokens; it needs more than {window}, one context "
                    f"window: use more or longer conversations (data.{SETTING_OF[split]}){shorter}."
                )
        self.memory.append(snapshot("data loaded", self.device))
        return ids

    @cached_property
    def model(self) -> ContextKV:
        """The model on its device, untrained until a stage trains or loads its parts."""
        with stage("Building the model"):
            model = self.new_model()
            try_plugins(model, self.config.plugins)
        self.memory.append(snapshot("model built", self.device))
        return model

    def new_model(self, other_seed: bool = False) -> ContextKV:
        """Build the untrained model on its device; with `other_seed`, all that is drawn is different."""
        config, log_unigram = self.config, log_frequencies(self.config.data, self.texts.get("corpus"))
        if other_seed:
            config = config.replace({"runtime.seed": config.runtime.seed ^ 1})
        return frozen_model(config, self.table.weight, log_unigram).to(self.device)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What stages are computed from beside settings and code: digests by name, for `keys`."""
        unigram = self.config.data.unigram
        counted = "" if unigram == "none" else self.texts["corpus"].fingerprint
        return {
            "train text": self.texts["train"].fingerprint,
            "validation text": self.texts["validation"].fingerprint,
            "test text": self.texts["test"].fingerprint,
            "log-frequencies": f"{unigram} {counted}",
            "tokenizer": tokenizer_digest(self.tokenizer),
            "token table": self.table.fingerprint,
            "precision": self.precision,
        }

    def key(self, name: str) -> str:
        return stage_key(name, self.folder, self.inputs)

    def finished(self, name: str, linked: bool = False) -> Stage | None:
        """Return a stage that counts, of this run or, if it may be `linked`, of one beside it."""
        key = self.key(name)
        return self.folder.finished(name, key) or (self.folder.link(name, key) if linked else None)

    def record(self, metric: Metric) -> None:
        """Append a metric to metrics.jsonl, and pass it on to the listener; only rank 0 does."""
        if not ranks.rank():
            self.folder.append_metric(metric)
            self.listener(metric)

    def replay(self, finished: Stage) -> None:
        """Pass the metrics of a reused stage on to the listener, marked as `replayed`."""
        for metric in finished.metrics if not ranks.rank() else ():
            self.listener({**metric, "replayed": True})


@stage("Reading the conversations")
def read_splits(config: ExperimentConfig) -> dict[str, Conversations]:
    """Read the conversations of an experiment; a UserError if the source is missing, damaged or too small."""
    splits: list[Split] = ["train", "validation", "test"]
    splits += ["corpus"] if config.data.reads_corpus else []
    return {split: load_conversations(config.data, split) for split in splits}
