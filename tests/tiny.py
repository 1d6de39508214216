"""A tiny model, stream and experiment on a local file, and plug-ins as users might write them."""

import json
import random

import torch
from torch import nn

from ctxkv_lib.method.block import ContextBlock
from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.layer import AttentionLayer
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.method.streams import Stream

TINY = {
    "vocab_size": 211,
    "hidden_size": 24,
    "context_dim": 16,
    "interval": 3,
    "max_contexts": 4,
    "num_heads": 3,
    "intermediate_size": 40,
}
TUNED = {  # arguments of `tiny_model` for the recipe `tuned`
    "parts": {
        "block": {"name": "StructuredBlock", "settings": {}},
        "layer": {"name": "SlotLayer", "settings": {"input_dropout": 0.0, "layer_dropout": 0.0}},
    },
    "has_unigram": True,
}
SHAPES = {name: value for name, value in TINY.items() if name != "vocab_size"}
WORDS = "the cat sat on some old mat while rain fell and tea was made".split()  # noqa: SIM905


def tiny_model(**changes):
    """Make a tiny model for transformers."""
    from ctxkv_lib.method.modeling import ContextKVConfig, ContextKVForCausalLM

    torch.manual_seed(0)
    return ContextKVForCausalLM(ContextKVConfig(**{**TINY, **changes}))


def tiny_method(block=ContextBlock, layer=AttentionLayer, has_unigram: bool = False, **changes) -> ContextKV:
    """Make the same model as `tiny_model`, without transformers."""
    torch.manual_seed(0)
    return ContextKV(ModelConfig(**{**SHAPES, **changes}), TINY["vocab_size"], has_unigram, block, layer)


def cloned(model) -> dict[str, torch.Tensor]:
    """Copy all weights, under the names that the reference uses."""
    return {name.removeprefix("layer."): value.detach().clone() for name, value in model.state_dict().items()}


def tiny_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


def tiny_stream(count: int) -> Stream:
    """Make a cached stream of random float32 contexts at `count` positions."""
    contexts = torch.randn(count + 1, TINY["context_dim"], generator=torch.Generator().manual_seed(count))
    contexts[0] = 0
    return Stream(tiny_ids(count + 1, seed=count).int(), contexts)


def write_conversations(path, count: int, seed: int = 0) -> None:
    """Write `count` conversations of a few dozen words each to a JSONL file."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            texts = [" ".join(draw.choices(WORDS, k=12)) for _ in range(4)]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")


def local_experiment(folder) -> dict:
    """Write conversations into `folder`, and return settings for an experiment on them that takes seconds."""
    path = folder / "conversations.jsonl"
    write_conversations(path, 14)
    return {
        "data.path": str(path),
        "data.table": "random",
        "data.validation_samples": 2,
        "data.test_samples": 2,
        "data.corpus_samples": 2,
        **{f"model.{name}": size for name, size in SHAPES.items()},
        "model.intermediate_size": 32,
        "phase1.max_iterations": 5,
        "phase2.max_epochs": 3,
        "phase2.batch_size": 128,
    }


class GatedBlock(nn.Module):
    """A block with a gate, as a user might write it."""

    def __init__(self, context_dim, hidden_size):
        super().__init__()
        self.gate = nn.Linear(context_dim + hidden_size, context_dim)
        self.new = nn.Linear(context_dim + hidden_size, context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, contexts, inputs):
        both = torch.cat([contexts, inputs], dim=1)
        keep = self.gate(both).sigmoid()
        return self.norm(keep * contexts + (1 - keep) * self.new(both))


class NearestTwo(nn.Module):
    """A layer that reads the mean of the two nearest contexts, as a user might write it."""

    current_token_bias = -2.5

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.context_dim, config.hidden_size)

    @staticmethod
    def slot_offsets(config):
        return [0, 1]

    def forward(self, embeddings, window, present):
        return embeddings + self.out((window * present[..., None]).mean(dim=1))


class PreviousToken(nn.Module):
    """A layer that reads the previous token instead of contexts, as a user might write it."""

    reads = "tokens"
    history = 1

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, embeddings, start):
        before = torch.cat([torch.zeros_like(embeddings[:, :1]), embeddings[:, :-1]], dim=1)
        return (embeddings + self.out(before))[:, start:]


def falls(module, loss):
    """Return whether ten steps lower the loss. Every parameter must get a gradient."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    first = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        assert all(weight.grad is not None for weight in module.parameters())
        optimizer.step()
    return loss().item() < first
