"""Measure what a run costs with much text: `python notebooks/study/scale.py CONVERSATIONS`.

The text consists of the chit-chat conversations that preset `offline` trains on, repeated as often as
needed, and the token table is random, since the cost does not depend on what a text says. The script runs
Phase 1 of recipe `exact`, computes the contexts, and then times steps of Phase 2. It prints the number of
tokens, times, and the use of memory and disk.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import ctxkv_lib as ctxkv
from ctxkv_lib.data import chitchat
from ctxkv_lib.method.memory import snapshot
from ctxkv_lib.method.optimizer import Stepper
from ctxkv_lib.method.phase2 import train_step
from ctxkv_lib.method.streams import DTYPES
from ctxkv_lib.runs.listing import folder_bytes
from ctxkv_lib.store import store

STEPS, WARM_UP = 40, 5
MB = 1e6


def main(conversations: int, folder: Path) -> None:
    """Print what a run with this number of conversations costs. All files are written to `folder`."""
    os.environ["CTXKV_CACHE"] = str(folder / "store")
    texts = itertools.cycle(chitchat.read("train", chitchat.available("train")))
    held_back = chitchat.read("validation", 10)
    data = folder / "text.jsonl"
    lines = [json.dumps({"text": text}) for text in [*itertools.islice(texts, conversations), *held_back]]
    data.write_text("\n".join(lines), encoding="utf-8")
    settings = {"data.path": str(data), "data.table": "random", "data.corpus": "own"}
    settings |= {"data.validation_samples": 10, "data.test_samples": 0, "runtime.precision": "auto"}
    config = ctxkv.build_config("offline", samples=conversations, settings=settings)
    began = time.perf_counter()
    prepared = ctxkv.prepare(config, folder / "run")
    seconds, summary = time.perf_counter() - began, prepared.run.summary
    tokens = summary["tokens"]["train"]
    phase1 = summary["phase1"]["seconds"]
    print(f"{tokens:,} training tokens; prepared in {seconds:.0f} s, of which Phase 1 took {phase1:.0f} s")
    print(f"store: {folder_bytes(store()) / MB:,.0f} MB; caches in MiB: {summary['caches_mib']}")
    print("peak memory in GiB:", {stage["stage"]: stage["cpu_peak_gib"] for stage in summary["memory"]})

    model, train, precision = prepared.model, prepared.streams["train"], prepared.plan.precision
    model.set_phase(2)
    model.train()
    size = config.phase2.batch_size
    stepper = Stepper(model.trained_weights(), config.phase2, len(train))
    table = model.wte.weight.detach().to(DTYPES[precision])
    order, times = torch.randperm(len(train))[: STEPS * size], []
    for batch in model.batches(train, order, size):
        began = time.perf_counter()
        train_step(model, table, stepper, batch, precision)
        times.append(time.perf_counter() - began)
    step = statistics.median(times[WARM_UP:])
    peak = snapshot("steps", model.device)["cpu_peak_gib"]
    print(f"a step of {size} positions in {precision}: {1e3 * step:.0f} ms, {1e3 * step / size:.2f} each")
    print(f"peak memory of training: {peak} GiB; an epoch: {step * len(train) / size / 60:.1f} min")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(int(sys.argv[1]), Path(name))
