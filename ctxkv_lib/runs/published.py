"""The results of the original's two runs, read from `published.json`.

The results come from the report *Context-KV Attention, 500 samples* of 2025-12-03 and the public research
repository `rato-tokyo/new-llm` on GitHub. Values that were not published, such as those of the last epoch
with 500 samples, are null or an empty list. Perplexities are per GPT-2 token, accuracies and other shares
range from 0 to 1, and times are in seconds on an NVIDIA L4.
"""

import json
from pathlib import Path
from typing import Any

from .config import ExperimentConfig, differing_settings
from .presets import build_config

_RUNS = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
PUBLISHED: dict[int, dict[str, Any]] = {int(count): summary for count, summary in _RUNS.items()}  # by samples


def published_samples(config: ExperimentConfig) -> int | None:
    """Return the number of samples (100 or 500) if `config` repeats one of the original's runs, else None.

    `config` must have preset `colab`, recipe `published`, and the original's value for every setting that
    changes the training data or the arithmetic. The seed may be different.
    """
    samples = config.data.samples
    if config.preset != "colab" or config.recipe != "published" or samples not in PUBLISHED:
        return None
    differing, _ = differing_settings([config, build_config("colab", "published", samples)])
    changing = {key for key in differing if not key.startswith("runtime.") or key == "runtime.precision"}
    return samples if changing <= {"data.test_samples"} else None
