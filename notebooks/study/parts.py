"""Plug-ins of the second study, of the kind that a notebook cell may hold.

`make study` puts this folder on the Python path; protocols name them as `parts:Name`.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from ctxkv_lib.research.mixers import TRAINED_BURN_IN, feed_forward_width, number_of_weights
from ctxkv_lib.research.tuned import PartSettings, SlotAttention
from torch import Tensor, nn

from ctxkv_lib.method.config import ModelConfig, Phase1Config
from ctxkv_lib.method.model import ContextBlock, ContextKV, Parts
from ctxkv_lib.method.reference import dispersion_loss
from ctxkv_lib.method.settings import RATE, WEIGHT, at_least, setting
from ctxkv_lib.method.windows import Window

ROWS = 16  # segments of the stream that predictive training reads side by side
STEPS = 64  # tokens through which its gradients go back at most
DISTANCES = (0, 1, 2, 4, 8, 16)  # of the tokens that an autoencoding block reconstructs
HELD_OUT = 0.1  # share of the training stream, at its end, that chooses the epoch
INPUT_DROPOUT = 0.2  # as of recipe `tuned`
WEIGHT_DECAY = 0.01


class Chunked(SlotAttention):
    """Attention to contexts that trains on the batches of mixers: chunks of consecutive positions."""

    chunk = 64


class TwoBlocks(nn.Module):
    """Two independent ContextBlocks of half the size, side by side."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.halves = nn.ModuleList(ContextBlock(context_dim // 2, hidden_size) for _ in range(2))

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Project embeddings `[..., hidden_size]` for both halves: `[..., context_dim]`."""
        return torch.cat([half.project_inputs(embeddings) for half in self.halves], dim=-1)

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        """Compute the next contexts, `[n, context_dim]`."""
        parts = zip(self.halves, contexts.chunk(2, dim=-1), inputs.chunk(2, dim=-1), strict=True)
        return torch.cat([half(*part) for half, *part in parts], dim=-1)


class GatedBlock(nn.Module):
    """The cell of a GRU as a ContextBlock (Cho et al., 2014)."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.read = nn.Linear(hidden_size, 3 * context_dim)
        self.carry = nn.Linear(context_dim, 3 * context_dim)

    def project_inputs(self, embeddings: Tensor) -> Tensor:
        """Project embeddings `[..., hidden_size]` to `[..., 3 * context_dim]`."""
        return self.read(embeddings)

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        """Compute the next contexts, `[n, context_dim]`."""
        reset, update, new = inputs.chunk(3, dim=-1)
        reset_before, update_before, new_before = self.carry(contexts).chunk(3, dim=-1)
        keep = (update + update_before).sigmoid()
        candidate = (new + (reset + reset_before).sigmoid() * new_before).tanh()
        return torch.lerp(candidate, contexts, keep)


