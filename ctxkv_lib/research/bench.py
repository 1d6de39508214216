"""`ctxkv bench`: speed and memory of this package, on the machine at hand and on a real token stream.

All in one process and side by side: compared with the original's way of computing (`method.reference`), with
the floor that the machine's own rate of matrix products sets, and with a GPT-2 block and its key-value cache.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ..errors import UserError
from ..experiments import prepare
from ..files import write_json
from ..hf.modeling import CACHE_NAME, ContextKVForCausalLM
from ..method import reference
from ..method.caches import Batch, StreamCache, epoch_order
from ..method.config import ModelConfig
from ..method.contexts import distinct_rows, draw_contexts, exact_contexts
from ..method.memory import mib
from ..method.model import ContextBlock, ContextKV, project_inputs
from ..method.oacd import train_iteration
from ..method.phase2 import Stepper, batch_gradients
from ..runs.config import ExperimentConfig
from ..runs.provenance import PRECISIONS, device_name, versions
from ..runs.published import PUBLISHED
from ..runs.settings import BLOCK_TOKENS, POOL_BLOCKS, STRIDE
from ..runs.streamed import Streamed, project_vocabulary
from ..views.axes import save
from .bench_results import bench_figure
from .bench_results import bench_table as bench_table
from .timing import interleaved, operations, peak_bytes, product_rate

# Settings of the model that the reference takes; it knows all others as published only.
SIZES = {"hidden_size", "context_dim", "interval", "max_contexts", "num_heads", "intermediate_size"}
STEPS_FOR_MEMORY = 3
SCALES = (64, 16, 4, 1)  # the stream's length over that of the beginnings that are timed
HISTORIES = (640, 4_000, 32_000)  # tokens read before
TOKENS_A_ROUND = 8
PREFILL_ROUNDS = 3  # at most: the GPT-2 block reads its longest history for many seconds

Step = Callable[[], float | Tensor]  # does one iteration or optimiser step, and returns its mean loss
Results = dict[str, Any]


def bench(config: ExperimentConfig, run_folder: Path, out: Path, rounds: int) -> Results:
    """Measure everything, and leave `bench.json` and `bench.png` in `out`.

    Args:
        config: the training stream, shapes and batch sizes to measure with.
        run_folder: of that experiment; it is brought as far as its contexts.
        rounds: timed repetitions; medians are reported.

    Raises:
        UserError: as `prepare`; settings that the original does not have; too few rounds.
    """
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; allowed: 1 or more.")
    taken = {*SIZES, "vocab_size", "attention_dropout"}
    published = {name: value for name, value in asdict(ModelConfig()).items() if name not in taken}
    if others := [f"model.{k}={v}" for k, v in published.items() if getattr(config.model, k) != v]:
        raise UserError(f"The original has {', '.join(others)} only; bench measures with these.")
    prepared = prepare(config, run_folder)
    model, device = prepared.model, prepared.model.device
    ids = prepared.caches["train"].ids.to(device)
    contexts = prepared.caches["train"].contexts.to(device, torch.float32)
    rates = {name: product_rate(dtype, device) for name, dtype in PRECISIONS.items()}
    batch = min(config.phase2.batch_size, len(ids) - 1)
    head = 4 * batch * model.wte.weight.numel()  # two products of the output head
    phase1 = compare(phase1_steps(model, ids, config), rates, rounds, device, "phase1")
    phase2 = compare(phase2_steps(model, ids, contexts, config), rates, rounds, device, "phase2", head)
    steps = PUBLISHED[500]["train_tokens"] / config.phase2.batch_size
    results = {
        "device": device_name(device),
        "versions": versions(),
        "preset": config.preset,
        "samples": config.data.samples,
        "tokens": len(ids) - 1,
        "rounds": rounds,
        "product_gflop_per_second": {name: rate / 1e9 for name, rate in rates.items()},
        "phase1": phase1,
        "phase2": phase2,
        "published_epoch_seconds": {name: row["seconds"] * steps for name, row in phase2.items()},
        "scaling": scaling(model, ids, config, rounds),
        "generation": generation(ContextKVForCausalLM.from_model(model, {}), rounds),
    }
    write_json(out / "bench.json", results)
    save(bench_figure(results), out / "bench.png")
    return results


def compare(
    makers: Mapping[str, Callable[[], Step]],
    rates: Mapping[str, float],
    rounds: int,
    device: torch.device,
    title: str,
    head_operations: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure time, memory, loss and distance from the floor of several ways to do the same steps.

    Args:
        makers: each makes its steps from the same weights; the first is what the others are compared with.
        rates: of matrix products, `fp32` and `bf16`; only a maker named `bf16` uses the latter.
        rounds: steps that are timed.
        head_operations: of the output head in one step, all that is bf16 on a CPU.

    Returns:
        by name: `seconds`, `ratio` (how many times as fast as the first), `peak_mib` (what building it and
        three steps take at most), `loss_difference` (largest, from the first's), `operations`,
        `floor_seconds` (those operations at the measured rates) and `floor_share` (floor / seconds).
    """

    def few(make: Callable[[], Step]) -> None:
        step = make()
        for _ in range(STEPS_FOR_MEMORY):
            step()

    peaks = {name: peak_bytes(partial(few, make), device) for name, make in makers.items()}
    losses: dict[str, list[float | Tensor]] = {name: [] for name in makers}
    steps = {name: make() for name, make in makers.items()}
    timed = {name: partial(lambda n: losses[n].append(steps[n]()), name) for name in makers}
    seconds = interleaved(timed, rounds, device, title)
    first, rows = next(iter(makers)), {}
    for name, step in steps.items():
        total = operations(step)
        in_bf16 = 0 if name != "bf16" else head_operations if device.type == "cpu" else total
        floor = in_bf16 / rates["bf16"] + (total - in_bf16) / rates["fp32"]
        differences = [abs(float(a) - float(b)) for a, b in zip(losses[name], losses[first], strict=True)]
        rows[name] = {
            "seconds": seconds[name],
            "ratio": seconds[first] / seconds[name],
            "peak_mib": mib(peaks[name]),
            "loss_difference": max(differences),
            "operations": total,
            "floor_seconds": floor,
            "floor_share": floor / seconds[name],
        }
    return rows


