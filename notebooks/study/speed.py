"""Time the package and the plain reference code: `python notebooks/study/speed.py [SAMPLES]`.

Both start from the same weights and train on the same tokens. They run Phase 1 of recipe `published`, and
one epoch of Phase 2 with validation, which is the same in recipe `exact`. Then both read the validation text
token by token. The reference is the original's training loop and computes in fp32. The package computes in
bf16 if the processor has units for it, and its training times come from the run's summary. The script takes
minutes on a CPU.

After that, the script times one training step of Phase 2 and the parts of the step. It also times the matrix
products alone, because their time is a lower bound. All these times are measured in fp32, and also in bf16 if
the processor has units for it.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

import ctxkv_lib as ctxkv
from ctxkv_lib.method import reference
from ctxkv_lib.method.config import Phase2Config
from ctxkv_lib.method.losses import VOCABULARY_CHUNK
from ctxkv_lib.method.model import ContextKV
from ctxkv_lib.method.optimizer import Stepper
from ctxkv_lib.method.phase2 import batch_gradients, train_step
from ctxkv_lib.method.streams import DTYPES, Batch
from ctxkv_lib.runs.device import choose_precision

# The number of iterations of Phase 1. The first iteration only draws random contexts.
ITERATIONS = 4
READ = 1_000  # number of tokens to read
# Each round times all parts of a step once.
ROUNDS = 15


def seconds(function: Callable[[], Any]) -> float:
    """Return the time of one call in seconds, after two warm-up calls."""
    return Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads()).timeit(1).mean


def head_products(queries: Tensor, table: Tensor) -> None:
    """Compute only the output head's matrix products: the logits and the average of the table's rows."""
    for rows in table.split(VOCABULARY_CHUNK):
        torch.mm(torch.mm(queries, rows.T), rows)


def layer_products(model: ContextKV, batch: Batch, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that computes only the layer's matrix products, on random numbers.

    Each weight matrix needs three products: the output, the gradient of the input, and the gradient of the
    weights. The query's input is the token embedding, which needs no gradient. Attention multiplies contexts
    by queries and by attention weights; the gradients of these two factors need one more product each.
    """
    sizes, (window, _) = model.config, batch.inputs
    weights = {name: weight.to(dtype) for name, weight in model.trained_weights().items() if weight.ndim == 2}
    rows = {size: torch.randn(len(batch), size, dtype=dtype) for w in weights.values() for size in w.shape}
    queries = torch.randn(len(batch), sizes.num_heads, sizes.context_dim, dtype=dtype)
    shares = torch.randn(len(batch), sizes.num_heads, sizes.max_contexts, dtype=dtype)

    @torch.no_grad()
    def compute() -> None:
        for name, weight in weights.items():
            outputs, inputs = rows[len(weight)], rows[weight.shape[1]]
            torch.mm(inputs, weight.T)
            torch.mm(outputs.T, inputs)
            if name != "layer.attention.q.weight":
                torch.mm(outputs, weight)
        for _ in range(2):
            torch.bmm(queries, window.transpose(1, 2))
            torch.bmm(shares, window)

    return compute


def print_step(model: ContextKV, batch: Batch, config: Phase2Config, precision: str) -> None:
    """Print median times of a step, its parts and their matrix products in milliseconds, and the ratios."""
    dtype, count = DTYPES[precision], len(batch)
    (window, present), table = batch.inputs, model.wte.weight.detach().to(dtype)
    batch = replace(batch, inputs=(window.to(dtype), present))
    headless = ContextKV(model.config, vocab_size=1)
    headless_batch = replace(batch, tokens=batch.tokens * 0, targets=batch.targets * 0)
    hidden = torch.randn(count, model.config.hidden_size, requires_grad=True)
    stepper = Stepper(model.trained_weights(), config, count)
    functions: dict[str, Callable[[], Any]] = {
        "head": lambda: model.losses(hidden, batch.tokens, batch.targets, table)[0].sum().backward(),
        "head, products": lambda: head_products(hidden.detach().to(dtype), table),
        "layer": lambda: batch_gradients(
            headless, headless.wte.weight.detach().to(dtype), headless_batch, precision
        ),
        "layer, products": layer_products(model, batch, dtype),
        "step": lambda: train_step(model, table, stepper, batch, precision),
    }
    rounds = [{name: seconds(function) for name, function in functions.items()} for _ in range(ROUNDS)]
    median = {name: statistics.median(times[name] for times in rounds) for name in functions}
    median["step, products"] = median["head, products"] + median["layer, products"]
    print(f"a step of {count} positions in {precision}: all, products alone, ratio")
    for name in ("head", "layer", "step"):
        whole, floor = median[name], median[f"{name}, products"]
        print(f"{name}: {1000 * whole:.0f} ms, {1000 * floor:.0f} ms, {whole / floor:.2f}")


def main(samples: int, preset: str = "offline") -> None:
    """Print the times of the reference and of the package side by side."""
    settings = {"phase1.max_iterations": ITERATIONS, "phase2.max_epochs": 1}
    settings |= {"data.test_samples": 0, "runtime.precision": "auto"}
    config = ctxkv.build_config(preset, "published", samples, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = ctxkv.run(config, f"{folder}/run")
        trained = ctxkv.open_run(run)
        exported = ctxkv.export(run)
        served = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
        train, val = trained.streams["train"], trained.streams["val"]
    ids, val_ids = train.ids.long(), val.ids.long()
    weights = trained.model.named_parameters()
    weights = {name.removeprefix("layer."): weight.detach().clone() for name, weight in weights}
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
    trained.model.train()
    batch = trained.model.batch(train, order(0)[: config.phase2.batch_size])
    for precision in dict.fromkeys(("fp32", choose_precision("auto", trained.model.device))):
        print_step(trained.model, batch, config.phase2, precision)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 10)
