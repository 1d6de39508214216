"""The model: a frozen token table, a recurrent block, a layer, and an output head tied to the table."""

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

MIXED_ROWS = 256  # positions per chunk when copied tokens are mixed into the logits
TOKEN_CHUNK = 64  # consecutive positions that an epoch visits together if the layer reads tokens

Shard = Callable[[int], slice]  # selects the rows of a batch that this process computes; see `Loop.shard`


@functools.cache
def _derived(kind: Any, base: Any) -> Any:
    """Return a subclass of the user's class `kind` that inherits whatever `kind` lacks from `base`."""

    # Pickle can find only the class that the user wrote, not the subclass.
    def reduce(part: Any, _: int) -> tuple[Any, ...]:
        return _blank, (kind, base), vars(part)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduce}
    return type(kind.__name__, (kind, base), {**names, "as_written": kind})


def _blank(kind: Any, base: Any) -> Any:
    """Return an empty object of the class that `_derived` returns; pickle then restores its state."""
    derived: Any = _derived(kind, base)
    return derived.__new__(derived)


def with_defaults(part: nn.Module, base: Any) -> Any:
    """Add the defaults of `base` to `part` if its class does not inherit from `base`, and return `part`."""
    if not isinstance(part, base):
        kind: Any = type(part)
        part.__class__ = _derived(kind, base)  # like `torch.nn.utils.parametrize`
    return part


def class_as_written(part: nn.Module) -> type[nn.Module]:
    """Return the class of a block or layer as its author wrote it, before `with_defaults` changed it."""
    kind: type[nn.Module] = vars(type(part)).get("as_written", type(part))
    return kind


class ContextKV(nn.Module):
    """The language model: token table, block (if the layer reads contexts), layer and output head.

    The output head *is* the table (`hidden @ wte.weight.T`). Table and embedding norm are never trained.

    Attributes:
        log_unigram: the tokens' log-frequencies, float32 `[vocab_size]`, a bias of the logits that is never
            trained; None adds no bias.
        context_block: the block, which Phase 1 trains; None if the layer reads tokens.
        layer: the layer, which Phase 2 trains.
        window: gathers the layer's inputs at given positions of a cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int = GPT2_VOCAB_SIZE,
        has_unigram: bool = False,
        block: Callable[[int, int], nn.Module] | None = ContextBlock,
        layer: Callable[[ModelConfig], nn.Module] = AttentionLayer,
    ) -> None:
        """Build the model. Its random weights depend only on torch's seed and on the shapes.

        Args:
            block: the block's class or a function that builds the block; None if the layer reads tokens.
            layer: the layer's class or a function that builds the layer.
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
        """Return the block or the layer; `hook` is "block" or "layer"."""
        return {"block": self.context_block, "layer": self.layer}[hook]

    def set_phase(self, phase: Literal[1, 2]) -> None:
        """Choose what is trained: only the block in Phase 1, and only the layer in Phase 2."""
        self.requires_grad_(False)
        (self.context_block if phase == 1 else self.layer).requires_grad_(True)

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the current phase trains, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def load_table(self, table: Tensor, log_unigram: Tensor | None = None) -> None:
        """Load the frozen tensors: token table, float32 `[vocab_size, hidden_size]`, and `log_unigram`."""
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
        """Return the normed embeddings of tokens, `[..., hidden_size]`; `input_ids` may have any shape."""
        return self.embedding_norm(self.wte(input_ids))

    def apply_layer(self, embeddings: Tensor, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Call the layer; return its hidden states, and its attention weights or None."""
        if not torch.is_autocast_enabled(embeddings.device.type):  # autocast converts inputs itself
            inputs = tuple(x.to(embeddings.dtype) if _is_floating_point(x) else x for x in inputs)
        output = self.layer(embeddings, *inputs)
        return output if isinstance(output, tuple) else (output, None)

    def batch(self, cache: Cache, positions: Tensor) -> Batch:
        """Gather the layer's inputs at `positions`, int64 `[n]` on any device, into a batch.

        The batch is on the model's device. Outside of training, it includes the tokens to copy.
        """
        batch = self.window.gather(cache, positions, self.training)
        if self.layer.copying and not self.training and len(positions):
            batch = replace(batch, copied=self._copied(cache, positions))
        return batch.to(self.device)

    def batches(self, cache: Cache, order: Tensor, size: int, shard: Shard | None = None) -> Iterator[Batch]:
        """Yield batches of `size` positions from `order`, int64 `[n]`; `shard` selects one process's rows."""
        for positions in order.to(cache.ids.device).split(size) if len(order) else ():
            yield self.batch(cache, positions if shard is None else positions[shard(len(positions))])

    def _copied(self, cache: Cache, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of `mix`: the tokens to copy at each position, and their shares, `[n, reach]`."""
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
        """Compute the hidden states of a batch, `[n, hidden_size]`, and its attention weights or None."""
        embeddings = batch.embeddings
        if embeddings is None:
            embeddings = self.embed(batch.tokens if batch.rows is None else batch.rows)
        hidden, weights = self.apply_layer(embeddings, *batch.inputs)
        return (hidden if batch.places is None else hidden.flatten(0, 1)[batch.places]), weights

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Compute logits without copying, `[..., vocab_size]`; `tokens`, `[...]`, are the current tokens."""
        logits = F.linear(hidden, self.wte.weight, self.log_unigram)
        if self.layer.current_token_bias:
            add_to_logit(logits, tokens, self.layer.current_token_bias)
        return logits

    def losses(
        self, hidden: Tensor, tokens: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute each prediction's loss and correctness without copying; see `frozen_head_cross_entropy`.

        `table` is the token table in the dtype of the matrix products; None means the model's own table.
        """
        table = self.wte.weight if table is None else table
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # sum in float32 or wider
        bias, token_bias = self.log_unigram, self.layer.current_token_bias
        return frozen_head_cross_entropy(hidden, table, targets, bias, tokens, token_bias)

    def predictions(self, batch: Batch) -> Iterator[Tensor]:
        """Yield logits that include copying, `[m, vocab_size]`, in chunks of `MIXED_ROWS` positions."""
        hidden, _ = self.read(batch)
        for rows in torch.arange(len(batch), device=hidden.device).split(MIXED_ROWS):
            logits = self.logits(hidden[rows], batch.tokens[rows])
            yield logits if batch.copied is None else mix(logits, *(part[rows] for part in batch.copied))

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute each prediction's loss in nats, float32 `[n]`, and correctness, bool `[n]`."""
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