def phase1_steps(model: ContextKV, ids: Tensor, config: ExperimentConfig) -> dict[str, Callable[[], Step]]:
    """Make iterations of Phase 1 on a stream of n + 1 tokens: the original's and ours."""
    settings, device = config.phase1, model.device

    def start() -> tuple[Any, torch.optim.Optimizer, Tensor, torch.Generator]:
        torch.manual_seed(config.runtime.seed)
        block = ContextBlock(config.model.context_dim, config.model.hidden_size).to(device)
        optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
        generator = torch.Generator(device).manual_seed(config.runtime.seed)
        contexts = torch.empty(len(ids), model.config.context_dim, device=device)
        draw_contexts(contexts, settings.initial_std, generator)
        return block, optimizer, contexts, generator

    def original() -> Step:
        block, optimizer, contexts, generator = start()
        weights = {f"context_block.{name}": weight for name, weight in block.named_parameters()}
        contexts = contexts[1:]
        embeddings = reference.normed_embedding(model.wte.weight.detach(), ids[:-1].long())  # of every token

        def step() -> float:
            nonlocal contexts
            found = reference.phase1_iteration(weights, optimizer, embeddings, contexts, generator, settings)
            contexts, loss, _ = found
            return loss

        return step

    def ours() -> Step:
        block, optimizer, contexts, generator = start()
        embeddings, tokens = distinct_rows(model, ids[:-1])
        return lambda: train_iteration(block, optimizer, embeddings, tokens, contexts, settings, generator)[0]

    return {"original": original, "fp32": ours}


