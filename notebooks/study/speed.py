"""Time the package beside the plain reference: `python notebooks/study/speed.py [SAMPLES]`, minutes on a CPU.

Both train the published recipe on the same tokens from the same weights: Phase 1, one epoch of Phase 2 with
validation, and then read the validation text token by token. The package's times are those of its summary.
"""

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

import ctxkv_lib as ctxkv
from ctxkv_lib.method import reference

ITERATIONS = 4  # of Phase 1, the first of which draws contexts
READ = 1_000  # tokens


def seconds(function: Callable[[], Any]) -> float:
    """Time one call, after two that are not counted."""
    return Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads()).timeit(1).mean


def main(samples: int, preset: str = "offline") -> None:
    """Print seconds of the reference and of the package, side by side."""
    settings = {"phase1.max_iterations": ITERATIONS, "phase2.max_epochs": 1}
    settings |= {"data.validation_samples": 2, "data.test_samples": 0}
    config = ctxkv.build_config(preset, "published", samples, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = ctxkv.run(config, folder)
        trained = ctxkv.open_run(run)
        served = AutoModelForCausalLM.from_pretrained(run.path / "model", trust_remote_code=True).eval()
    train, val = trained.caches["train"], trained.caches["val"]
    ids, val_ids = train.ids.long(), val.ids.long()
    weights = {name: weight.detach().clone() for name, weight in trained.model.named_parameters()}
    table = weights.pop("wte.weight")

    def order(epoch: int) -> Tensor:
        return torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))

    streams = (table, ids, train.contexts[1:].float(), val_ids, val.contexts[1:].float())
    read, sizes = val_ids[:READ], (config.model, config.phase2)
    phase1, phase2 = run.summary["phase1"]["seconds"], run.summary["phase2"]["seconds_per_epoch"]
    reading = seconds(lambda: served(read[None], logits_to_keep=1))
    print(f"{len(ids):,} training tokens, {torch.get_num_threads()} threads: reference, package, ratio")
    for name, package, function in (
        ("Phase 1", phase1, lambda: reference.phase1(weights, table, ids, config.phase1, 0)),
        ("Phase 2, an epoch", phase2, lambda: reference.phase2(weights, *streams, *sizes, order)),
        ("reading", reading, lambda: reference.exact_contexts(weights, table, read)),
    ):
        plain = seconds(function)
        print(f"{name}: {plain:.2f} s, {package:.2f} s, {plain / package:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 10)
