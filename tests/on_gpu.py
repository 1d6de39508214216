"""What the tests in `tests/gpu` share. They run on a real GPU, else on the simulated one."""

import sys
from collections import Counter
from typing import NamedTuple

import pytest
import simulated_gpu
import torch

from ctxkv_lib import experiments
from ctxkv_lib.runs import long_run
from ctxkv_lib.runs.config import build_config

UNDISTURBED = {}  # runs by their arguments, which several tests compare with
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and torch.version.cuda:  # whose library the simulated one cannot take the place of
    sys.exit(pytest.ExitCode.NO_TESTS_COLLECTED)
if not HAS_GPU:
    simulated_gpu.install()


@pytest.fixture
def card():
    """The simulated GPU, whose counters tests read."""
    if HAS_GPU:
        pytest.skip("a real GPU has no such counters")
    total = simulated_gpu.card.total
    yield simulated_gpu.card
    simulated_gpu.card.total = total


@pytest.fixture
def train_on(tiny_settings, tmp_path, monkeypatch):
    """A function that runs an experiment of 6 conversations on a device, some batches in either phase."""
    monkeypatch.setattr(experiments, "_publish", lambda *_: [])  # figures need no GPU
    sizes = {"phase1.batch_size": 100, "phase1.max_iterations": 3, "phase2.batch_size": 64}
    sizes |= {"phase2.max_epochs": 2, "data.corpus_samples": 2}

    def train(device="cuda", recipe="exact", name=None, **changes):
        named = {key.replace("__", "."): value for key, value in changes.items()}
        settings = {**tiny_settings, **sizes, "runtime.device": device, **named}
        config = build_config("ci", recipe, 6, settings)
        return experiments.run(config, tmp_path / (name or f"{device}-{recipe}"))

    def once(**arguments):
        key = repr(sorted(arguments.items()))
        UNDISTURBED[key] = UNDISTURBED.get(key) or train(**arguments)
        return UNDISTURBED[key]

    train.once = once
    return train


class Round(NamedTuple):
    """What an optimiser step or an iteration did."""

    kind: str  # state and hook, as in `Phase2State.after_step`
    launches: int  # of kernels and copies
    waits: Counter  # of the CPU for the GPU, by reason and line


@pytest.fixture
def rounds(card, monkeypatch):
    """The steps of Phase 2 and the iterations of Phase 1 that runs of this test do, as they happen."""
    found, last = [], [Counter(), Counter()]

    def heard(name):
        original = getattr(long_run.LongRun, name)

        def hook(self, state, *args):
            launches, waits = card.launches - last[0], card.waits - last[1]
            found.append(Round(f"{type(state).__name__}.{name}", launches.total(), waits))
            original(self, state, *args)
            last[:] = [Counter(card.launches), Counter(card.waits)]

        monkeypatch.setattr(long_run.LongRun, name, hook)

    heard("after_step")
    heard("after_round")
    return found
