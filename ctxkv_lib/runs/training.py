"""Phase 2 of a run, and its state, from which an interrupted training continues.

The state is saved in `phase2.pt` at the end of an epoch, at most once per minute. After a kill, Ctrl-C or an
error, the next run continues from the last saved epoch, and reaches the same numbers, since the shuffling and
the dropout of each epoch depend only on the seed and the epoch (`phase2.train_epoch`). A state is used only
if it was made from the same inputs and the same files. Otherwise, a message is printed and training starts
over. `steps.step` deletes the file when Phase 2 is recorded.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import torch
from xxhash import xxh3_128

from ..files import mib, read_tensors, replacing, write_tensors
from ..method.callback import Metric, epochs_of
from ..method.memory import GIB, snapshot
from ..method.oacd import UNTRAINED
from ..method.phase2 import train_layer
from ..method.streams import Stream
from ..plugins.checks import refuse_unsaved
from ..progress import epochs_ahead, log, print_on_terminal
from ..store import Inputs, Work
from .build import WEIGHTS, parameter_counts, untrained_model, weights_of
from .callback import RunCallback
from .contexts import BLOCK, contexts_entry, load_streams, phase1_ids, sizes_mib
from .plan import Plan
from .presets import usual_epochs
from .provenance import provenance
from .steps import STORE_PREFIX, describe

STATE = "phase2.pt"
# Minimum time between two saves. If the process is killed, at most this much work plus one epoch is lost.
EVERY_SECONDS = 60
HEADROOM_BYTES = GIB  # GPU memory left for training


def prepare_streams(plan: Plan, work: Work) -> tuple[dict[str, Any], dict[str, Stream]]:
    """Return what Phase 1 has left for the summary, and both streams, which Phase 2 reads.

    A model without contexts has no Phase 1, and its streams consist of tokens only.
    """
    model = plan.model
    if not model.has_contexts:
        streams = {split: Stream(ids.int()) for split, ids in plan.ids.items()}
        tokens = {split: len(ids) for split, ids in plan.ids.items()}
        phase1 = {
            **asdict(UNTRAINED),
            "effective_rank": None,
            "context_method": plan.config.phase1.context_method,
        }
        return {"phase1": phase1, "tokens": tokens, "caches_mib": sizes_mib(streams), "objective": 0}, streams
    path, record = contexts_entry(plan, work.uses.get("table"), work.listen)
    work.uses[f"{STORE_PREFIX}contexts"] = record.output
    work.metrics += record.metrics
    work.memory += record.memory
    model.context_block.load_state_dict(read_tensors(path / BLOCK))
    return record.numbers, load_streams(path)


def train_phase2(plan: Plan, work: Work) -> dict[str, Any]:
    """Train the layer (Phase 2), and write the weights of the best epoch."""
    config, model = plan.config, plan.model
    phase1, mapped = prepare_streams(plan, work)
    streams, placement = place_streams(mapped, plan.device)
    print_on_terminal(f"Caches: {placement}")
    work.memory.append(snapshot("phase 2 prepared", plan.device))
    train, phase2 = streams["train"], config.phase2
    # Cost of validating one position, relative to the cost of training on one position.
    scoring = 1.5 if plan.precision == "bf16" else 0.5

    def tell(seconds: float) -> None:
        seconds *= 1 + scoring * len(streams["val"]) / len(train)
        epochs = phase2.least_epochs, phase2.max_epochs, usual_epochs(config)
        log(f"{len(train) + 1:,} tokens: {epochs_ahead(seconds, *epochs)}.")

    callback = Phase2Callback(work, plan.config.defaults(), tell)
    torch.manual_seed(config.runtime.seed)
    model.init_layer(phase1_ids(plan.ids["train"], config.phase1), config.phase1)
    result = train_layer(model, train, streams["val"], phase2, config.runtime.seed, plan.precision, callback)
    if config.has_own_modules:
        reseeded = config.replace({"runtime.seed": config.runtime.seed ^ 1})
        loaded = untrained_model(reseeded, len(model.wte.weight), model.log_unigram is not None).to(
            plan.device
        )
        loaded.load_table(model.wte.weight.detach(), model.log_unigram)
        loaded.load_state_dict(weights_of(model), strict=False)
        refuse_unsaved(model, loaded, streams["val"])
    write_tensors(work.folder / WEIGHTS, weights_of(model))
    return {
        "contexts": phase1,
        "parameters": parameter_counts(model),
        "offsets": model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": provenance(plan, placement),
    }


def place_streams(streams: dict[str, Stream], device: torch.device) -> tuple[dict[str, Stream], str]:
    """Move the streams that fit to the GPU, smallest first. Return all streams, and say where they are."""
    placed, words = dict[str, Stream](), []
    for split, stream in sorted(streams.items(), key=lambda item: item[1].nbytes):
        placed[split], place = stream, "mapped from its files"
        if device.type != "cpu":
            on_gpu = device.type == "cuda"  # mps shares the CPU's memory
            free_bytes = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
            if stream.nbytes + HEADROOM_BYTES <= free_bytes:
                placed[split], place = stream.map(lambda tensor: tensor.to(device)), f"on {device.type}"
        words.append(f"{split} {mib(stream.nbytes):,.0f} MiB {place}")
    return placed, ", ".join(words)


class Phase2Callback(RunCallback):
    """Also saves the state of Phase 2, and restores it.

    Args:
        work: its `metrics` include those of Phase 1 when Phase 2 begins. Metrics of restored epochs have
            `"replayed": True`.
        defaults: the default of each setting (see `steps.describe`).
        tell: called with the expected time of an epoch, as in `RunCallback`.
    """

    def __init__(self, work: Work, defaults: dict[str, Any], tell: Callable[[float], None]) -> None:
        super().__init__(work, tell)
        self.state, self.defaults, self.saved_at = work.folder / STATE, defaults, time.monotonic()
        self.of_phase1 = len(work.metrics)

    @torch.no_grad()
    def restore(self, state: Any) -> None:
        saved = read_state(self.state) if self.state.is_file() else None
        if not saved or (reason := self._reason_to_start_over(saved["inputs"], saved["uses"])):
            if saved:
                log(f"Phase 2 starts again from its first epoch, since {reason}.")
            return
        for name, weight in state.weights.items():
            weight.copy_(saved["weights"][name])
            state.best[name] = saved["best"][name].to(weight.device)
        for name, average in state.stepper.averages.items():
            average.copy_(saved["averages"][name])
        state.stepper.optimizer.load_state_dict(saved["optimizer"])
        state.metrics = epochs_of(saved["metrics"])
        log(f"Phase 2 continues after epoch {state.metrics[-1]['epoch']}.")
        for metric in saved["metrics"]:
            self.work.add_metric({**metric, "replayed": True})

    def _reason_to_start_over(self, inputs: Inputs, uses: dict[str, str]) -> str:
        if words := describe(inputs, self.work.inputs, self.defaults):
            return words
        return "" if uses == self.work.uses else "its contexts are gone, and this machine computes others"

    def after_round(self, state: Any, metric: Metric) -> None:
        if time.monotonic() >= self.saved_at + EVERY_SECONDS:
            values = {
                "inputs": self.work.inputs,
                "uses": self.work.uses,
                "metrics": [*self.work.metrics[self.of_phase1 :], metric],
                "weights": {name: weight.detach() for name, weight in state.weights.items()},
                "averages": state.stepper.averages,
                "best": state.best,
                "optimizer": state.stepper.optimizer.state_dict(),
            }
            write_state(self.state, values)
            self.saved_at = time.monotonic()
        super().after_round(state, metric)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checksum and then a state with `torch.save`, since torch does not verify the files it loads."""
    content = BytesIO()
    torch.save(state, content)
    with replacing(path) as temporary_path:
        temporary_path.write_bytes(xxh3_128(content.getvalue()).digest() + content.getvalue())


def read_state(path: Path) -> dict[str, Any] | None:
    """Load a state onto the CPU. If the file is damaged, print a message and return None."""
    content = path.read_bytes()
    size = xxh3_128().digest_size
    if xxh3_128(content[size:]).digest() != content[:size]:
        log(f"{path} is damaged; Phase 2 starts again from its first epoch.")
        return None
    state: dict[str, Any] = torch.load(BytesIO(content[size:]), map_location="cpu", weights_only=True)
    return state
