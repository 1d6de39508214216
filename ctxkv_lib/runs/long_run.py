"""What a long training needs besides its loop: progress, saved states, micro-batches, several processes.

The last two states of a training are kept: one that cannot be read is passed over for the one before it.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import ranks
from ..errors import DamagedFile, is_out_of_memory
from ..files import read_tensors, tensor_metadata, write_streamed
from ..method.caches import Batch
from ..method.loop import Loop, Metric
from ..method.oacd import Phase1State
from ..method.phase2 import Phase2State
from ..progress import Listener, notice, progress_bar, say
from .capture import CapturedStep
from .micro_batches import in_micro_batches, random_state, set_random_state, summed
from .scratch import parts, release_mapped

# A stop repeats at most so much work and one step (in Phase 1, an iteration). Writing may take a tenth of the
# time: at the published size (605 MiB in Phase 1, 100 MiB in Phase 2) a disk of 110 MiB/s keeps it under a
# minute; a slower one is written to less often.
EVERY_SECONDS = 30
WRITING_SHARE = 1 / 10
PROGRESS = ("metrics", "position", "seconds")  # what a state has besides tensors
State = Phase1State | Phase2State
T = TypeVar("T")


class Checkpoint:
    """The last two states of one training, in `path` and a file beside it.

    Args:
        path: a safetensors file.
        key: stands for everything the training depends on; states saved under another are not restored.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.previous, self.key = path, _previous(path), key
        self.next_save = time.monotonic() + EVERY_SECONDS

    @property
    def due(self) -> bool:
        """Whether it is time to save again, by the clock of rank 0."""
        return ranks.on_rank_0(lambda: time.monotonic() >= self.next_save)

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write tensors of any device, and `state` in its JSON form; rank 0 does, for all."""
        if ranks.rank():
            return
        began = time.monotonic()
        with suppress(FileNotFoundError):
            self.path.replace(self.previous)
        chunks = ((name, part) for name, tensor in tensors.items() for part in parts(tensor))
        write_streamed(self.path, chunks, {"key": self.key, "state": json.dumps(state)}, len(tensors))
        ended = time.monotonic()
        self.next_save = ended + max(EVERY_SECONDS, (ended - began) / WRITING_SHARE)

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest state that can be read, its tensors on the CPU; None if there is none."""
        for path in (self.path, self.previous):
            try:
                metadata = tensor_metadata(path)
                if metadata.get("key") == self.key:
                    return read_tensors(path), json.loads(metadata["state"])
            except FileNotFoundError:
                continue
            except DamagedFile as error:
                notice(f"{path} cannot be used: {error.reason}; the state before it is, if there is one.")
                path.unlink(missing_ok=True)  # else it would take the place of the one that can be read
        return None


def forget(path: Path) -> None:
    """Remove both states of the training that keeps them at `path`."""
    for each in (path, _previous(path)):
        each.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


