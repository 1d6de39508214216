"""`ctxkv bench`: speed and memory of this package, on the machine at hand and on a real token stream.

All candidates are measured in one process, in turns: this package, the original's computation
(`method.reference`), the matrix products alone, and a GPT-2 block with its key-value cache.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ..errors import UserError
from ..experiments import prepare
from ..files import write_json
from ..hf.modeling import CACHE_NAME, ContextKVForCausalLM
from ..locks import only_process
from ..method import reference
from ..method.caches import Batch, StreamCache
from ..method.contexts import distinct_rows, draw_contexts, exact_contexts
from ..method.loop import Loop
from ..method.model import ContextBlock, ContextKV, project_inputs
from ..method.oacd import Phase1State, train_iteration
from ..method.phase2 import Stepper, train_step
from ..report.tables import digits
from ..report.terminal import terminal_table
from ..runs.capture import CapturedStep
from ..runs.config import ExperimentConfig, flat
from ..runs.provenance import PRECISIONS, device_name, versions
from ..views.axes import panels, save, styled
from .timing import GRAPH, Steps, compare, interleaved, product_rate

PUBLISHED_ONLY = ("model.anchor", "data.unigram")  # settings that `method.reference` does not take
SCALES = (64, 16, 4, 1)  # timed beginnings: the stream's length divided by these
HISTORIES = (640, 4_000, 32_000)  # tokens read before
TOKENS_A_ROUND = 8  # generated
PREFILL_ROUNDS = 3  # at most: the GPT-2 block reads its longest history for many seconds
MODELS = {"ours": "Context-KV", "gpt2": "GPT-2 block"}
TITLES = {
    "phase1": "Phase 1, one iteration",
    "phase2": "Phase 2, one step",
    "scaling": "Ours, fp32, on longer streams",
    "generation": "Generation",
}

Makers = dict[str, Callable[[], Steps]]
Candidates = dict[tuple[str, int], Callable[[], Any]]


def bench(config: ExperimentConfig, run_folder: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Measure everything, and write `bench.json` and `bench.png` into `out`.

    The experiment's stages are run up to the contexts. Results are medians over `rounds`.

    Raises:
        UserError: as `prepare`; settings or plug-ins that the original does not have; too few rounds; an
            `out` that cannot be made.
    """
    _refuse_unmeasured(config, rounds)
    with only_process(out):  # refuses, before all is measured, a folder that cannot be written to
        pass
    prepared = prepare(config, run_folder)
    model, device = prepared.model, prepared.model.device
    ids = prepared.caches["train"].ids.to(device)
    contexts = prepared.caches["train"].contexts.to(device, torch.float32)
    rates = {name: product_rate(dtype, device) for name, dtype in PRECISIONS.items()}
    batch = min(config.phase2.batch_size, len(ids) - 1)
    head = 4 * batch * model.wte.weight.numel()  # two products of the output head
    results = {
        "device": device_name(device),
        "versions": versions(),
        "preset": config.preset,
        "samples": config.data.samples,
        "tokens": len(ids) - 1,
        "rounds": rounds,
        "product_gflop_per_second": {name: rate / 1e9 for name, rate in rates.items()},
        "phase1": compare(phase1_steps(model, ids, config), rates, rounds, device, "phase1"),
        "phase2": compare(phase2_steps(model, ids, contexts, config), rates, rounds, device, "phase2", head),
        "scaling": scaling(model, ids, config, rounds),
        "generation": generation(ContextKVForCausalLM.from_model(model, {}), rounds),
    }
    write_json(out / "bench.json", results)
    save(bench_figure(results), out / "bench.png")
    return results


def _refuse_unmeasured(config: ExperimentConfig, rounds: int) -> None:
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; allowed: 1 or more.")
    if config.plugins:
        raise UserError(
            f"The original has no plug-in as {' or '.join(config.plugins)}; bench measures recipes without, "
            "such as --recipe exact."
        )
    published, own = (dict(flat(each.to_dict())) for each in (ExperimentConfig(), config))
    if others := [f"{key}={published[key]}" for key in PUBLISHED_ONLY if own[key] != published[key]]:
        raise UserError(f"The original has {', '.join(others)} only; give bench the same with --set.")


