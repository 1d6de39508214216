"""Saved state of a Phase 2 under way, at the end of epochs; and the hooks of both trainings in a run.

A stopped training goes on from its last saved epoch to the same numbers, since each epoch's order and dropout
depend on seed and epoch alone. A kill in Phase 2 leaves Phase 1, the caches and
`checkpoint/phase2.safetensors` with the last saved epoch, if an epoch ended after the first minute. On the
next run `stages.phase2_stage` makes a `RunLoop` with the stage's key, and `phase2.train_layer` calls its
`restore`: a file of that key is restored and its metrics are passed on again, a damaged one is a notice, and
any other is ignored. After the stage it is deleted.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import ranks
from ..errors import DamagedFile
from ..files import read_with_metadata, write_tensors
from ..method.loop import Loop, Metric, epochs_of
from ..progress import estimated, notice, progress_bar

EVERY_SECONDS = 60  # at most this much work and one epoch are repeated
T = TypeVar("T")


class RunLoop(Loop):
    """The hooks of a training in a run.

    Args:
        record: gets every metric; those of restored epochs, too, marked as `replayed`.
        path: where states are saved; None saves none, as of Phase 1, which takes seconds.
        key: stands for all that the training depends on; a state of another key is not restored.

    Attributes:
        metrics: all so far, those of restored epochs included.
        tell: called once, some seconds into the first epoch, with the seconds that its steps take.
    """

    tell: Callable[[float], None] | None = None

    def __init__(self, record: Callable[[Metric], None], path: Path | None = None, key: str = "") -> None:
        self.record, self.path, self.key, self.saved_at = record, path, key, time.monotonic()
        self.metrics: list[Metric] = []

    @torch.no_grad()
    def restore(self, state: Any) -> None:
        if not (self.path and self.path.is_file()):
            return
        try:
            tensors, metadata = read_with_metadata(self.path)
        except DamagedFile as error:
            notice(f"{error} Phase 2 begins again.")
            return
        if metadata.get("key") != self.key:
            return
        groups = defaultdict[str, dict[str, Tensor]](dict)
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            groups[kind][name] = tensor.clone()  # it is mapped from the file
        for name, weight in state.weights.items():
            weight.copy_(groups["weights"][name])
            state.best[name] = groups["best"][name].to(weight.device)
        for name, average in state.stepper.averages.items():
            average.copy_(groups["averages"][name])
        moments = {int(kind): tensors for kind, tensors in groups.items() if kind.isdecimal()}
        parameter_groups, self.metrics = json.loads(metadata["numbers"])
        state.stepper.optimizer.load_state_dict({"state": moments, "param_groups": parameter_groups})
        state.metrics = epochs_of(self.metrics)
        notice(f"Phase 2 goes on after epoch {self.metrics[-1]['epoch']}.")
        for metric in self.metrics:
            self.record({**metric, "replayed": True})

    def _save(self, state: Any, path: Path) -> None:
        """Write a `phase2.Phase2State`: tensors under `kind/name`, everything else as JSON beside them.

        The kind of the optimiser's tensors is the number of their weight.
        """
        optimizer = state.stepper.optimizer.state_dict()
        groups = {"weights": state.weights, "averages": state.stepper.averages, "best": state.best}
        groups |= {str(number): moments for number, moments in optimizer["state"].items()}
        tensors = {
            f"{kind}/{name}": tensor for kind, group in groups.items() for name, tensor in group.items()
        }
        numbers = json.dumps([optimizer["param_groups"], self.metrics])
        write_tensors(path, tensors, {"key": self.key, "numbers": numbers})

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        bar = progress_bar(items, description, total=total, initial=done)
        tell, self.tell = self.tell, None
        return estimated(bar, total, tell) if tell else bar

    def after_round(self, state: Any, metric: Metric) -> None:
        self.metrics.append(metric)
        if self.path and not ranks.rank() and time.monotonic() >= self.saved_at + EVERY_SECONDS:
            self._save(state, self.path)
            self.saved_at = time.monotonic()
        self.record(metric)

    def after_steps(self, metric: Metric) -> None:
        self.metrics.append(metric)
        self.record(metric)

    shard = staticmethod(ranks.shard)
    all_reduce = staticmethod(ranks.all_reduce)
