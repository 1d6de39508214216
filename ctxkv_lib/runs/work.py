"""An experiment under way: its data, stage keys, model and folder."""

from dataclasses import asdict
from datetime import date
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .. import ranks
from ..data.conversations import Conversations, load_conversations
from ..data.tokens import STREAM_VERSION, load_tokenizer, train_stream, validation_stream
from ..errors import memory_advice
from ..files import digest
from ..method.memory import begin_peaks, snapshot
from ..method.model import ContextKV
from ..progress import Listener, Metric, notice, stage
from .config import ExperimentConfig
from .long_run import LongRun
from .models import check_parts, frozen_model, load_frozen
from .package_code import code_key, code_with_imports
from .provenance import choose_device, choose_precision, device_name, git_commit, set_threads, versions
from .records import Record, SummaryPart
from .refusals import refuse_short
from .run_folder import RunFolder

Texts = dict[str, Conversations]  # "train" and "val"
reading_data = memory_advice("Reading the data", "use fewer conversations with --samples")


@reading_data
def read_texts(config: ExperimentConfig) -> Texts:
    """Read the conversations for which an experiment needs no run folder.

    Raises:
        UserError: the source is missing, damaged, too small or unreachable.
    """
    with stage("Reading the conversations"):
        train = load_conversations(config.data, "train")
        return {"train": train, "val": load_conversations(config.data, "validation")}


class Work:
    """An experiment under way; streams and model are made when a stage first needs them.

    Args:
        texts: of `read_texts`.
        folder: claimed.
        listener: gets every metric in order.

    Raises:
        UserError: the token table is missing, damaged or unreachable; the device is missing.
    """

    @reading_data
    def __init__(self, config: ExperimentConfig, texts: Texts, folder: RunFolder, listener: Listener) -> None:
        self.config, self.texts, self.folder, self.listener = config, texts, folder, listener
        self.device = choose_device(config.runtime.device)
        self.memory: list[SummaryPart] = []  # snapshots so far
        threads = config.runtime.threads
        set_threads(torch.get_num_threads() if threads == "auto" else int(threads))
        begin_peaks(self.device)
        with stage("Reading the token table"):
            self.table, self.counts = load_frozen(config)
        self.precision = self._precision()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        with stage("Reading the tokenizer"):
            return load_tokenizer(self.config.data.tokenizer)

    @cached_property
    def ids(self) -> dict[str, Tensor]:
        """Token ids of both streams, "train" and "val"; uint16 on the CPU, mapped from their files.

        Raises:
            UserError: a stream is no longer than a window.
        """
        ids = {
            "train": train_stream(self.texts["train"], self.tokenizer).ids,
            "val": validation_stream(self.texts["val"], self.tokenizer).ids,
        }
        refuse_short({split: len(stream) for split, stream in ids.items()}, self.config.model)
        self.memory.append(snapshot("data loaded", self.device))
        return ids

    @cached_property
    @memory_advice("Building the model", "use fewer conversations or a smaller model, or free the GPU")
    def model(self) -> ContextKV:
        """The model on its device, untrained until a stage trains or loads its parts."""
        with stage("Building the model"):
            model = frozen_model(self.config, self.table, self.counts).to(self.device)
            check_parts(model, self.config, self.precision)
        self.memory.append(snapshot("model built", self.device))
        return model

    def _precision(self) -> str:
        """Choose the precision; where `auto` means another here, that of a finished result stays."""
        here = choose_precision(self.config.runtime.precision, self.device)
        stages = self.folder.records.stages
        made = stages["caches"].result["precision"] if "caches" in stages else here
        if made == here:
            return here
        self.precision = str(made)  # which keys depend on
        if "results" in stages and stages["phase2"].key == self.phase2_key(stages["phase1"]):
            notice(f"The finished result is in {made} and is kept; runtime.precision={here} makes another.")
            return self.precision
        notice(
            f"runtime.precision=auto was {made} where the run began and is {here} here: its caches and "
            "Phase 2 are made again."
        )
        return here

    def report(self, record: Record) -> None:
        """Send the metrics of a reused stage to the listener."""
        for metric in record.metrics:
            self.listener(metric)

    def loop(self) -> LongRun:
        """Return the hooks of a training: each metric goes to metrics.jsonl and the listener."""

        def record(metric: Metric) -> None:
            self.folder.append_metric(metric)
            self.listener(metric)

        return LongRun(record)

    def phase1_key(self) -> str:
        """Digest the inputs of Phase 1: not the window, the heads or Phase 2."""
        shapes = [self.config.model.context_dim, self.config.model.hidden_size]
        stream = [STREAM_VERSION, self.texts["train"].fingerprint, self.config.data.tokenizer]
        made_from = [*stream, self.table.fingerprint]
        settings = [asdict(self.config.phase1), self.config.runtime.seed]
        return digest([shapes, made_from, settings, *self._plugins("block", "loss", "mixer")])

    def caches_key(self, phase1: Record) -> str:
        return digest([phase1.key, phase1.files, self.texts["val"].fingerprint, self._how()])

    def phase2_key(self, phase1: Record) -> str:
        """Digest the inputs of Phase 2: not the caches, whose rounding may differ."""
        counts = self.counts and self.counts.fingerprint
        settings = [asdict(self.config.model), asdict(self.config.phase2), self._how()]
        made_from = [phase1.key, phase1.files, self.texts["val"].fingerprint, counts]
        return digest([made_from, settings, *self._plugins("attention", "mixer")])

    def model_key(self, phase2: Record) -> str:
        """Digest the inputs of the model folder for transformers, all of the model's code included."""
        return digest([phase2.key, phase2.files, code_with_imports("method/modeling")])

    def _how(self) -> list[str]:
        runtime = self.config.runtime
        return [self.precision, runtime.embedding_cache]

    def _plugins(self, *hooks: str) -> list[Any]:
        used = [self.config.plugins.get(hook) for hook in hooks]
        code = code_key(*(plugin.name for plugin in used if plugin))
        return [[plugin and plugin.to_dict() for plugin in used], code]

    def provenance(self, placement: str) -> SummaryPart:
        """Describe what the results were made from and where; `placement` is that of the caches."""
        return {
            "seed": self.config.runtime.seed,
            "date": date.today().isoformat(),
            "versions": versions(),
            "device": device_name(self.device),
            "processes": ranks.world_size(),
            "git_commit": git_commit(),
            "data": {
                "source": self.config.data.source,
                "train_fingerprint": self.texts["train"].fingerprint,
                "validation_fingerprint": self.texts["val"].fingerprint,
            },
            "embeddings": {"table": self.config.data.table, "fingerprint": self.table.fingerprint},
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "caches": placement,
        }
