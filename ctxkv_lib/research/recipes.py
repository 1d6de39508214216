"""Recipes made of plug-ins, as settings on top of a preset's."""

from typing import Any

PLUGINS = {
    "block": "ctxkv_lib.research.tuned:StructuredBlock",
    "attention": "ctxkv_lib.research.tuned:SlotAttention",
    "optimizer": "ctxkv_lib.research.optimizer:ScheduledAdamW",
}

RECIPES: dict[str, dict[str, Any]] = {
    "tuned": {
        **PLUGINS,
        "phase1.context_method": "exact",
        "block.longest_mean": 40.0,
        "phase1.learning_rate": 1e-4,
        "phase1.noise_std": 0.02,
        "data.unigram": "corpus",
        "data.neighbours": "sides",
        "data.row_length": 0.5,
        "attention.slots": "geometric",
        "attention.slot_bias": "nearest",
        "attention.residual": "off",
        "attention.current_token_bias": -5.0,
        "attention.input_dropout": 0.2,
        "attention.layer_dropout": 0.1,
        "phase2.max_epochs": 4,
        "phase2.batch_size": 128,
        "phase2.learning_rate": 5e-4,
        "optimizer.schedule": "cosine",
        "optimizer.warmup": 0.05,
        "phase2.weight_decay": 2.0,
        "optimizer.decay_tokens": 50_000,
        "optimizer.decayed": "matrices",
        "optimizer.averaging": 0.99,
    },
    "look_up": {
        **PLUGINS,
        "phase1.context_method": "exact",
        "block.last_tokens": 21,  # one more than an interval: a token looked for, and the one that followed
        "phase1.learning_rate": 1e-5,
        "phase1.noise_std": 0.02,
        "model.num_heads": 24,
        "attention.heads": "induction",
        "attention.slot_bias": "learned",
        "attention.sink": "learned",
        "attention.residual": "off",
        "phase2.batch_size": 128,
        "phase2.learning_rate": 5e-4,
        "phase2.max_epochs": 4,
        "optimizer.schedule": "cosine",
        "optimizer.warmup": 0.05,
    },
}
