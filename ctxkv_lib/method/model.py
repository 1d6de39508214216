"""The model: a frozen token table, a recurrent block, a layer, and an output head tied to the table."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import ContextBlock, attribute_or_default
from .config import GPT2_VOCAB_SIZE, ModelConfig, Phase1Config
from .contexts import distinct_rows
from .copying import Copying, mix
from .layer import AttentionLayer, Layer
from .losses import add_to_logit, frozen_head_cross_entropy
from .streams import Batch, Stream, rows_of
from .windows import ContextWindow, TokenWindow

MIXED_ROWS = 256  # positions per chunk when copied tokens are mixed into the logits
TOKEN_CHUNK = 64  # consecutive positions that an epoch visits together if the layer reads tokens


class ContextKV(nn.Module):
    """The language model: token table, block (if the layer reads contexts), layer and output head.

    The output head *is* the table (`hidden @ wte.weight.T`). Table and embedding norm are never trained.

    Attributes:
        log_unigram: the tokens' log-frequencies, float32 `[vocab_size]`, a bias of the logits that is never
            trained; None adds no bias.
        context_block: the block, which Phase 1 trains; None if the layer reads tokens.
        layer: the layer, which Phase 2 trains.
        window: gathers the layer's inputs at given positions of a stream.
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
            self.context_block = block(config.context_dim, config.hidden_size)
        self.layer: nn.Module = layer(config)
        self.window: Any = self._window()
        self.set_phase(2)

    def _window(self) -> ContextWindow | TokenWindow:
        chunk = self._of_layer("chunk")
        if self._of_layer("reads") == "tokens":
            history, in_evaluation = (self._of_layer(name) for name in ("history", "evaluation_history"))
            return TokenWindow(history, in_evaluation, chunk or TOKEN_CHUNK)
        return ContextWindow(self._of_layer("slot_offsets")(self.config), chunk or 1)

    def _of_layer(self, name: str) -> Any:
        return attribute_or_default(self.layer, name, Layer)

    @property
    def copying(self) -> Copying | None:
        """How the model copies tokens outside of training; None if it does not."""
        copying: Copying | None = self._of_layer("copying")
        return copying

    @property
    def current_token_bias(self) -> float:
        """A number that is added to the logit of the current token."""
        return float(self._of_layer("current_token_bias"))

    @property
    def has_contexts(self) -> bool:
        """Whether the layer reads contexts. If it reads tokens, the model has no block."""
        return self.context_block is not None

    def part(self, kind: str) -> nn.Module:
        """Return the block or the layer; `kind` is "block" or "layer"."""
        return {"block": self.context_block, "layer": self.layer}[kind]

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
        """Let the layer initialize its weights before Phase 2.

        `ids`, integers `[n]`, are the tokens that Phase 1 trains on.
        """
        self._of_layer("init_weights")(*distinct_rows(self, ids), config)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the normed embeddings of tokens, `[..., hidden_size]`; `input_ids` may have any shape."""
        return self.embedding_norm(self.wte(input_ids))

    def apply_layer(self, embeddings: Tensor, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Call the layer; return its hidden states, and its attention weights or None."""
        if not torch.is_autocast_enabled(embeddings.device.type):  # autocast converts inputs itself
            inputs = tuple(x.to(embeddings.dtype) if _is_floating_point(x) else x for x in inputs)
        output = self.layer(embeddings, *inputs)
        return output if isinstance(output, tuple) else (output, None)

    def batch(self, stream: Stream, positions: Tensor) -> Batch:
        """Gather the layer's inputs at `positions`, int64 `[n]` on any device, into a batch.

        The batch is on the model's device. Outside of training, it includes the tokens to copy.
        """
        batch = self.window.gather(stream, positions, self.training)
        if self.copying and not self.training and len(positions):
            batch = replace(batch, copied=self._copied(stream, positions))
        return batch.to(self.device)

    def batches(self, stream: Stream, order: Tensor, size: int) -> Iterator[Batch]:
        """Yield batches of `size` positions from `order`, int64 `[n]`."""
        for positions in order.to(stream.ids.device).split(size) if len(order) else ():
            yield self.batch(stream, positions)

    def _copied(self, stream: Stream, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of `mix`: the tokens to copy at each position, and their shares, `[n, reach]`."""
        copying, reach = self.copying, self.window.offsets[-1]
        assert copying is not None
        assert stream.contexts is not None
        tokens, shares = [], []
        for run in positions.tensor_split((positions.diff() != 1).nonzero()[:, 0].cpu() + 1):
            start, stop = max(0, int(run[0]) - reach), int(run[-1]) + 1
            rows, first = run[None] - start, run.new_zeros(1)
            shares.append(copying.shares(stream.contexts[None, start + 1 : stop + 1], rows, first, reach)[0])
            followed = run[:, None] - torch.arange(reach, device=run.device)
            tokens.append(rows_of(stream.ids, followed.clamp(min=0)))
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
        if bias := self.current_token_bias:
            add_to_logit(logits, tokens, bias)
        return logits

    def losses(
        self, hidden: Tensor, tokens: Tensor, targets: Tensor, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute each prediction's loss and correctness without copying; see `frozen_head_cross_entropy`.

        `table` is the token table in the dtype of the matrix products; None means the model's own table.
        """
        table = self.wte.weight if table is None else table
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # sum in float32 or wider
        biases = self.log_unigram, tokens, self.current_token_bias
        return frozen_head_cross_entropy(hidden, table, targets, *biases)

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
