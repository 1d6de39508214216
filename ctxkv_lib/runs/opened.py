"""Open a run to inspect its model, caches and tokenizer, and the streams that the model reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.config import Split
from ..data.conversations import load_conversations
from ..data.token_table import load_table
from ..data.tokens import load_tokenizer, validation_stream
from ..errors import UserError, friendly_errors, is_utf8
from ..files import expanded, read_tensors
from ..method.caches import Batch, Cache
from ..method.config import Phase1Config
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..method.scoring import EVALUATION_ROWS, token_scores
from ..plugins.hooks import HOOKS
from ..progress import log, status_line
from .build import frozen_model, load_caches, load_weights, parameter_counts, saved_weights
from .config import require_known
from .device import choose_device, torch_state
from .folder import TABLE_SHARD, RunFolder
from .inputs import Inputs, result_code
from .stages import OWN_PARTS, load_streams, read_stream
from .summary import Run, finished_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

READ_AT_ONCE = ("checkpoint", TABLE_SHARD)  # read when opening a run
SPLITS = ("train", "val", "test")  # the streams of a run
EXACT = Phase1Config(context_method="exact")  # for contexts of new text


@dataclass
class OpenRun:
    """An open run with its model and tokenizer. The run is finished, or prepared for Phase 2.

    Attributes:
        run: the run. If it is only prepared, its summary has only `tokens`, `parameters`, `phase1`, `memory`
            and `caches_mib`.
        model: the model in evaluation mode.
        tokenizer: the tokenizer of the run.
        caches: a `Cache` for "train" and for "val". The caches of a finished run are memory-mapped.
    """

    run: Run
    model: ContextKV
    tokenizer: "PreTrainedTokenizerFast"

    @cached_property
    def caches(self) -> dict[str, Cache]:
        """The caches of the training and validation streams, checked and memory-mapped on first use."""
        finished_run(RunFolder.open(self.run.path), "caches")
        return load_caches(self.run.path / "caches")

    def stream(self, split: str) -> "Stream":
        """Return the stream that the run read for a split, which is "train", "val" or "test".

        Raises:
            UserError: The split is unknown or has no text, or its conversations have changed since the run.
        """
        require_known("split", split, SPLITS)
        if split != "test":
            return Stream(self, self.caches[split])
        config = self.run.config
        if not config.data.size("test"):
            raise UserError(f"{self.run.path} has no test text; make a run with data.test_samples above 0.")
        refuse_other_texts(self.run, "test", self.run.summary.get("test", {}).get("fingerprint"))
        ids = validation_stream(load_conversations(config.data, "test"), self.tokenizer).ids
        with torch_state():
            return Stream(self, read_stream(self.model, config.phase1, ids, config.runtime.seed))

    def read(self, text: str) -> "Stream":
        """Read a text with an end-of-text token in front of it, in the same way as `evaluate_texts`.

        At position 0, the model reads the end-of-text token and predicts the first token of the text.
        Contexts are computed with the method `exact`.

        Raises:
            UserError: The text is empty or not UTF-8.
        """
        require_text("text", text)
        ids = torch.tensor([self.tokenizer.eos_token_id, *self.tokenizer(text)["input_ids"]])
        with torch_state():
            return Stream(self, read_stream(self.model, EXACT, ids))


def require_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text or not is_utf8(text):
        raise UserError(f"The {name} is empty or not UTF-8; give at least one character, in UTF-8.")


@dataclass(frozen=True)
class Stream:
    """A stream of n + 1 tokens. At position i, the run's model reads token i and predicts token i + 1.

    The methods return tensors on the CPU.

    Attributes:
        opened: the run, with its model and tokenizer.
        cache: a `Cache` with the tokens and their contexts.
    """

    opened: OpenRun
    cache: Cache

    def __len__(self) -> int:
        """Return the number of positions, n."""
        return len(self.cache)

    @property
    def ids(self) -> Tensor:
        """The tokens, int32 `[n + 1]`."""
        return self.cache.ids.cpu()

    def contexts(self) -> Tensor:
        """Return all contexts, `[n, context_dim]`, in the dtype of the cache. Row i belongs to position i."""
        if self.cache.contexts is None:
            raise UserError(f"The layer of {self.opened.run.path} reads tokens, so the run has no contexts.")
        return self.cache.contexts[1:].cpu()

    def attention(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Compute attention weights at the given positions, float32 `[len(positions), heads, slots]`.

        `opened.model.window.slots(positions)` returns the position of the context in each slot.
        """
        return self._computed(positions, self._attention_weights)

    def logits(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Compute the next-token logits at the given positions, float32 `[len(positions), vocab_size]`."""
        return self._computed(positions, lambda batch: torch.cat([*self.opened.model.predictions(batch)]))

    def token_losses(self) -> Tensor:
        """Compute the loss of every prediction in nats, float32 `[n]`. Perplexity is `exp(losses.mean())`."""
        with torch_state():
            return token_scores(self.opened.model, self.cache, torch.arange(len(self)))[0].cpu()

    def _attention_weights(self, batch: Batch) -> Tensor:
        weights = self.opened.model.read(batch)[1]
        if weights is None:
            raise UserError(f"The model of {self.opened.run.path} returns no attention weights.")
        return weights

    @torch.no_grad()
    def _computed(self, positions: Sequence[int] | Tensor, compute: Callable[[Batch], Tensor]) -> Tensor:
        """Call `compute` on batches of the given positions, and return the concatenated results."""
        order = torch.as_tensor(positions).cpu()
        if not (order.ndim == 1 and len(order) and order.min() >= 0 and order.max() < len(self)):
            last = len(self) - 1
            raise UserError(f"positions are {positions}; allowed: a list of numbers from 0 to {last}.")
        with torch_state():
            batches = self.opened.model.batches(self.cache, order.long(), EVALUATION_ROWS)
            return torch.cat([compute(batch).float().cpu() for batch in batches])


@friendly_errors()
def open_run(run: Run | Path | str, device: str = "cpu") -> OpenRun:
    """Open a finished run.

    Args:
        run: a run, or its folder.
        device: device of the model: cpu, cuda, mps, or auto.

    Raises:
        UserError: There is no finished run, a file is damaged, or a plug-in is missing or has changed.
    """
    folder = RunFolder.open(run.path if isinstance(run, Run) else expanded(run))
    run = finished_run(folder, *READ_AT_ONCE)
    _require_same_parts(run)
    if folder.records["phase2"].made_from["code"] != result_code():
        log(f"{run.path} was made with a different version of the method's code, so results may differ.")
    with status_line("Loading the model"), torch_state():
        log_unigram = saved_weights(run.path).get("log_unigram")
        model = frozen_model(run.config, _token_table(run), log_unigram)
        load_weights(model, run.path)
        tokenizer = load_tokenizer(run.config.data.tokenizer)
    return OpenRun(run, model.to(choose_device(device)), tokenizer)


def _require_same_parts(run: Run) -> None:
    """Raise UserError if a part of the model has changed or is missing, and say where its source text is."""
    for hook, plugin in run.config.plugins.items():
        source = run.path / OWN_PARTS / f"{hook}.py"
        try:
            if HOOKS[hook].is_module:
                plugin.require_same_code()
        except UserError as error:
            if not source.is_file():
                raise
            raise UserError(f"{error} The source text that the run was made with is in {source}.") from None


def open_prepared(folder: RunFolder, inputs: Inputs) -> OpenRun:
    """Open an experiment after its contexts are computed and before Phase 2 is trained."""
    streams, _ = load_streams(inputs, folder.path)
    contexts = folder.records["contexts"]
    memory = [*contexts.memory, snapshot("phase 2 prepared", inputs.device)]
    parameters = {**parameter_counts(inputs.model), **contexts.result.get("parameters", {})}
    summary = {**contexts.result, "memory": memory, "parameters": parameters}
    run = Run(folder.path, inputs.config, summary, folder.metrics(["contexts"]))
    opened = OpenRun(run, inputs.model.eval(), inputs.tokenizer)
    opened.caches = streams
    return opened


def _token_table(run: Run) -> Tensor:
    """Read a run's token table from its model folder. If that folder is missing, rebuild the table."""
    for shard in run.path.glob(f"{TABLE_SHARD}*"):
        return read_tensors(shard)["model.wte.weight"]
    config, provenance = run.config, run.summary["provenance"]
    refuse_other_texts(run, "corpus", provenance["data"].get("corpus_fingerprint"))
    corpus = load_conversations(config.data, "corpus") if config.data.reads_corpus else None
    table = load_table(config.data, config.model.hidden_size, config.runtime.seed, corpus)
    if table.fingerprint != provenance["embeddings"]["fingerprint"]:
        raise UserError(
            f"The token table of {run.path} cannot be rebuilt, since its text or its code has changed; "
            f"restore {config.data.path or 'them'}, or make a new run."
        )
    return table.weight


def refuse_other_texts(run: Run, split: Split, fingerprint: str | None) -> None:
    """Raise UserError if `fingerprint` is given and a split's conversations have a different fingerprint."""
    data = run.config.data
    if fingerprint not in (None, load_conversations(data, split).fingerprint):
        raise UserError(
            f"The conversations of {data.path or data.source} for {split} are not those that {run.path} was "
            "made from; restore them, or make a new run."
        )
