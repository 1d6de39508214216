"""Open a run to inspect its model and tokenizer, and the streams that the model reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.config import Split
from ..data.tokens import TokenStream, load_tokenizer
from ..errors import UserError, friendly_errors, is_utf8
from ..files import expanded, read_tensors
from ..method.config import Phase1Config
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..method.scoring import EVALUATION_ROWS
from ..method.streams import DTYPES, Batch, Stream
from ..plugins.plugins import KINDS
from ..progress import log, status_line
from ..store import Inputs, Work, entry_folder, flat, intact_entry
from .build import WEIGHTS, load_weights, model_with_table, parameter_counts
from .config import require_known
from .contexts import contexts_entry, load_streams, read_stream
from .device import choose_device, torch_state
from .plan import Plan, changed_code
from .steps import OWN_PARTS, STORE_PREFIX, RunFolder, finished
from .summary import Run, run_from_records
from .training import prepare_streams

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerFast

STREAM_SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "test": "test",
}  # the streams of a run, and their splits
EXACT = Phase1Config(context_method="exact")  # for contexts of new text
OtherContexts = Tensor | Callable[[Tensor], Tensor]


@dataclass
class OpenRun:
    """An open run with its model and tokenizer. The run is finished, or prepared for Phase 2.

    Attributes:
        run: the run. If it is only prepared, its summary has only `tokens`, `parameters`, `phase1`, `memory`
            and `caches_mib`.
        model: the model in evaluation mode.
        tokenizer: the tokenizer of the run.
        plan: reads the run's texts and tokens when they are needed.
        inputs: the inputs of the test (see `store`), which identify all texts of the run.
        uses: digests of the files that Phase 2 used.
    """

    run: Run
    model: ContextKV
    tokenizer: "PreTrainedTokenizerFast"
    plan: Plan
    inputs: Inputs
    uses: dict[str, str]

    @cached_property
    def streams(self) -> dict[str, Stream]:
        """The streams "train" and "val" as Phase 2 read them.

        They are memory-mapped from the store. If they are not there, they are computed again.

        Raises:
            UserError: The run's conversations cannot be read, or have changed since the run.
        """
        if not self.model.has_contexts:
            return {name: Stream(self.tokens(STREAM_SPLITS[name]).ids.int()) for name in ("train", "val")}
        inputs = self.inputs["before"]["phase2"]["before"]["contexts"]
        table = {name: self.uses[name] for name in ("table",) if name in self.uses}
        digest, record = self.uses[f"{STORE_PREFIX}contexts"], intact_entry("contexts", inputs, table)
        if record and record.output == digest:
            return load_streams(entry_folder("contexts", inputs))
        with torch_state():
            if self.run.config.phase1.context_method == "exact":
                train, val = (
                    read_stream(self.model, EXACT, self.tokens(STREAM_SPLITS[name]).ids)
                    for name in ("train", "val")
                )
                assert train.contexts is not None
                return {
                    "train": replace(train, contexts=train.contexts.to(DTYPES[self.plan.precision])),
                    "val": val,
                }
            # Parallel passes start from contexts that only Phase 1 leaves, so Phase 1 is repeated.
            self.tokens("train")
            path, record = contexts_entry(self.plan, table.get("table"))
            if record.output != digest:
                log("The contexts were computed again. This machine rounds differently from the run's.")
            return load_streams(path)

    def tokens(self, split: Split) -> TokenStream:
        """Return the tokens of a split. Raises UserError if its conversations have changed since the run."""
        if self.plan.digest(split) != flat(self.inputs)[f"#{split} text"]:
            data = self.run.config.data
            raise UserError(
                f"The conversations of {data.path or data.source} for {split} are not those that "
                f"{self.run.path} was made from; restore them, or make a new run."
            )
        return self.plan.tokens[split]

    def stream(self, split: str) -> "OpenStream":
        """Return the stream that the run read for a split, which is "train", "val" or "test".

        Raises:
            UserError: The split is unknown or has no text, or its conversations have changed since the run.
        """
        require_known("split", split, STREAM_SPLITS)
        if split != "test":
            return OpenStream(self, self.streams[split])
        config = self.run.config
        if not config.data.test_samples:
            raise UserError(f"{self.run.path} has no test text; make a run with data.test_samples above 0.")
        with torch_state():
            stream = read_stream(self.model, config.phase1, self.tokens("test").ids, config.runtime.seed)
            return OpenStream(self, stream)

    def memory_span(self, split: str = "val", most: int = 40) -> "DataFrame":
        """Measure how many of the last tokens can be read from a context, and the same before Phase 1.

        A linear readout is fitted on the beginning of the training text and evaluated on a split; on "train",
        on its end.

        Returns:
            the table of `ctxkv.memory_span`, with the columns `untrained_r2` and `untrained_recovered` and
            the attributes `untrained_span` and `untrained_span_error` for the run's block before Phase 1.

        Raises:
            UserError: The layer reads tokens, the split is unknown, or the text is too short for `most`.
        """
        from .memory_span import span_of_run

        self.stream(split).contexts()  # raises if there are none
        return span_of_run(self, split, most)

    def read(self, text: str) -> "OpenStream":
        """Prepend an end-of-text token to a text, and read both, as `evaluate_texts` does.

        At position 0, the model reads the end-of-text token and predicts the first token of the text.
        Contexts are computed with the method `exact`.

        Raises:
            UserError: The text is empty or not UTF-8.
        """
        require_text("text", text)
        ids = torch.tensor([self.tokenizer.eos_token_id, *self.tokenizer(text)["input_ids"]])
        with torch_state():
            return OpenStream(self, read_stream(self.model, EXACT, ids))


def require_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text or not is_utf8(text):
        raise UserError(f"The {name} is empty or not UTF-8; give at least one character, in UTF-8.")


@dataclass(frozen=True)
class OpenStream:
    """A stream of n + 1 tokens. At position i, the run's model reads token i and predicts token i + 1.

    The methods return tensors on the CPU.

    Attributes:
        opened: the run, with its model and tokenizer.
        stream: a `Stream` with the tokens and their contexts.
    """

    opened: OpenRun
    stream: Stream

    def __len__(self) -> int:
        """Return the number of positions, n."""
        return len(self.stream)

    @property
    def ids(self) -> Tensor:
        """The tokens, int32 `[n + 1]`."""
        return self.stream.ids.cpu()

    def contexts(self) -> Tensor:
        """Return all contexts, `[n, context_dim]`, as they are stored. Row i belongs to position i."""
        if self.stream.contexts is None:
            raise UserError(f"The layer of {self.opened.run.path} reads tokens, so the run has no contexts.")
        return self.stream.contexts[1:].cpu()

    def attention(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Compute attention weights at the given positions, float32 `[len(positions), heads, slots]`.

        `opened.model.window.slots(positions)` returns the position of the context in each slot.
        """
        return self._computed(positions, self._attention_weights)

    def logits(self, positions: Sequence[int] | Tensor, contexts: OtherContexts | None = None) -> Tensor:
        """Compute the next-token logits at the given positions, float32 `[len(positions), vocab_size]`.

        Args:
            contexts: what attention reads instead of the stream's contexts: other contexts of all positions,
                `[n, context_dim]`, or a function that gets the windows of some positions, `[m, slots,
                context_dim]`, nearest slot first, and returns other windows of the same shape.

        Raises:
            UserError: A position or the shape of `contexts` is wrong, or the layer reads tokens.
        """
        model = self.opened.model
        return self._computed(positions, lambda batch: torch.cat([*model.predictions(batch)]), contexts)

    def token_losses(self, contexts: OtherContexts | None = None) -> Tensor:
        """Compute the loss of every prediction in nats, float32 `[n]`. Perplexity is `exp(losses.mean())`.

        `contexts` replaces what attention reads, as in `logits`.
        """
        scores = self.opened.model.scores
        return self._computed(torch.arange(len(self)), lambda batch: scores(batch)[0], contexts)

    def _attention_weights(self, batch: Batch) -> Tensor:
        weights = self.opened.model.read(batch)[1]
        if weights is None:
            raise UserError(f"The model of {self.opened.run.path} returns no attention weights.")
        return weights

    @torch.no_grad()
    def _computed(
        self,
        positions: Sequence[int] | Tensor,
        compute: Callable[[Batch], Tensor],
        contexts: OtherContexts | None = None,
    ) -> Tensor:
        """Call `compute` on batches of the given positions, and return the concatenated results."""
        order = torch.as_tensor(positions).cpu()
        if not (order.ndim == 1 and len(order) and order.min() >= 0 and order.max() < len(self)):
            last = len(self) - 1
            raise UserError(f"positions are {positions}; allowed: a list of numbers from 0 to {last}.")
        with torch_state():
            stream = self._with_contexts(contexts) if isinstance(contexts, Tensor) else self.stream
            batches = self.opened.model.batches(stream, order.long(), EVALUATION_ROWS)
            if callable(contexts):
                batches = (self._with_windows(batch, contexts) for batch in batches)
            return torch.cat([compute(batch).float().cpu() for batch in batches])

    def _with_contexts(self, contexts: Tensor) -> Stream:
        """Return the stream with other contexts, `[n, context_dim]`."""
        _require_shape(contexts, self.contexts().shape)
        stored = self.stream.contexts
        assert stored is not None
        return replace(self.stream, contexts=torch.cat([stored[:1], contexts.to(stored)]))

    def _with_windows(self, batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch whose windows are the result of `change`."""
        self.contexts()  # raises if there are none
        window, present = batch.inputs
        changed = change(window)
        _require_shape(changed, window.shape)
        return replace(batch, inputs=(changed.to(window), present))


def _require_shape(contexts: Any, shape: Sequence[int]) -> None:
    if not isinstance(contexts, Tensor) or contexts.shape != shape:
        words = f"of shape {[*contexts.shape]}" if isinstance(contexts, Tensor) else repr(contexts)
        raise UserError(f"contexts are {words}; allowed here: a tensor of shape {[*shape]}.")


@friendly_errors()
def open_run(run: Run | Path | str, device: str = "cpu") -> OpenRun:
    """Open a finished run.

    Args:
        run: a run, or its folder.
        device: device of the model: cpu, cuda, mps, or auto.

    Raises:
        UserError: There is no finished run, a file is damaged, or a plug-in is missing or has changed.
    """
    path = run.path if isinstance(run, Run) else expanded(run)
    records = finished(path, "settings", "phase2", "test")
    if "table" in records["phase2"].uses:
        finished(path, "table")
    run = run_from_records(path, records, run.config if isinstance(run, Run) else None)
    _require_same_parts(run)
    if words := changed_code(records["phase2"].inputs):
        log(f"{path} was made with another version of the method's code ({words}), so results may differ.")
    with status_line("Loading the model"), torch_state():
        model = model_with_table(run.config, path, read_tensors(path / WEIGHTS).get("log_unigram"))
        load_weights(model, path)
        tokenizer = load_tokenizer(run.config.data.tokenizer)
    plan = Plan(run.config, path, choose_device(device), run.summary["provenance"]["precision"])
    return OpenRun(
        run, model.to(plan.device), tokenizer, plan, records["test"].inputs, records["phase2"].uses
    )


def _require_same_parts(run: Run) -> None:
    """Raise UserError if a part of the model has changed or is missing, and say where its source text is."""
    for kind, plugin in run.config.plugins.items():
        source = run.path / OWN_PARTS / f"{kind}.py"
        try:
            if KINDS[kind].is_module:
                plugin.require_same_code()
        except UserError as error:
            if not source.is_file():
                raise
            raise UserError(f"{error} The source text that the run was made with is in {source}.") from None


def open_prepared(folder: RunFolder, plan: Plan) -> OpenRun:
    """Compute the contexts of an experiment, or read them from the store, and open it before Phase 2."""
    table = finished(folder.path).get("table")
    work = Work(folder.path, plan.inputs["phase2"], {"table": table.output} if table else {}, folder.listen)
    phase1, streams = prepare_streams(plan, work)
    parameters = parameter_counts(plan.model)
    if phase1["objective"]:
        parameters["objective"] = phase1["objective"]
    summary = {name: phase1[name] for name in ("phase1", "tokens", "caches_mib")}
    summary |= {"memory": [*work.memory, snapshot("phase 2 prepared", plan.device)], "parameters": parameters}
    run = Run(folder.path, plan.config, summary, work.metrics)
    opened = OpenRun(run, plan.model.eval(), plan.tokenizer, plan, plan.inputs["test"], work.uses)
    opened.streams = streams
    return opened
