"""Runs `tests/gpu` in processes of their own: a simulated GPU stays until its process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "gpu").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is None and not (sys.platform == "linux" and "2.13" <= torch.__version__ < "2.14"),
    reason="the simulated GPU is made for torch 2.13 on Linux",
)
@pytest.mark.parametrize("file", FILES)
def test_on_a_gpu(file):
    hidden = ("CUDA_VISIBLE_DEVICES", "PYTEST_")  # of this process, which has none and may be a worker
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:nbmake", "-q", "-rs", HERE / "gpu" / file]
    done = subprocess.run(command, env=env | {"CTXKV_TEST_GPU": "0"}, capture_output=True, text=True)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("torch has CUDA, but there is no GPU")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
