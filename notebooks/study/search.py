"""Find the settings with the lowest validation perplexity for rows of part `fair`.

`python notebooks/study/search.py ROW...` varies one setting after the other, and prints all settings that it
tries. Finished runs are reused.
"""

import sys
from collections.abc import Callable, Mapping

from train import PARTS, configure

import ctxkv_lib as ctxkv

AXES = {
    "phase2.learning_rate": (0.00025, 0.0005, 0.001),
    "phase2.max_epochs": (4, 8),
    "phase2.weight_decay": (1.0, 2.0, 4.0),
    "layer_dropout": (0.1, 0.2),  # dropout of the row's layer
}
# The search starts from the values in recipe `tuned`.
START = dict(zip(AXES, (0.0005, 4, 2.0, 0.1), strict=True))
SAMPLES, SEED = 50, 42


def search(val_ppl: Callable[[Mapping[str, float]], float]) -> dict[str, float]:
    """Find the best value of one setting after the other. `val_ppl` maps settings to a perplexity."""
    best = dict(START)
    for axis, values in AXES.items():
        best = min(({**best, axis: value} for value in values), key=val_ppl)
    return best


def trained(row: str, settings: Mapping[str, float]) -> float:
    """Train a row with these settings, without test text, and return its validation perplexity."""
    base = PARTS["fair"][1][row]
    own = {f"layer.{key}" if key == "layer_dropout" else key: value for key, value in settings.items()}
    config = configure({**base, **own, "data.test_samples": 0}, SAMPLES, SEED)
    found = ctxkv.run(config).summary["phase2"]["val_ppl"]
    print(row, *settings.values(), f"{found:.3f}", flush=True)
    return found


if __name__ == "__main__":
    for row in sys.argv[1:] or PARTS["fair"][1]:
        print(row, "chosen:", search(lambda settings, row=row: trained(row, settings)))
