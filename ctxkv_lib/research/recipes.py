"""Recipes made of plug-ins, as settings on top of a preset's."""

from typing import Any

COMMON = {
    "block": "ctxkv_lib.research.tuned:StructuredBlock",
    "attention": "ctxkv_lib.research.tuned:SlotAttention",
    "optimizer": "ctxkv_lib.research.optimizer:ScheduledAdamW",
    "phase1.context_method": "exact",
    "phase1.noise_std": 0.02,
    "attention.residual": "off",
    "phase2.max_epochs": 4,
    "phase2.batch_size": 128,
    "phase2.learning_rate": 5e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.05,
}

RECIPES: dict[str, dict[str, Any]] = {
    "tuned": {
        **COMMON,
        "block.longest_mean": 40.0,
        "phase1.learning_rate": 1e-4,
        "data.unigram": "corpus",
        "data.neighbours": "sides",
        "data.row_length": 0.5,
        "attention.slots": "geometric",
        "attention.slot_bias": "nearest",
        "attention.current_token_bias": -5.0,
        "attention.input_dropout": 0.2,
        "attention.layer_dropout": 0.1,
        "attention.copy_weight": 0.1,
        "phase2.weight_decay": 2.0,
        "optimizer.decay_tokens": 50_000,
        "optimizer.decayed": "matrices",
        "optimizer.averaging": 0.99,
    },
    "look_up": {
        **COMMON,
        "block.last_tokens": 21,  # one more than an interval: a token looked for, and the one that followed
        "phase1.learning_rate": 1e-5,
        "model.num_heads": 24,
        "attention.heads": "induction",
        "attention.slot_bias": "learned",
        "attention.sink": "learned",
    },
}
