"""Shared fixtures for the tests in `tests/gpu`, which are skipped without a GPU."""

import sys

import pytest
import torch

from ctxkv_lib.runs.presets import build_config

if "simulated_gpu" in sys.modules:  # transformers must be imported before the simulated GPU is installed
    import ctxkv_lib.experiments  # noqa: F401


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture
def waits():
    """Return a function that says how often the CPU has waited. Only the simulated GPU counts the waits."""
    simulated = sys.modules.get("simulated_gpu")
    if simulated is None:
        pytest.skip("only the simulated GPU counts waits")
    return simulated.card.waits.total


@pytest.fixture
def train_on(tiny_settings, tmp_path):
    """Return a function that runs an experiment with 6 conversations on a device, in a few batches."""
    from ctxkv_lib import experiments

    sizes = {"phase1.batch_size": 100, "phase1.max_iterations": 3, "phase2.batch_size": 64}
    sizes |= {"phase2.max_epochs": 2, "data.corpus_samples": 2}

    def train(device="cuda", recipe="exact", settings=None, **plugins):
        settings = {**tiny_settings, **sizes, "runtime.device": device, **(settings or {})}
        config = build_config("ci", recipe, 6, settings, **plugins)
        return experiments.run(config, tmp_path / f"{device}-{recipe}")

    return train
