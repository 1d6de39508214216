"""A run in use: its model with caches and tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.config import Split
from ..data.conversations import load_conversations
from ..data.token_table import load_table
from ..data.tokens import load_tokenizer
from ..errors import UserError, friendly_errors
from ..files import expanded, read_tensors
from ..method.caches import Batch, Cache
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..method.scoring import EVALUATION_ROWS, token_scores
from ..plugins.hooks import HOOKS
from ..progress import log, status_line
from .build import frozen_model, load_caches, load_weights, log_frequencies, parameter_counts
from .config import require_known
from .device import choose_device, torch_state
from .folder import RunFolder
from .inputs import Inputs, result_code
from .stages import load_streams
from .summary import Run, finished_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

READ_AT_ONCE = ("checkpoint", "model")  # files and folders that are read when a run is opened


@dataclass
class OpenRun:
    """A run with what it takes to look inside: finished, or prepared for Phase 2.

    A split is "train" or "val". Position i of its stream reads token i and predicts token i + 1. What the
    methods return is on the CPU.

    Attributes:
        run: of a prepared one, the summary has `tokens`, `parameters`, `phase1`, `memory` and `caches_mib`.
        model: in evaluation mode.
        caches: a `Cache` for "train" and for "val"; those of a finished run are mapped from their files.
    """

    run: Run
    model: ContextKV
    tokenizer: "PreTrainedTokenizerFast"

    @cached_property
    def caches(self) -> dict[str, Cache]:
        """The caches of both streams, which are checked and mapped when they are first used."""
        finished_run(RunFolder.open(self.run.path), "caches")
        return load_caches(self.run.path / "caches")

    def contexts(self, split: str) -> Tensor:
        """Return all contexts, `[n, context_dim]`, in the dtype of the cache: row i is that of position i."""
        contexts = self._stream(split).contexts
        if contexts is None:
            raise UserError(f"The layer of {self.run.path} reads tokens, so the run has no contexts.")
        return contexts[1:].cpu()

    def attention(self, split: str, positions: Sequence[int] | Tensor) -> Tensor:
        """Compute attention weights at some positions, float32 `[len(positions), heads, slots]`.

        `model.window.slots(positions)` are the positions whose contexts the slots hold.
        """
        return self._computed(split, positions, self._attention_weights)

    def logits(self, split: str, positions: Sequence[int] | Tensor) -> Tensor:
        """Compute logits of the next token at some positions, float32 `[len(positions), vocab_size]`."""
        return self._computed(split, positions, lambda batch: torch.cat([*self.model.predictions(batch)]))

    def token_losses(self, split: str) -> Tensor:
        """Compute the loss of every prediction, in nats, float32 `[n]`; exp(mean) is the perplexity."""
        stream = self._stream(split)
        with torch_state():
            return token_scores(self.model, stream, torch.arange(len(stream)))[0].cpu()

    def _stream(self, split: str) -> Cache:
        require_known("split", split, self.caches)
        return self.caches[split]

    def _attention_weights(self, batch: Batch) -> Tensor:
        weights = self.model.read(batch)[1]
        if weights is None:
            raise UserError(f"The model of {self.run.path} returns no attention weights to look at.")
        return weights

    @torch.no_grad()
    def _computed(
        self, split: str, positions: Sequence[int] | Tensor, compute: Callable[[Batch], Tensor]
    ) -> Tensor:
        """Compute something at some positions, batch by batch."""
        stream, order = self._stream(split), torch.as_tensor(positions).cpu()
        if not (order.ndim == 1 and len(order) and order.min() >= 0 and order.max() < len(stream)):
            last = len(stream) - 1
            raise UserError(f"positions are {positions}; allowed: a list of some from 0 to {last}.")
        with torch_state():
            batches = self.model.batches(stream, order.long(), EVALUATION_ROWS)
            return torch.cat([compute(batch).float().cpu() for batch in batches])


@friendly_errors()
def open_run(run: Run | Path | str, device: str = "cpu") -> OpenRun:
    """Open a finished run.

    Args:
        run: or its folder.
        device: where the model computes: cpu, cuda, mps, or auto.

    Raises:
        UserError: there is no finished run, a file is damaged, or a plug-in is missing or changed.
    """
    folder = RunFolder.open(run.path if isinstance(run, Run) else expanded(run))
    run = finished_run(folder, *READ_AT_ONCE)
    for hook, plugin in run.config.plugins.items():
        if HOOKS[hook].is_module:
            plugin.require_same_code()
    if folder.records["phase2"].made_from["code"] != result_code():
        log(f"{run.path} was made with different code of the method; what it computes here may differ.")
    with status_line("Loading the model"), torch_state():
        model = frozen_model(run.config, *_frozen_tensors(run))
        load_weights(model, run.path)
        tokenizer = load_tokenizer(run.config.data.tokenizer)
    return OpenRun(run, model.to(choose_device(device)), tokenizer)


def open_prepared(folder: RunFolder, inputs: Inputs) -> OpenRun:
    """Open an experiment whose contexts are computed."""
    streams, _ = load_streams(inputs, folder.path)
    contexts = folder.records["contexts"]
    memory = [*contexts.memory, snapshot("phase 2 prepared", inputs.device)]
    summary = {**contexts.result, "memory": memory, "parameters": parameter_counts(inputs.model)}
    run = Run(folder.path, inputs.config, summary, folder.metrics(["contexts"]))
    opened = OpenRun(run, inputs.model.eval(), inputs.tokenizer)
    opened.__dict__["caches"] = streams
    return opened


def _frozen_tensors(run: Run) -> tuple[Tensor, Tensor | None]:
    """Return token table and log-frequencies: of the model folder, or made again where it was not saved."""
    saved = run.path / "model" / "model.safetensors"
    if saved.is_file():
        tensors = read_tensors(saved)
        return tensors["model.wte.weight"], tensors.get("model.log_unigram")
    config, provenance = run.config, run.summary["provenance"]
    refuse_other_texts(run, "corpus", provenance["data"].get("corpus_fingerprint"))
    corpus = load_conversations(config.data, "corpus") if config.data.reads_corpus else None
    table = load_table(config.data, config.model.hidden_size, config.runtime.seed, corpus)
    if table.fingerprint != provenance["embeddings"]["fingerprint"]:
        raise UserError(
            f"The token table that {run.path} was trained with, its text or its code, is another one now; "
            f"restore {config.data.path or 'it'}, or make a new run."
        )
    return table.weight, log_frequencies(config.data, corpus)


def refuse_other_texts(run: Run, split: Split, fingerprint: str | None) -> None:
    """Raise a UserError if a split's conversations are not those with this fingerprint; None: any."""
    data = run.config.data
    if fingerprint not in (None, load_conversations(data, split).fingerprint):
        raise UserError(
            f"The conversations of {data.path or data.source} for {split} are not those that {run.path} was "
            "made from; restore them, or make a new run."
        )