class PredictiveBlock(GatedBlock):
    """A gated block that is trained to predict the next token, by a head that is thrown away.

    Training is truncated backpropagation through time; the epoch with the lowest loss on the held-out end of
    the training stream is kept. With `phase1.max_iterations=0` nothing else trains it.
    """

    @dataclass(frozen=True)
    class Settings(PartSettings):
        concern: ClassVar[str] = "block"
        epochs: int = setting(6, "over the training stream, at most", at_least(1), "epochs")
        learning_rate: float = setting(0.002, "of AdamW, with a cosine down to 0", RATE)
        oacd_weight: float = setting(0.0, "of the OACD loss, added to the loss in nats", WEIGHT)

    def __init__(self, context_dim: int, hidden_size: int, settings: Settings) -> None:
        super().__init__(context_dim, hidden_size)
        self.context_dim, self.settings = context_dim, settings

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Train the block; arguments as of `ContextBlock.init_weights`."""
        cut = max(2, int(len(tokens) * (1 - HELD_OUT)))
        with torch.enable_grad(), torch.random.fork_rng():
            drawn = self.carry.weight.flatten()[:1]  # by the run's seed
            torch.manual_seed(drawn.view(torch.int32).item())
            head = NextToken(self.context_dim, embeddings, tokens[:cut])
            weights = [*self.parameters(), *head.parameters()]
            optimizer = torch.optim.AdamW(weights, weight_decay=WEIGHT_DECAY)
            rate = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                self.settings.learning_rate,
                epochs=self.settings.epochs,
                steps_per_epoch=len(windows(tokens[:cut])),
                pct_start=0.05,
                cycle_momentum=False,
            )
            best, kept = float("inf"), copy.deepcopy(self.state_dict())
            for _ in range(self.settings.epochs):
                for loss in self.losses(head, embeddings, tokens[:cut], config, INPUT_DROPOUT):
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, config.clip_norm)
                    optimizer.step()
                    rate.step()
                with torch.no_grad():
                    losses = [*self.losses(head, embeddings, tokens[cut:], config)]
                held_out = torch.stack(losses).mean().item()
                if held_out < best:
                    best, kept = held_out, copy.deepcopy(self.state_dict())
        self.load_state_dict(kept)

    def losses(
        self, head: nn.Module, embeddings: Tensor, tokens: Tensor, config: Phase1Config, dropout: float = 0.0
    ) -> Iterator[Tensor]:
        """Yield the mean loss of each window of `STEPS` tokens, in nats, with OACD of its contexts added.

        The state goes on from window to window, without its gradient.
        """
        cut = windows(tokens)
        state = embeddings.new_zeros(len(cut[0]), self.context_dim)
        for window in cut:
            inputs = F.dropout(F.embedding(window[:, :-1], embeddings), dropout)
            contexts = []
            for step in self.project_inputs(inputs).unbind(1):
                state = self(state, step)
                contexts.append(state)
            made = torch.stack(contexts, dim=1).flatten(0, 1)  # (ROWS * steps, context_dim)
            loss = F.cross_entropy(head(made, embeddings), window[:, 1:].flatten())
            if self.settings.oacd_weight:
                loss = loss + self.settings.oacd_weight * dispersion_loss(made, config.centroid_weight)
            yield loss
            state = state.detach()


class AutoencodingBlock(GatedBlock):
    """A gated block that is trained to hold what it has read; it never sees the next token.

    A linear decoder, which is thrown away, reconstructs the embeddings of the tokens `DISTANCES` back. The
    rest is as in `PredictiveBlock`, whose code stays as it is: results that are kept are those of that code.
    """

    @dataclass(frozen=True)
    class Settings(PartSettings):
        concern: ClassVar[str] = "block"
        epochs: int = setting(40, "over the training stream, at most", at_least(1), "epochs")
        learning_rate: float = setting(0.002, "of AdamW, with a cosine down to 0", RATE)

    def __init__(self, context_dim: int, hidden_size: int, settings: Settings) -> None:
        super().__init__(context_dim, hidden_size)
        self.context_dim, self.settings = context_dim, settings

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Phase1Config) -> None:
        """Train the block; arguments as of `ContextBlock.init_weights`."""
        cut = max(2, int(len(tokens) * (1 - HELD_OUT)))
        read, held_out = windows(tokens[:cut]), windows(tokens[cut:])
        variance = F.embedding(tokens, embeddings).var(dim=0, correction=0).mean()
        with torch.enable_grad(), torch.random.fork_rng():
            drawn = self.carry.weight.flatten()[:1]  # by the run's seed
            torch.manual_seed(drawn.view(torch.int32).item())
            decoder = nn.Linear(
                self.context_dim, len(DISTANCES) * embeddings.shape[1], device=embeddings.device
            )
            weights = [*self.parameters(), *decoder.parameters()]
            optimizer = torch.optim.AdamW(weights, weight_decay=WEIGHT_DECAY)
            steps = self.settings.epochs * len(read)
            rate = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.settings.learning_rate, steps, pct_start=0.05, cycle_momentum=False
            )
            best, kept = float("inf"), copy.deepcopy(self.state_dict())
            for _ in range(self.settings.epochs):
                for error in self.errors(decoder, embeddings, read, INPUT_DROPOUT):
                    optimizer.zero_grad()
                    (error / variance).backward()
                    nn.utils.clip_grad_norm_(weights, config.clip_norm)
                    optimizer.step()
                    rate.step()
                with torch.no_grad():
                    error = torch.stack([*self.errors(decoder, embeddings, held_out)]).mean().item()
                if error < best:
                    best, kept = error, copy.deepcopy(self.state_dict())
        self.load_state_dict(kept)

    def errors(
        self, decoder: nn.Module, embeddings: Tensor, cut: list[Tensor], dropout: float = 0.0
    ) -> Iterator[Tensor]:
        """Yield the decoder's mean squared error in each window, over all `DISTANCES` that were read.

        The state goes on from window to window, without its gradient.
        """
        state, read = embeddings.new_zeros(len(cut[0]), self.context_dim), cut[0][:, :0]
        for window in cut:
            contexts = []
            for step in self.project_inputs(
                F.dropout(F.embedding(window[:, :-1], embeddings), dropout)
            ).unbind(1):
                state = self(state, step)
                contexts.append(state)
            before, read = read.shape[1], torch.cat([read, window[:, :-1]], dim=1)
            places = torch.arange(before, read.shape[1], device=read.device)[:, None] - read.new_tensor(
                DISTANCES
            )
            # (ROWS, steps, distances, hidden_size)
            targets = F.embedding(read[:, places.clamp(min=0)], embeddings)
            decoded = decoder(torch.stack(contexts, dim=1)).view_as(targets)
            yield (decoded - targets)[:, places >= 0].square().mean()
            state = state.detach()


class DirectAttention(SlotAttention):
    """Attention to contexts, beside a linear layer that reads the current one as the state of a GRU is."""

    def __init__(self, config: ModelConfig, settings: SlotAttention.Settings) -> None:
        super().__init__(config, settings)
        self.direct = nn.Linear(config.context_dim, config.hidden_size)
        self.context_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, embeddings: Tensor, window: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the hidden state and the attention weights; see `method.model.Parts`."""
        embeddings, window = self.input_dropout(embeddings), self.context_dropout(window)
        attended, weights = self.attention.attend(embeddings, window, present if self.masked else None)
        return self.output(embeddings, attended + self.direct(window[:, 0]), self.attention.norm), weights


