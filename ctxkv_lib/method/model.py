"""The model: a frozen token table, a recurrent block, the layer, and an output head tied to the table."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, ContextBlock
from .caches import Batch, Cache, rows_of
from .config import GPT2_VOCAB_SIZE, ModelConfig, Phase1Config
from .contexts import distinct_rows
from .copying import mix
from .layer import AttentionLayer, Layer
from .losses import add_to_logit, frozen_head_cross_entropy
from .windows import ContextWindow, TokenWindow

MIXED_ROWS = 256  # positions per chunk when logits with copies are computed
TOKEN_CHUNK = 64  # consecutive positions that an epoch visits together if the layer reads tokens

Shard = Callable[[int], slice]  # returns the rows of a batch that a process takes; see `Loop.shard`


@functools.cache
def _derived(kind: Any, base: Any) -> Any:
    """Return a subclass of `kind`, a user's class, that inherits everything else from `base`."""

    def reduce(part: Any, _: int) -> tuple[Any, ...]:  # pickle looks up the class that the user wrote
        return _blank, (kind, base), vars(part)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduce}
    return type(kind.__name__, (kind, base), {**names, "as_written": kind})


def _blank(kind: Any, base: Any) -> Any:
    """Return an empty object of the class derived from both; pickle then restores its state."""
    derived: Any = _derived(kind, base)
    return derived.__new__(derived)


def with_defaults(part: nn.Module, base: Any) -> Any:
    """Give a part the defaults of `base` if its class does not inherit from `base`; return the part."""
    if not isinstance(part, base):
        kind: Any = type(part)
        part.__class__ = _derived(kind, base)  # torch's own parametrizations do the same
    return part


def class_as_written(part: nn.Module) -> type[nn.Module]:
    """Return the class of a part as its author wrote it, before `with_defaults`."""
    kind: type[nn.Module] = vars(type(part)).get("as_written", type(part))
    return kind


