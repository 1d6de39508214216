"""Both phases of training: the original's loops against this package's, from the same weights and batches."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, count, repeat
from typing import Any

import torch
from torch import Tensor

from ...hf.modeling import ContextKVForCausalLM
from ...method.caches import StreamCache, dense_embeddings, epoch_order
from ...method.contexts import distinct_rows, draw_contexts, exact_contexts
from ...method.memory import mib
from ...method.model import ContextBlock
from ...method.oacd import train_iteration
from ...method.phase2 import make_optimizer, train_step
from ...runs.config import ExperimentConfig
from ...runs.provenance import PRECISIONS
from ...runs.settings import BLOCK_TOKENS, POOL_BLOCKS, STRIDE
from ...runs.streamed import Streamed, vocabulary_half
from . import original
from .measure import interleaved, operations, peak_bytes

ORIGINAL = "original"
STEPS_FOR_MEMORY = 3
SCALES = (64, 16, 4, 1)  # parts of the stream whose tokens are counted against each other
Step = Callable[[], float | Tensor]  # does one iteration or optimiser step, and returns its mean loss
Row = dict[str, Any]


def compare(
    makers: Mapping[str, Callable[[], Step]],
    rates: Mapping[str, float],
    rounds: int,
    device: torch.device,
    title: str,
    head_operations: int = 0,
) -> dict[str, Row]:
    """Time, memory and distance from the floor of several ways to do the same steps.

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
    first = next(iter(makers))
    rows = {}
    for name, step in steps.items():
        operation_count = operations(step)
        quick = 0 if name != "bf16" else head_operations if device.type == "cpu" else operation_count
        floor = quick / rates["bf16"] + (operation_count - quick) / rates["fp32"]
        differences = [abs(float(a) - float(b)) for a, b in zip(losses[name], losses[first], strict=True)]
        rows[name] = {
            "seconds": seconds[name],
            "ratio": seconds[first] / seconds[name],
            "peak_mib": mib(peaks[name]),
            "loss_difference": max(differences),
            "operations": operation_count,
            "floor_seconds": floor,
            "floor_share": floor / seconds[name],
        }
    return rows


def phase1_makers(
    model: ContextKVForCausalLM, ids: Tensor, config: ExperimentConfig
) -> dict[str, Callable[[], Step]]:
    """Iterations of Phase 1 on a stream of n + 1 tokens: the original's and ours."""
    settings, device = config.phase1, model.device

    def start() -> tuple[Any, torch.optim.Optimizer, Tensor, torch.Generator]:
        torch.manual_seed(config.runtime.seed)
        block = ContextBlock(model.config).to(device)
        optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
        generator = torch.Generator(device).manual_seed(config.runtime.seed)
        contexts = torch.empty(len(ids), model.config.context_dim, device=device)
        draw_contexts(contexts, settings.initial_std, generator)
        return block, optimizer, contexts, generator

    def original_iteration() -> Step:
        block, optimizer, contexts, generator = start()
        contexts, embeddings = contexts[1:], dense_embeddings(model, ids).cpu()

        def step() -> float:
            nonlocal contexts
            contexts, loss, _ = original.phase1_iteration(
                block, optimizer, embeddings, contexts, settings, generator
            )
            return loss

        return step

    def ours() -> Step:
        block, optimizer, contexts, generator = start()
        embeddings, tokens = distinct_rows(model, ids[:-1])
        parts = (embeddings, tokens, contexts, settings, generator)
        return lambda: train_iteration(block, optimizer, *parts)[0]

    return {ORIGINAL: original_iteration, "fp32": ours}