def phase2_steps(
    model: ContextKV, ids: Tensor, contexts: Tensor, config: ExperimentConfig
) -> dict[str, Callable[[], Step]]:
    """Make steps of Phase 2 on padded contexts: the original's, and ours in either precision."""
    settings, shape = config.phase2, config.model
    size = min(settings.batch_size, len(ids) - 1)
    order = epoch_order(len(ids) - 1, config.runtime.seed, epoch=1)
    order = order[: len(order) // size * size]  # whole batches only

    def start() -> tuple[ContextKV, Stepper]:
        copied = copy.deepcopy(model, {id(model.wte.weight): model.wte.weight}).train()
        copied.set_phase(2)
        return copied, Stepper(copied.trained_weights(), settings, len(ids) - 1)

    def endless(step: Callable[[Any], float | Tensor], epoch: Callable[[], Iterator[Any]]) -> Step:
        """Steps of one epoch after another, whose dropout is drawn alike for everyone."""
        batches = chain.from_iterable(epoch() for _ in repeat(None))
        seeds = count(config.runtime.seed)

        def following() -> float | Tensor:
            torch.manual_seed(next(seeds))
            return step(next(batches))

        return following

    def original() -> Step:
        copied, stepper = start()
        table, inputs = copied.wte.weight.detach(), ids.long()
        step = partial(
            reference.phase2_step,
            dict(copied.named_parameters()),
            stepper.optimizer,
            table,
            inputs,
            contexts[1:],
            shape=shape,
            embeddings=reference.normed_embedding(table, inputs[:-1]),  # of every token
        )
        return endless(step, lambda: iter(order.to(model.device).split(size)))

    def ours(precision: torch.dtype) -> Step:
        copied, stepper = start()
        table = copied.wte.weight.detach().to(precision)
        cache = StreamCache(ids, contexts.to(precision))

        def step(batch: Batch) -> Tensor:
            stepper.optimizer.zero_grad()
            loss = batch_gradients(copied, table, batch, size, slice(0, size))
            stepper.step(0)
            return loss / size

        return endless(step, lambda: cache.batches(order, size, copied))

    return {"original": original, **{name: partial(ours, dtype) for name, dtype in PRECISIONS.items()}}


def scaling(model: ContextKV, ids: Tensor, config: ExperimentConfig, rounds: int) -> list[dict[str, float]]:
    """Measure our time and memory a token on beginnings of a stream, from a sixty-fourth to all of it.

    Returns:
        a row a length: `tokens`; microseconds a token of a Phase 1 iteration, of the exact contexts, of a
        Phase 2 step and of making a pool of streamed contexts, fp32; `streamed_share`, that of the last in an
        epoch with them; bytes a token of the caches.
    """
    whole, rows = project_vocabulary(model), []
    candidates: dict[tuple[str, int], Callable[[], Any]] = {}
    for scale in SCALES:
        beginning = ids[: (len(ids) - 1) // scale + 1]
        embeddings, tokens = distinct_rows(model, beginning[:-1])
        inputs = project_inputs(model.context_block, embeddings).detach()
        exact = partial(exact_contexts, model.context_block, inputs, tokens, config.phase1.tolerance)
        contexts, _ = exact()
        streamed = Streamed(beginning, contexts[::STRIDE].contiguous(), whole, torch.float32)
        rows.append(
            {"tokens": len(tokens), "cache_bytes": StreamCache(beginning, contexts).nbytes / len(tokens)}
        )
        candidates["phase1", scale] = phase1_steps(model, beginning, config)["fp32"]()
        candidates["contexts", scale] = exact
        candidates["streamed", scale] = partial(_first_batch, streamed, model)
        candidates["phase2", scale] = phase2_steps(model, beginning, contexts, config)["fp32"]()
    seconds = interleaved(candidates, rounds, model.device, "Scaling")
    read = {"phase2": config.phase2.batch_size, "streamed": BLOCK_TOKENS * POOL_BLOCKS}  # tokens, else all
    for (name, scale), taken in seconds.items():
        row = rows[SCALES.index(scale)]
        row[f"{name}_us"] = taken / min(row["tokens"], read.get(name, row["tokens"])) * 1e6
    for row in rows:
        row["streamed_share"] = row["streamed_us"] / (row["streamed_us"] + row["phase2_us"])
    return rows


def _first_batch(stream: Streamed, model: ContextKV) -> Any:
    """The first batch of an epoch, for which a pool of contexts is made."""
    everything = slice(None)
    return next(stream.epoch(seed=0, number=1, done=0, size=1, model=model, shard=lambda _: everything))


def generation(model: ContextKVForCausalLM, rounds: int) -> list[dict[str, float]]:
    """Measure speed and cache of our model and a GPT-2 block: same width, one layer, same output head.

    Returns:
        a row a history of random tokens: `history`, and for `ours` and `gpt2` `prefill_seconds` from the
        tokens to the logits of the next one, then `tokens_per_second` one by one, `cache_bytes` and
        `bytes_per_position`.
    """
    models = {"ours": model.eval(), "gpt2": _gpt2_block(model)}
    prefill: dict[tuple[str, int], Callable[[], Any]] = {}
    for history in HISTORIES:
        tokens = torch.randint(model.config.vocab_size, (1, history), device=model.device)
        prefill |= {(name, history): partial(_read, each, tokens) for name, each in models.items()}
    prefill_seconds = interleaved(prefill, min(rounds, PREFILL_ROUNDS), model.device, "Prefill")
    caches = {key: read() for key, read in prefill.items()}
    held = {key: _nbytes(cache) for key, cache in caches.items()}
    one_by_one = {key: partial(_read_on, models[key[0]], cache) for key, cache in caches.items()}
    seconds = interleaved(one_by_one, rounds, model.device, "Generation")
    rows: list[dict[str, float]] = [{"history": history} for history in HISTORIES]
    for (name, history), num_bytes in held.items():
        rows[HISTORIES.index(history)] |= {
            f"{name}_prefill_seconds": prefill_seconds[name, history],
            f"{name}_tokens_per_second": TOKENS_A_ROUND / seconds[name, history],
            f"{name}_cache_bytes": num_bytes,
            f"{name}_bytes_per_position": num_bytes / history,
        }
    return rows


@torch.inference_mode()
def _read(model: Any, tokens: Tensor, cache: Any = None) -> Any:
    """Read tokens `[1, n]` up to the logits of the next one; returns the cache."""
    held = {CACHE_NAME: cache} if cache else {}
    return model(tokens, use_cache=True, logits_to_keep=1, **held)[CACHE_NAME]


def _read_on(model: Any, cache: Any) -> None:
    for _ in range(TOKENS_A_ROUND):
        _read(model, torch.zeros(1, 1, dtype=torch.int64, device=model.device), cache)


def _gpt2_block(model: ContextKVForCausalLM) -> GPT2LMHeadModel:
    shape = model.config
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=shape.hidden_size,
        n_layer=1,
        n_head=shape.num_heads,
        n_inner=shape.intermediate_size,
        n_positions=2 * max(HISTORIES),
    )
    block: Any = GPT2LMHeadModel(config)
    block.to(model.device).eval()
    block.transformer.wte.weight = block.lm_head.weight = model.wte.weight
    return block


def _nbytes(cache: Any) -> int:
    layers = getattr(cache, "layers", None)  # of a key-value cache
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) if layers else cache.nbytes
