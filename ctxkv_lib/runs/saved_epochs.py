"""Saved state of a Phase 2 under way, at the end of epochs; and the hooks of both trainings in a run.

A stopped training goes on from its last saved epoch to the same numbers, since each epoch's order and dropout
depend on seed and epoch alone.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import ranks
from ..errors import DamagedFile
from ..files import read_with_metadata, write_tensors
from ..method.loop import Loop, Metric
from ..progress import notice, progress_bar

EVERY_SECONDS = 60  # at most so much work is repeated, and an epoch
T = TypeVar("T")


class RunLoop(Loop):
    """The hooks of a training in a run.

    Args:
        record: gets every metric, those of restored epochs included.
        path: where states are saved; None saves none, as of Phase 1, which takes seconds.
        key: stands for all that the training depends on; a state of another key is not restored.
    """

    def __init__(self, record: Callable[[Metric], None], path: Path | None = None, key: str = "") -> None:
        self.record, self.path, self.key, self.last = record, path, key, time.monotonic()
        self.metrics: list[Metric] = []

    def restore(self, state: Any) -> None:
        if self.path:
            restore(state, self.path, self.key)
        for metric in state.metrics:
            self.record(metric)

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        return progress_bar(items, description, total=total, initial=done)

    def after_round(self, state: Any, metric: Metric) -> None:
        if self.path and not ranks.rank() and time.monotonic() >= self.last + EVERY_SECONDS:
            save(state, self.path, self.key)
            self.last = time.monotonic()
        self.metrics.append(metric)
        self.record(metric)

    def shard(self, rows: int) -> slice:
        return ranks.shard(rows)

    def all_reduce(self, tensors: Any) -> None:
        ranks.all_reduce(tensors)


def save(state: Any, path: Path, key: str) -> None:
    """Write a `phase2.Phase2State`: tensors as such, everything else as JSON beside them."""
    held = {"weights": state.weights, "averages": state.stepper.averages, "best": state.best}
    held |= {"optimizer": state.stepper.optimizer.state_dict(), "metrics": state.metrics}
    tensors: dict[str, Tensor] = {}
    numbers = json.dumps(_without_tensors(held, "", tensors))
    write_tensors(path, tensors, {"key": key, "numbers": numbers})


def restore(state: Any, path: Path, key: str) -> None:
    """Overwrite a state that has just begun with the saved one, if there is one of this key."""
    try:
        tensors, metadata = read_with_metadata(path)
    except FileNotFoundError:
        return
    except DamagedFile as error:
        notice(f"{error} Phase 2 begins again.")
        return
    if metadata.get("key") != key:
        return
    held = _with_tensors(json.loads(metadata["numbers"]), tensors)
    with torch.no_grad():
        for name, weight in state.weights.items():
            weight.copy_(held["weights"][name])
    device = next(iter(state.weights.values())).device
    state.best = {name: each.to(device, copy=True) for name, each in held["best"].items()}
    for name, average in held["averages"].items():
        state.stepper.averages[name].copy_(average)
    _load(state.stepper.optimizer, held["optimizer"])
    state.metrics = held["metrics"]


def _load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimiser's state; of what torch converts to the weights' dtype, keep the saved one."""
    optimizer.load_state_dict(saved)
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    for number, weight in enumerate(weights):
        for slot, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                loaded = optimizer.state[weight][slot]
                optimizer.state[weight][slot] = value.to(loaded.device, copy=True)


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return nested dicts and lists as JSON holds them; their tensors go to `tensors`, by their places."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):  # whose keys may be numbers, of which JSON would make text
        held = [_without_tensors(each, f"{place}/{key}", tensors) for key, each in value.items()]
        return {"keys": [*value], "values": held}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, f"{place}/{number}", tensors) for number, each in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return dict(zip(value["keys"], (_with_tensors(each, tensors) for each in value["values"]), strict=True))