class LongRun(Loop):
    """The hooks of a training loop in an experiment.

    Args:
        name: of the training, such as `Phase 1`.
        listener: gets every metric, restored ones included.
        checkpoint: where to save; None saves nothing.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        listener: Listener,
        checkpoint: Checkpoint | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.name, self.device, self.listener, self.checkpoint = name, device, listener, checkpoint
        self.cuda_graph, self.micro_batches = cuda_graph, 1

    def restore(self, state: State) -> None:
        if self.checkpoint and (found := self.checkpoint.restore()):
            self._overwrite(state, *found)
        for metric in state.metrics:
            self.listener(metric)

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        return progress_bar(items, description, total=total, initial=done)

    def attempt(self, work: Callable[[], T], rows: int) -> T:
        draws = random_state(self.device)
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if self.micro_batches >= rows or not is_out_of_memory(error):
                    raise
                if self.micro_batches == 1:
                    say(
                        f"Memory is full: {self.name} goes on in micro-batches, slower, to the same numbers "
                        "(but for the dropout of a mixer, and some of your own: see docs/scale.md)."
                    )
            self.micro_batches *= 2
            set_random_state(self.device, draws)

    def apply(self, step: Callable[..., Tensor], *parts: Any) -> Tensor:
        return in_micro_batches(step, parts, self.micro_batches)

    def backward(
        self, work: Callable[[Batch], Tensor], batch: Batch, count: int, optimizer: torch.optim.Optimizer
    ) -> Tensor:
        if self.cuda_graph:  # one process, and no second attempt within a graph
            return work(batch)

        def attempt() -> Tensor:
            optimizer.zero_grad()  # again, after an attempt that failed
            return summed(work, batch, count, self.shard(count), self.micro_batches)

        loss = self.attempt(attempt, len(batch))
        ranks.all_reduce([loss, *_gradients(optimizer)])
        return loss

    def captured(self, step: Callable[[Batch, int], Tensor], size: int) -> Callable[[Batch, int], Tensor]:
        return CapturedStep(step, size, self.device) if self.cuda_graph else step

    shard = staticmethod(ranks.shard)
    all_reduce = staticmethod(ranks.all_reduce)
    release = staticmethod(release_mapped)

    def after_step(self, state: Phase2State) -> None:
        if self.checkpoint and self.checkpoint.due and state.total.isfinite():
            self._save(state)

    def after_round(self, state: State, metric: Metric) -> None:
        if self.checkpoint and (isinstance(state, Phase2State) or self.checkpoint.due):
            self._save(state)
        self.listener(metric)

    def _save(self, state: State) -> None:
        assert self.checkpoint is not None
        tensors = {**_tensors(state), f"draws/{self.device.type}": random_state(self.device)}
        slots = {f"adam/{name}": state.optimizer.state[weight] for name, weight in state.weights.items()}
        for place, group in enumerate(state.optimizer.param_groups):
            counts = {name: each for name, each in group.items() if isinstance(each, Tensor | float | int)}
            counts = {name: each for name, each in counts.items() if not isinstance(each, bool)}
            slots[f"group/{place}"] = counts  # without flags, which belong to a device
        kept = {f"{name}/{slot}": value for name, held in slots.items() for slot, value in held.items()}
        tensors |= {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in kept.items() if name not in tensors}
        if isinstance(state, Phase1State):
            tensors[f"noise/{self.device.type}"] = state.generator.get_state()
        else:
            tensors |= {f"best/{name}": value for name, value in state.best.items()}
        progress = {name: getattr(state, name) for name in PROGRESS if hasattr(state, name)}
        self.checkpoint.save(tensors, {**progress, "numbers": numbers})

    def _overwrite(self, state: State, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
        """Overwrite a state; with copies, since the mapped file will be replaced."""
        for name, tensor in _tensors(state).items():
            for part, kept in zip(parts(tensor), parts(tensors[name]), strict=True):
                part.copy_(kept)
        numbers = progress.pop("numbers", {})
        for name, value in progress.items():
            setattr(state, name, value)
        for place, group in enumerate(state.optimizer.param_groups):
            for name, value in _below(f"group/{place}/", {**numbers, **tensors}).items():
                if isinstance(value, Tensor) and name not in group:
                    group[name] = value.to(self.device, copy=True)
                elif isinstance(group.get(name), Tensor):
                    group[name].copy_(torch.as_tensor(value))
                else:
                    group[name] = value.item() if isinstance(value, Tensor) else value
        on_device = any(state.optimizer.defaults.get(name) for name in ("fused", "capturable"))
        for name, weight in state.weights.items():
            state.optimizer.state[weight] = _below(f"adam/{name}/", numbers) | {
                slot: value.clone()
                if slot == "step" and not on_device  # which is counted on the CPU
                else value.to(weight.device, copy=True)
                for slot, value in _below(f"adam/{name}/", tensors).items()
            }
        draws = tensors.get(f"draws/{self.device.type}")
        if isinstance(state, Phase2State):
            averages, best = (_below(f"{kind}/", tensors) for kind in ("average", "best"))
            for name, value in averages.items():
                if name not in state.stepper.averages:  # it averages from later on
                    state.stepper.averages[name] = value.to(self.device, copy=True)
            state.best = {name: value.to(self.device, copy=True) for name, value in best.items()}
            if not state.position:
                return  # an epoch begins with draws of its own
        if draws is None:
            say("The training was begun on another device: random draws continue differently here.")
            return
        set_random_state(self.device, draws)
        if isinstance(state, Phase1State):
            state.generator.set_state(tensors[f"noise/{self.device.type}"])


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the gradient of each weight; from now on zeros where a process's shard of a batch was empty."""
    found = []
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        found.append(weight.grad)
    return found


def _tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors that a state always has, by their names in the file."""
    tensors = {f"weight/{name}": weight.detach() for name, weight in state.weights.items()}
    if isinstance(state, Phase1State):
        buffers = {f"buffer/{name}": buffer for name, buffer in state.buffers.items()}
        return {**tensors, **buffers, "contexts": state.contexts}
    averages = {f"average/{name}": value for name, value in state.stepper.averages.items()}
    return {"total": state.total, **tensors, **averages}  # the largest numbers first


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): each for name, each in values.items() if name.startswith(prefix)}
