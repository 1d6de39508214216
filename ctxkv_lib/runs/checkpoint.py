"""What a training needs to go on after it was stopped in the middle of a stage.

The last two states are kept: one that cannot be read is passed over for the one before it.
"""

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..errors import DamagedFile
from ..files import read_tensors, tensor_metadata, write_streamed
from ..progress import notice, say
from .placement import parts

# A stop repeats at most so much work and one step (in Phase 1, an iteration). Writing may take a tenth of the
# time: at the published size (605 MiB in Phase 1, 100 MiB in Phase 2) a disk of 110 MiB/s keeps it under a
# minute; a slower one is written to less often.
EVERY_SECONDS = 30
WRITING_SHARE = 1 / 10


class Checkpoint:
    """The last two states of one training, in `path` and a file beside it.

    Args:
        path: a safetensors file.
        key: stands for everything the training depends on; states saved under another are not taken up.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.previous, self.key = path, _previous(path), key
        self.next_save = time.monotonic() + EVERY_SECONDS

    @property
    def due(self) -> bool:
        """Whether it is time to save again, by the clock of the first process."""
        return ranks.from_first(lambda: time.monotonic() >= self.next_save)

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Keep tensors on any device, and `state` in its JSON form; the first process does, for all."""
        if ranks.index():
            return
        began = time.monotonic()
        with suppress(FileNotFoundError):
            self.path.replace(self.previous)
        pieces = ((name, part) for name, tensor in tensors.items() for part in parts(tensor))
        write_streamed(self.path, pieces, {"key": self.key, "state": json.dumps(state)})
        ended = time.monotonic()
        self.next_save = ended + max(EVERY_SECONDS, (ended - began) / WRITING_SHARE)

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state that can be read, its tensors on the CPU; None if there is none."""
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


def optimizer_tensors(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, and what the optimiser knows of each, under names of their own."""
    tensors = {f"weight/{name}": value for name, value in weights.items()}
    for name, parameter in weights.items():
        tensors |= {f"adam/{name}/{slot}": value for slot, value in optimizer.state[parameter].items()}
    return tensors


def gradients(weights: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradient of each weight; zeros, from now on, where a process's part of a batch was empty."""
    found = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        found.append(weight.grad)
    return found


def put_back(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put what `optimizer_tensors` named in place again."""
    for name, parameter in weights.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        prefix = f"adam/{name}/"
        # Copies: the tensors are mapped from a file that is about to be replaced.
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.clone()
            if _stays(key, optimizer)
            else value.to(parameter, copy=True)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def _stays(key: str, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a tensor of the optimiser is held on the CPU: the count of steps, unless it is fused."""
    return key.endswith("/step") and not optimizer.defaults["fused"]


def draws_name(device: torch.device) -> str:
    """Under which a generator's state is saved: it means something on its own kind of device only."""
    return f"draws/{device.type}"


def saved_draws(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """A generator's saved state; None, with a word, if it is another kind of device's."""
    state = tensors.get(draws_name(device))
    if state is None:
        say(f"The training was begun on another device: what is random goes on differently on {device.type}.")
    return state


def dropout_draws(device: torch.device) -> Tensor:
    """State of torch's own generator of a device, from which dropout is drawn: uint8, on the CPU."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def set_dropout_draws(device: torch.device, state: Tensor) -> None:
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    module.set_rng_state(state)