def phase1_steps(model: ContextKV, ids: Tensor, config: ExperimentConfig) -> Makers:
    """Make iterations of Phase 1 on a stream of n + 1 tokens: the original's and ours."""
    settings, device = config.phase1, model.device

    def start() -> tuple[nn.Module, Phase1State]:
        torch.manual_seed(config.runtime.seed)
        block = ContextBlock(config.model.context_dim, config.model.hidden_size).to(device)
        optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
        generator = torch.Generator(device).manual_seed(config.runtime.seed)
        contexts = torch.empty(len(ids), model.config.context_dim, device=device)
        draw_contexts(contexts, settings.initial_std, generator)
        return block, Phase1State(dict(block.named_parameters()), optimizer, contexts, generator)

    def original() -> Steps:
        _, state = start()
        weights = {f"context_block.{name}": weight for name, weight in state.weights.items()}
        contexts = state.contexts[1:]
        embeddings = reference.normed_embedding(model.wte.weight.detach(), ids[:-1].long())  # of every token
        while True:
            contexts, loss, _ = reference.phase1_iteration(
                weights, state.optimizer, embeddings, contexts, state.generator, settings
            )
            yield loss

    def ours() -> Steps:
        block, state = start()
        embeddings, tokens = distinct_rows(model, ids[:-1])
        while True:
            yield train_iteration(block, state, embeddings, tokens, settings)[0]

    return {"original": original, "fp32": ours}


def phase2_steps(model: ContextKV, ids: Tensor, contexts: Tensor, config: ExperimentConfig) -> Makers:
    """Make steps of Phase 2 on padded contexts: the original's, and ours in either precision."""
    settings, seed = config.phase2, config.runtime.seed
    size = min(settings.batch_size, len(ids) - 1)
    order = StreamCache(ids, contexts).epoch_order(seed, 1)
    order = order[: len(order) // size * size]  # whole batches only

    def start() -> tuple[ContextKV, Stepper]:
        copied = copy.deepcopy(model, {id(model.wte.weight): model.wte.weight}).train()
        copied.set_phase(2)
        return copied, Stepper(copied.trained_weights(), settings, len(ids) - 1)

    def endless(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """Yield batches of one epoch after another; all candidates draw the same dropout for a step."""
        for step, batch in enumerate(chain.from_iterable(epoch() for _ in repeat(None))):
            torch.manual_seed(seed + step)
            yield batch

    def original() -> Steps:
        copied, stepper = start()
        weights, table, inputs = dict(copied.named_parameters()), copied.wte.weight.detach(), ids.long()
        embeddings = reference.normed_embedding(table, inputs[:-1])  # of every token
        for positions in endless(lambda: order.to(model.device).split(size)):
            yield reference.phase2_step(
                weights, stepper.optimizer, table, inputs, contexts[1:], positions, config.model, embeddings
            )

    def ours(precision: torch.dtype, graph: bool = False) -> Steps:
        copied, stepper = start()
        table = copied.wte.weight.detach().to(precision)
        cache = StreamCache(ids, contexts.to(precision))
        step: Callable[[Batch, int], Tensor] = partial(train_step, copied, table, stepper, Loop())
        step = CapturedStep(step, size, model.device) if graph else step
        for batch in endless(lambda: cache.batches(order, size, copied)):
            yield step(batch, len(batch)) / size

    makers = {name: partial(ours, dtype) for name, dtype in PRECISIONS.items()}
    if model.device.type == "cuda":
        makers |= {f"{name}{GRAPH}": partial(ours, dtype, graph=True) for name, dtype in PRECISIONS.items()}
    return {"original": original, **makers}


def scaling(model: ContextKV, ids: Tensor, config: ExperimentConfig, rounds: int) -> list[dict[str, float]]:
    """Measure our time and memory a token on beginnings of a stream, from a sixty-fourth to all of it.

    Returns:
        a row a length: `tokens`; microseconds a token of a Phase 1 iteration, of the exact contexts and of a
        Phase 2 step, fp32; bytes a token of the caches.
    """
    rows: list[dict[str, float]] = []
    candidates: Candidates = {}
    for place, scale in enumerate(SCALES):
        beginning = ids[: (len(ids) - 1) // scale + 1]
        embeddings, tokens = distinct_rows(model, beginning[:-1])
        inputs = project_inputs(model.context_block, embeddings).detach()
        exact = partial(exact_contexts, model.context_block, inputs, tokens, config.phase1.tolerance)
        contexts, _ = exact()
        steps = {
            "phase1": phase1_steps(model, beginning, config),
            "phase2": phase2_steps(model, beginning, contexts, config),
        }
        candidates |= {(name, place): partial(next, makers["fp32"]()) for name, makers in steps.items()}
        candidates["contexts", place] = exact
        rows.append(
            {"tokens": len(tokens), "cache_bytes": StreamCache(beginning, contexts).nbytes / len(tokens)}
        )
    for (name, place), taken in interleaved(candidates, rounds, model.device, "Scaling").items():
        most = config.phase2.batch_size if name == "phase2" else len(ids)
        rows[place][f"{name}_us"] = taken / min(rows[place]["tokens"], most) * 1e6
    return rows


def generation(model: ContextKVForCausalLM, rounds: int) -> list[dict[str, float]]:
    """Measure speed and cache of our model and a GPT-2 block: same width, one layer, same output head.

    Returns:
        a row a history of random tokens: `history`, and for `ours` and `gpt2` `prefill_seconds` from the
        tokens to the logits of the next one, then `tokens_per_second` one by one, `cache_bytes` and
        `bytes_per_position`.
    """
    models = {"ours": model.eval(), "gpt2": _gpt2_block(model)}
    prefill: Candidates = {}
    for history in HISTORIES:
        tokens = torch.randint(model.config.vocab_size, (1, history), device=model.device)
        prefill |= {(name, history): partial(_read, each, tokens) for name, each in models.items()}
    prefill_seconds = interleaved(prefill, min(rounds, PREFILL_ROUNDS), model.device, "Prefill")
    caches = {key: read() for key, read in prefill.items()}
    held = {key: _nbytes(cache) for key, cache in caches.items()}
    one_by_one = {key: partial(_read_on, models[key[0]], cache, key[1]) for key, cache in caches.items()}
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
    return model(tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})[CACHE_NAME]


def _read_on(model: Any, cache: Any, history: int) -> None:
    if isinstance(cache, DynamicCache) and (read := cache.get_seq_length() - history):
        cache.crop(-read)  # it grows, and each round begins with the same history
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
        n_positions=max(HISTORIES) + TOKENS_A_ROUND,
    )
    block: Any = GPT2LMHeadModel(config)
    block.to(model.device).eval()
    block.transformer.wte.weight = block.lm_head.weight = model.wte.weight
    return block


def _nbytes(cache: Any) -> int:
    layers = getattr(cache, "layers", None)  # of a key-value cache
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) if layers else cache.nbytes