class GatedEndToEnd(nn.Module):
    """A mixer: contexts of a `GatedBlock` that Phase 2 trains through time, and attention that reads them.

    The gradient goes back through the last `TRAINED_BURN_IN` tokens before a chunk. Attention also reads
    older contexts, which get none.
    """

    @dataclass(frozen=True)
    class Settings(SlotAttention.Settings):
        concern: ClassVar[str] = "mixer"

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        super().__init__()
        self.gru = nn.GRU(config.hidden_size, config.context_dim, batch_first=True)
        with torch.device("meta"):
            most, least = (
                number_of_weights(part(config, replace(settings, copy_weight=0.0)))
                for part in (DirectAttention, SlotAttention)
            )
        spare = least - most - number_of_weights(self)
        self.config = replace(config, intermediate_size=feed_forward_width(config, spare))
        self.attention = DirectAttention(self.config, replace(settings, input_dropout=0.0))
        self.input_dropout = nn.Dropout(settings.input_dropout)  # once, for block and attention
        self.current_token_bias, self.settings = settings.current_token_bias, settings
        self.window = Window(config, self.attention.slot_offsets(config))
        reach = self.window.offsets[-1]
        self.history, self.evaluation_history = reach + TRAINED_BURN_IN, reach + config.context_window

    def forward(self, embeddings: Tensor, start: int) -> Tensor:
        """Compute hidden states: `[rows, length, hidden_size]` to `[rows, length - start, hidden_size]`."""
        embeddings = self.input_dropout(embeddings)
        before = max(0, start - TRAINED_BURN_IN)
        with torch.no_grad():
            older, state = self.gru(embeddings[:, :before]) if before else (embeddings[:, :0, :0], None)
        newer, _ = self.gru(embeddings[:, before:], state)
        contexts = torch.cat([older, newer], dim=1) if before else newer
        slots = self.window.slots(torch.arange(start, embeddings.shape[1], device=embeddings.device))
        present = slots >= 0  # (columns, slots)
        windows = contexts[:, slots.clamp(min=0)].where(present[..., None], 0)
        hidden, _ = self.attention(
            embeddings[:, start:].flatten(0, 1), windows.flatten(0, 1), present.repeat(len(windows), 1)
        )
        return hidden.unflatten(0, windows.shape[:2])

    def served(self, model: ContextKV) -> tuple[ContextKV, dict[str, Any]]:
        """Return a trained model in the form that attends to contexts, and its plug-ins."""
        block = GatedBlock(self.config.context_dim, self.config.hidden_size)
        block.read.weight, block.read.bias = self.gru.weight_ih_l0, self.gru.bias_ih_l0
        block.carry.weight, block.carry.bias = self.gru.weight_hh_l0, self.gru.bias_hh_l0
        parts = Parts(lambda *_: block, lambda _: self.attention)
        served = ContextKV(self.config, model.wte.num_embeddings, model.log_unigram is not None, parts)
        served.load_table(model.wte.weight)
        served.log_unigram = model.log_unigram
        attention = {"plugin": f"{__name__}:DirectAttention", "settings": asdict(self.settings)}
        return served, {"block": {"plugin": f"{__name__}:GatedBlock", "settings": {}}, "attention": attention}


class NextToken(nn.Module):
    """The head that is thrown away: logits of the distinct tokens, with their log-frequencies."""

    def __init__(self, context_dim: int, embeddings: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.out = nn.Linear(context_dim, embeddings.shape[1], device=embeddings.device)
        counts = torch.bincount(tokens, minlength=len(embeddings)).float() + 1
        self.register_buffer("log_unigram", (counts / counts.sum()).log())

    def forward(self, contexts: Tensor, embeddings: Tensor) -> Tensor:
        """Compute logits `[n, num_distinct]` from contexts `[n, context_dim]`."""
        queries = self.out(contexts) / embeddings.shape[1] ** 0.5
        return F.linear(queries, embeddings, self.log_unigram)


def windows(tokens: Tensor) -> list[Tensor]:
    """Cut a stream `[n]` into `ROWS` segments, and these into windows with targets: `[ROWS, STEPS + 1]`."""
    rows = max(1, min(ROWS, len(tokens) // 2))
    length = (len(tokens) - 1) // rows
    segments = [tokens[row * length : (row + 1) * length + 1] for row in range(rows)]
    whole = torch.stack(segments).long()  # (rows, length + 1)
    return [whole[:, first : first + STEPS + 1] for first in range(0, length, STEPS)]
