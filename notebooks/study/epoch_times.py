"""Time an epoch of the models in the memory table, one after the other, with 50 training conversations.

`python notebooks/study/epoch_times.py` rewrites `results/epochs/epochs.json`. An epoch includes validation on
10 conversations. Each model trains two epochs in one thread. The time of the LSTM and of the GPT is the mean
over both epochs in seconds of CPU time; for the other models, the shorter epoch counts. Use an idle machine.
"""

import json
import tempfile
from pathlib import Path

import torch
from alternatives import CHOSEN
from alternatives import train as train_alternative
from train import PARTS, configure

import ctxkv_lib as ctxkv

RESULT = Path(__file__).parent / "results" / "epochs" / "epochs.json"
SAMPLES, SEED = 50, 42
SHORT = {
    "data.validation_samples": 10,
    "data.test_samples": 0,
    "phase1.max_iterations": 0,
    "phase2.max_epochs": 2,
}
VARIANTS = PARTS["phase1"][1] | PARTS["fair"][1]
NAMES = ("exact", "exact, one slot", "contexts", "last 32 tokens", "all 640 tokens", "GRU")


def epoch_seconds() -> dict[str, float]:
    """Return the time per epoch in seconds of each model."""
    times = {}
    for name in NAMES:
        config = configure({**VARIANTS[name], **SHORT}, SAMPLES, SEED)
        with tempfile.TemporaryDirectory() as folder:
            epochs = ctxkv.run(config, folder).summary["phase2"]["epochs"]
        times[name] = min(epoch["seconds"] for epoch in epochs)
    for name in ("LSTM", "GPT"):
        settings = {**CHOSEN[name], "epochs": SHORT["phase2.max_epochs"]}
        times[name] = train_alternative(name, SAMPLES, SEED, settings, is_tested=False)["epoch_seconds"]
    return times


if __name__ == "__main__":
    torch.set_num_threads(1)
    row = {"threads": 1, "seconds": epoch_seconds()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