def bench_table(results: Mapping[str, Any]) -> str:
    """Format the results for a terminal, by their names in `bench.json`."""
    lines = [
        f"{results['device']}, torch {results['versions']['torch']}",
        f"{results['tokens']:,} tokens of {results['samples']:,} conversations, preset {results['preset']}; "
        f"medians of {results['rounds']}",
        ", ".join(f"{name} {rate:,.0f}" for name, rate in results["product_gflop_per_second"].items())
        + " GFLOP/s in matrix products",
        "ratio: times as fast as the original; floor: the matrix products alone",
    ]
    for part, title in TITLES.items():
        named = isinstance(results[part], dict)
        rows = list(results[part].values()) if named else results[part]
        cells = [[name, *(digits(row[name]) for row in rows)] for name in rows[0]]  # a line a number
        lines += ["", title, terminal_table([["", *results[part]], *cells] if named else cells)]
    return "\n".join(lines)


@styled
def bench_figure(results: Mapping[str, Any]) -> Figure:
    """Draw seconds of both phases, generation by tokens of history, and time a token by length of stream."""
    figure, axes = panels(4, 8.4, rows=2)
    for ax, phase in zip(axes, ("phase1", "phase2"), strict=False):
        rows = results[phase]
        bars = ax.bar(list(rows), [row["seconds"] for row in rows.values()], label="measured")
        ax.bar_label(bars, [f"{row['ratio']:.1f}x" for row in rows.values()])
        floors = [row["floor_seconds"] for row in rows.values()]
        ax.bar(list(rows), floors, width=0.4, label="its matrix products alone")
        ax.set(title=TITLES[phase], ylabel="Time (s)")
    speeds = {f"{name}_tokens_per_second": label for name, label in MODELS.items()}
    times = {"phase1_us": "Phase 1 iteration", "contexts_us": "exact contexts", "phase2_us": "Phase 2 step"}
    for ax, part, x, lines, unit in (
        (axes[2], "generation", "history", speeds, "Tokens a second, one by one"),
        (axes[3], "scaling", "tokens", times, "Time per token (µs)"),
    ):
        for name, label in lines.items():
            points = [(row[x], row[name]) for row in results[part]]
            ax.plot(*zip(*points, strict=True), "o-", label=label)
        ax.set(title=TITLES[part], xscale="log", xlabel=f"{x.capitalize()} (tokens, log scale)", ylabel=unit)
        ax.set_ylim(bottom=0)
    for ax in axes:
        ax.legend()
    figure.suptitle(results["device"])
    return figure