class ContextKV(nn.Module):
    """The language model: token table, block (if the layer reads contexts), layer and output head.

    The output head *is* the table (`hidden @ wte.weight.T`). Table and embedding norm are never trained.

    Attributes:
        log_unigram: a bias that is added to the logits, float32 `[vocab_size]`, never trained; or None.
        context_block: what Phase 1 trains; None if the layer reads tokens.
        layer: what Phase 2 trains.
        window: gathers what the layer reads from a cache at a position.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int = GPT2_VOCAB_SIZE,
        has_unigram: bool = False,
        block: Callable[[int, int], nn.Module] | None = ContextBlock,
        layer: Callable[[ModelConfig], nn.Module] = AttentionLayer,
    ) -> None:
        """Make all parts. Their random weights depend only on torch's seed and on the shapes.

        Args:
            block: makes the recurrence; see `Block`. None if the layer reads tokens.
            layer: makes what Phase 2 trains; see `Layer`.
        """
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size)
        self.register_buffer("log_unigram", torch.zeros(vocab_size) if has_unigram else None)
        self.context_block: Any = None
        if block:
            self.context_block = with_defaults(block(config.context_dim, config.hidden_size), Block)
            self.context_block.context_dim = config.context_dim
        self.layer: Layer = with_defaults(layer(config), Layer)
        self.window: Any = self._window()
        self.set_phase(2)

    def _window(self) -> ContextWindow | TokenWindow:
        layer = self.layer
        if layer.reads == "tokens":
            return TokenWindow(layer.history, layer.evaluation_history, layer.chunk or TOKEN_CHUNK)
        return ContextWindow(layer.slot_offsets(self.config), layer.chunk or 1)

    def part(self, hook: str) -> nn.Module:
        """Return the model's part for a hook: "block" or "layer"."""
        return {"block": self.context_block, "layer": self.layer}[hook]

    def set_phase(self, phase: Literal[1, 2]) -> None:
        """Choose what is trained: only the block in Phase 1, and only the layer in Phase 2."""
        self.requires_grad_(False)
        (self.context_block if phase == 1 else self.layer).requires_grad_(True)

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the current phase trains, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def load_table(self, table: Tensor, log_unigram: Tensor | None = None) -> None:
        """Load the frozen tensors: the table, float32 `[vocab_size, hidden_size]`, and `log_unigram`."""
        self.wte.weight.data.copy_(table)
        self.log_unigram = log_unigram

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def init_layer(self, ids: Tensor, config: Phase1Config) -> None:
        """Let the layer initialise its weights before Phase 2.

        `ids`, integers `[n]`, are the tokens that Phase 1 trains on.
        """
        self.layer.init_weights(*distinct_rows(self, ids), config)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up normed token embeddings of ids of any shape: `[..., hidden_size]`."""
        return self.embedding_norm(self.wte(input_ids))

    def apply_layer(self, embeddings: Tensor, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Call the layer's `forward` (see `Layer`); return its hidden states and any attention weights."""
        if not torch.is_autocast_enabled(embeddings.device.type):  # autocast casts inputs where they are used
            inputs = tuple(x.to(embeddings.dtype) if _is_floating_point(x) else x for x in inputs)
        output = self.layer(embeddings, *inputs)
        return output if isinstance(output, tuple) else (output, None)

    def batch(self, cache: Cache, positions: Tensor) -> Batch:
        """Gather on the model's device what the layer reads at `positions`, int64 `[n]` on any device.

        Outside of training, the batch also holds what the model copies.
        """
        batch = self.window.gather(cache, positions, self.training)
        if self.layer.copying and not self.training and len(positions):
            batch = replace(batch, copied=self._copied(cache, positions))
        return batch.to(self.device)

    def batches(self, cache: Cache, order: Tensor, size: int, shard: Shard | None = None) -> Iterator[Batch]:
        """Yield batches of `size` positions in `order`, int64 `[n]`; with `shard`, one process's part."""
        for positions in order.to(cache.ids.device).split(size) if len(order) else ():
            yield self.batch(cache, positions if shard is None else positions[shard(len(positions))])

    def _copied(self, cache: Cache, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what is copied at each position, for one run of consecutive positions at a time."""
        copying, reach = self.layer.copying, self.window.offsets[-1]
        assert copying is not None
        assert cache.contexts is not None
        tokens, shares = [], []
        for run in positions.tensor_split((positions.diff() != 1).nonzero()[:, 0].cpu() + 1):
            start, stop = max(0, int(run[0]) - reach), int(run[-1]) + 1
            rows, first = run[None] - start, run.new_zeros(1)
            shares.append(copying.shares(cache.contexts[None, start + 1 : stop + 1], rows, first, reach)[0])
            followed = run[:, None] - torch.arange(reach, device=run.device)
            tokens.append(rows_of(cache.ids, followed.clamp(min=0)))
        return torch.cat(tokens), torch.cat(shares)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Compute the hidden states of a batch, `[n, hidden_size]`, and any attention weights."""
        embeddings = batch.embeddings
        if embeddings is None:
            embeddings = self.embed(batch.tokens if batch.rows is None else batch.rows)
        hidden, weights = self.apply_layer(embeddings, *batch.inputs)
        return (hidden if batch.places is None else hidden.flatten(0, 1)[batch.places]), weights

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Compute logits without copies, `[..., vocab_size]`; `tokens`, `[...]`, are the current tokens."""
        logits = F.linear(hidden, self.wte.weight, self.log_unigram)
        if self.layer.current_token_bias:
            add_to_logit(logits, tokens, self.layer.current_token_bias)
        return logits

    def losses(
        self, hidden: Tensor, tokens: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute loss and correctness of each prediction without copies: see `frozen_head_cross_entropy`.

        `table` is the token table in the dtype of the matrix products; None means the model's own table.
        """
        table = self.wte.weight if table is None else table
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # sum in float32 or wider
        bias, token_bias = self.log_unigram, self.layer.current_token_bias
        return frozen_head_cross_entropy(hidden, table, targets, bias, tokens, token_bias)

    def predictions(self, batch: Batch) -> Iterator[Tensor]:
        """Compute the logits of a batch with copies, `MIXED_ROWS` positions at a time: `[m, vocab_size]`."""
        hidden, _ = self.read(batch)
        for rows in torch.arange(len(batch), device=hidden.device).split(MIXED_ROWS):
            logits = self.logits(hidden[rows], batch.tokens[rows])
            yield logits if batch.copied is None else mix(logits, *(part[rows] for part in batch.copied))

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute loss in nats and correctness of each prediction: float32 and bool `[n]`."""
        if batch.copied is None:
            return self.losses(self.read(batch)[0], batch.tokens, batch.targets)
        losses, correct = [], []
        for logits, targets in zip(self.predictions(batch), batch.targets.split(MIXED_ROWS), strict=True):
            target_logits = logits.gather(1, targets[:, None])[:, 0]
            losses.append(-target_logits)
            correct.append(target_logits == logits.amax(dim=1))
        return torch.cat(losses), torch.cat(correct)


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
