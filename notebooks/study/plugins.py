"""Plug-ins that only the study needs: other blocks, a loss for Phase 1, and further options.

Settings refer to a plug-in as `plugins:NAME`. This folder must be on the Python path.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxkv_lib import ModelConfig
from ctxkv_lib.baselines import GatedBlock
from ctxkv_lib.method.block import Block, ContextBlock
from ctxkv_lib.method.contexts import exact_contexts
from ctxkv_lib.method.fields import setting
from ctxkv_lib.method.layer import ContextKVAttention
from ctxkv_lib.method.reference import dispersion_loss
from ctxkv_lib.method.tuned import BiasedAttention, SlotLayer

# The number of segments that are read in parallel, and of tokens per step of truncated backpropagation.
ROWS, STEPS = 16, 64
# An autoencoding block reconstructs the tokens at these distances back.
DISTANCES = (0, 1, 2, 4, 8, 16)
# This share of the training stream, at its end, is held out for choosing the epoch.
HELD_OUT = 0.1
INPUT_DROPOUT, WEIGHT_DECAY = 0.2, 0.01  # for training a block
# Kinds of slot biases and how they start. Slot biases are added to the attention scores.
BIASES = {
    "nearest": "heads prefer slots 1 to 4",
    "per_head": "each head prefers a slot of its own",
    "learned": "all biases start at 0",
    "none": "no biases",
}


def attention_of(config: ModelConfig, slot_bias: str) -> ContextKVAttention:
    """Build attention to contexts with a kind of slot bias from `BIASES`. With "none", keys have a bias."""
    if slot_bias == "none":
        return ContextKVAttention(config)
    attention = BiasedAttention(config)
    biases = attention.slot_bias.data
    preferred = biases.max()
    if slot_bias != "nearest":
        biases.zero_()
    if slot_bias == "per_head":
        biases.diagonal().copy_(preferred)
    return attention


class OtherSlots(SlotLayer):
    """The layer of recipe `tuned`, with options that only the study sets."""

    @dataclass(frozen=True)
    class Settings(SlotLayer.Settings):
        slots: str = setting("geometric", "slot positions", {"geometric": "as tuned", "uniform": "as exact"})
        slot_bias: str = setting("nearest", "initial biases of the slots", BIASES)
        residual: bool = setting(False, "whether the output head also reads the embedding, as published")

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        super().__init__(config, settings)
        self.attention = attention_of(config, settings.slot_bias)

    def slot_offsets(self, config: ModelConfig) -> list[int]:
        if self.settings.slots == "geometric":
            return super().slot_offsets(config)
        return [config.interval * slot for slot in range(config.max_contexts)]

    def forward(self, embeddings: Tensor, window: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.input_dropout(embeddings)
        added, weights = self.attention.attend(embeddings, window, present if self.is_masked else None)
        added = self.layer_dropout(added)
        hidden = self.attention.norm(embeddings + added)
        return (hidden if self.settings.residual else added) + self.feed_forward(hidden), weights


class Chunked(OtherSlots):
    """The layer of recipe `tuned`, trained on chunks of 64 consecutive positions instead of random ones."""

    chunk = 64


class TokenBlock(Block):
    """A block without weights. The context of a position is the normalized embedding of its token."""

    def __init__(self, context_dim: int, hidden_size: int) -> None:
        super().__init__()
        if context_dim != hidden_size:
            raise ValueError(f"model.context_dim is {context_dim}; allowed with TokenBlock: {hidden_size}.")

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        return inputs


class MovedBlock(ContextBlock):
    """The published block in coordinates that are moved by a multiple of the mean of its untrained contexts.

    Phase 1 trains the published block, without moving anything. Afterwards, each context is moved by the same
    vector, and the recurrence takes this vector away before it reads a context. With `removed=1` and without
    Phase 1, the mean of the training contexts is zero.
    """

    @dataclass(frozen=True)
    class Settings:
        removed: float = setting(1.0, "how many times the mean of the untrained contexts is subtracted")

    def __init__(self, context_dim: int, hidden_size: int, settings: Settings) -> None:
        super().__init__(context_dim, hidden_size)
        self.settings = settings
        self.register_buffer("shift", torch.zeros(context_dim))

    @torch.no_grad()
    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Any) -> None:
        super().init_weights(embeddings, tokens, config)
        zero, inputs = embeddings.new_zeros(self.context_dim), self.project_inputs(embeddings)
        contexts = exact_contexts(super().forward, inputs, tokens, zero, config.tolerance)[1:]
        self.shift.copy_(-self.settings.removed * contexts.mean(dim=0))

    def forward(self, contexts: Tensor, inputs: Tensor) -> Tensor:
        if self.training:
            return super().forward(contexts, inputs)
        return super().forward(contexts - self.shift, inputs) + self.shift


class TrainedBlock(GatedBlock):
    """A gated block that is trained before Phase 1 with a temporary head.

    The block is trained by truncated backpropagation through time. The end of the training stream is held
    out, and the weights with the lowest loss on it are kept. With `phase1.max_iterations=0`, nothing else
    trains the block. Subclasses define `make_head(embeddings, tokens)`, which returns the head, and `loss`,
    which returns the loss of contexts `[rows, steps, context_dim]`. The argument `seen` of `loss` has all
    tokens `[rows, n]` up to the target of the last context.
    """

    @dataclass(frozen=True)
    class Settings:
        epochs: int = 6
        # The peak learning rate of AdamW. The rate then falls to 0 along a cosine.
        learning_rate: float = 0.002
        oacd_weight: float = 0.0

    def __init__(self, context_dim: int, hidden_size: int, settings: Settings) -> None:
        super().__init__(context_dim, hidden_size)
        self.settings = settings

    def init_weights(self, embeddings: Tensor, tokens: Tensor, config: Any) -> None:
        """Train the block. The arguments are the same as for `ContextBlock.init_weights`."""
        train, held_out = split(tokens)
        with torch.enable_grad(), torch.random.fork_rng():
            # The initial weights depend on the run's seed, so this seed does, too.
            torch.manual_seed(self.carry.weight.flatten()[:1].view(torch.int32).item())
            head = self.make_head(embeddings, tokens)
            weights = [*self.parameters(), *head.parameters()]
            optimizer = torch.optim.AdamW(weights, weight_decay=WEIGHT_DECAY)
            steps = self.settings.epochs * len(windows(train))
            rate = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.settings.learning_rate, steps, pct_start=0.05, cycle_momentum=False
            )
            best, kept = math.inf, copy.deepcopy(self.state_dict())
            for _ in range(self.settings.epochs):
                for loss in self.losses(head, embeddings, train, config, INPUT_DROPOUT):
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, config.clip_norm)
                    optimizer.step()
                    rate.step()
                with torch.no_grad():
                    found = torch.stack([*self.losses(head, embeddings, held_out, config)]).mean().item()
                if found < best:
                    best, kept = found, copy.deepcopy(self.state_dict())
        self.load_state_dict(kept)

    def losses(
        self, head: Any, embeddings: Tensor, tokens: Tensor, config: Any, dropout: float = 0.0
    ) -> Iterator[Tensor]:
        """Yield the loss of each window. Each window starts from the last state of the window before it."""
        cut = windows(tokens)
        state = embeddings.new_zeros(len(cut[0]), self.context_dim)
        for number, seen in enumerate(cut):
            inputs, contexts = F.embedding(seen[:, number * STEPS : -1], embeddings), []
            for step in self.project_inputs(F.dropout(inputs, dropout)).unbind(1):
                state = self(state, step)
                contexts.append(state)
            yield self.loss(head, torch.stack(contexts, dim=1), seen, embeddings, config)
            state = state.detach()


class PredictiveBlock(TrainedBlock):
    """A block trained to predict the next token. The biases of its head are log-frequencies of tokens."""

    def make_head(self, embeddings: Tensor, tokens: Tensor) -> nn.Module:
        head = nn.Linear(self.context_dim, embeddings.shape[1], device=embeddings.device)
        counts = torch.bincount(split(tokens)[0], minlength=len(embeddings)).float() + 1
        head.register_buffer("log_unigram", (counts / counts.sum()).log())
        return head

    def loss(self, head: Any, contexts: Tensor, seen: Tensor, embeddings: Tensor, config: Any) -> Tensor:
        """Compute the mean cross-entropy in nats, plus `oacd_weight` times the loss of OACD."""
        made = contexts.flatten(0, 1)
        logits = F.linear(head(made) / embeddings.shape[1] ** 0.5, embeddings, head.log_unigram)
        loss = F.cross_entropy(logits, seen[:, -contexts.shape[1] :].flatten())
        if self.settings.oacd_weight:
            loss = loss + self.settings.oacd_weight * dispersion_loss(made, config.centroid_weight)
        return loss


class AutoencodingBlock(TrainedBlock):
    """A block trained to remember: a linear head reconstructs the tokens at the distances `DISTANCES`."""

    def make_head(self, embeddings: Tensor, tokens: Tensor) -> nn.Module:
        head = nn.Linear(self.context_dim, len(DISTANCES) * embeddings.shape[1], device=embeddings.device)
        head.register_buffer("variance", F.embedding(tokens, embeddings).var(dim=0, correction=0).mean())
        return head

    def loss(self, head: Any, contexts: Tensor, seen: Tensor, embeddings: Tensor, config: Any) -> Tensor:
        """Compute the share of the variance of the tokens' embeddings that the head does not explain."""
        read = torch.arange(seen.shape[1] - 1, device=seen.device)[-contexts.shape[1] :, None]
        places = read - seen.new_tensor(DISTANCES)
        wanted = F.embedding(seen[:, places.clamp(min=0)], embeddings)  # (rows, steps, distances, size)
        errors = (head(contexts).view_as(wanted) - wanted)[:, places >= 0]
        return errors.square().mean() / head.variance


def decorrelation(contexts: Tensor) -> Tensor:
    """Compute notebook 6's loss for Phase 1. It penalizes standard deviations below 1, and correlations."""
    centered = contexts - contexts.mean(dim=0)
    covariance = centered.T @ centered / len(contexts)
    variances = covariance.diagonal()
    crossed = covariance.square().sum() - variances.square().sum()
    too_small = (1 - (variances + 1e-4).sqrt()).relu()
    return too_small.mean() + crossed / len(variances)


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Split a stream `[n]` into a part for training a block and a held-out end for choosing the epoch."""
    cut = max(2, int(len(tokens) * (1 - HELD_OUT)))
    return tokens[:cut], tokens[cut:]


def windows(tokens: Tensor) -> list[Tensor]:
    """Cut a stream `[n]` into `ROWS` segments. Return, for each window, all tokens up to its last target."""
    rows = max(1, min(ROWS, len(tokens) // 2))
    length = (len(tokens) - 1) // rows
    segments = torch.stack([tokens[row * length : (row + 1) * length + 1] for row in range(rows)]).long()
    return [segments[:, : first + STEPS + 1] for first in range(0, length, STEPS)]