def phase2_makers(
    model: ContextKVForCausalLM, ids: Tensor, contexts: Tensor, config: ExperimentConfig
) -> dict[str, Callable[[], Step]]:
    """Steps of Phase 2 on exact contexts: the original's, and ours in either precision."""
    settings, seed = config.phase2, config.runtime.seed
    size = min(settings.batch_size, len(ids) - 1)
    order = epoch_order(len(ids) - 1, seed, epoch=1)
    order = order[: len(order) // size * size]  # whole batches only

    def start() -> tuple[ContextKVForCausalLM, torch.optim.AdamW]:
        copied = copy.deepcopy(model, {id(model.wte.weight): model.wte.weight}).train()
        copied.set_phase(2)
        return copied, make_optimizer(copied, settings, len(ids) - 1)

    def endless(step: Callable[[Any], float | Tensor], epoch: Callable[[], Iterator[Any]]) -> Step:
        """Steps of one epoch after another, whose dropout is drawn alike for everyone."""
        batches = chain.from_iterable(epoch() for _ in repeat(None))
        numbers = count(seed)

        def following() -> float | Tensor:
            torch.manual_seed(next(numbers))
            return step(next(batches))

        return following

    def original_steps() -> Step:
        copied, optimizer = start()
        stream = (dense_embeddings(copied, ids).cpu(), contexts[1:].cpu(), ids.cpu().long())
        return endless(
            lambda positions: original.phase2_step(copied, optimizer, *stream, positions),
            lambda: iter(order.split(size)),
        )

    def our_steps(precision: torch.dtype) -> Step:
        copied, optimizer = start()
        table = copied.wte.weight.detach().to(precision)
        cache = StreamCache(ids, contexts.to(precision))
        return endless(
            lambda batch: train_step(copied, optimizer, table, batch) / size,
            lambda: cache.batches(order, size, copied),
        )

    ours = {name: partial(our_steps, dtype) for name, dtype in PRECISIONS.items()}
    return {ORIGINAL: original_steps, **ours}


def scaling(
    model: ContextKVForCausalLM, ids: Tensor, config: ExperimentConfig, rounds: int
) -> list[dict[str, float]]:
    """Our time and memory a token on growing beginnings of a stream, from a sixty-fourth to all of it.

    Returns:
        a row a length: `tokens`; microseconds a token of a Phase 1 iteration, of the exact contexts, of a
        Phase 2 step and of making a pool of streamed contexts, fp32; `streamed_share`, that of the last in an
        epoch with them; bytes a token of the caches.
    """
    whole = vocabulary_half(model)
    rows: list[dict[str, float]] = []
    candidates: dict[str, Callable[[], Any]] = {}
    for part in SCALES:
        beginning = ids[: (len(ids) - 1) // part + 1]
        embeddings, tokens = distinct_rows(model, beginning[:-1])
        half = model.context_block.project_tokens(embeddings).detach()
        exact = (model.context_block, half, tokens, config.phase1.tolerance)
        contexts, _ = exact_contexts(*exact)
        cache = StreamCache(beginning, contexts)
        rows.append({"tokens": len(tokens), "cache_bytes": cache.nbytes / len(tokens)})
        candidates[f"phase1 {part}"] = phase1_makers(model, beginning, config)["fp32"]()
        candidates[f"contexts {part}"] = partial(exact_contexts, *exact)
        starts = contexts[::STRIDE].contiguous()
        candidates[f"pool {part}"] = partial(
            _first_pool, Streamed(beginning, starts, whole, torch.float32), model
        )
        candidates[f"phase2 {part}"] = phase2_makers(model, beginning, contexts, config)["fp32"]()
    seconds = interleaved(candidates, rounds, model.device, "Scaling")
    for part, row in zip(SCALES, rows, strict=True):
        row["phase1_us"] = seconds[f"phase1 {part}"] / row["tokens"] * 1e6
        row["contexts_us"] = seconds[f"contexts {part}"] / row["tokens"] * 1e6
        row["phase2_us"] = seconds[f"phase2 {part}"] / min(config.phase2.batch_size, row["tokens"]) * 1e6
        pool = min(row["tokens"], BLOCK_TOKENS * POOL_BLOCKS)
        row["streamed_us"] = seconds[f"pool {part}"] / pool * 1e6
        row["streamed_share"] = row["streamed_us"] / (row["streamed_us"] + row["phase2_us"])
    return rows


def _first_pool(stream: Streamed, model: ContextKVForCausalLM) -> Any:
    """The first batch of an epoch, for which a pool is made."""
    return next(stream.epoch(seed=0, number=1, done=0, size=1, model=model))
