"""The hooks that the training loops of both phases call, and the saved state of an unfinished Phase 2.

The state of Phase 2 is saved in `checkpoint/phase2.pt` at the end of an epoch, at most once per minute
(`RunHooks.after_round`). After a kill, Ctrl-C or an error, the next run continues from the last saved epoch
(`RunHooks.restore`). It reaches the same numbers, since the shuffling and the dropout of each epoch depend
only on the seed and the epoch (`phase2.train_epoch`). If the settings, code or data have changed, the state
is ignored. If the state is damaged, a message is printed and training starts over. `driver.run_stages`
deletes the file when the stage is recorded.
"""

import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from xxhash import xxh3_128

from .. import ranks
from ..files import digest, replacing
from ..method.loop import Loop, Metric, epochs_of
from ..progress import estimated, log, progress_bar
from .driver import Work

# Minimum time between two saves. If the process is killed, at most this much work plus one epoch is lost.
EVERY_SECONDS = 60
T = TypeVar("T")


class RunHooks(Loop):
    """The hooks of a training loop in a run. They record metrics, and save and restore the training state.

    Args:
        work: receives every metric; the metrics of restored epochs have `"replayed": True`. `work.state` is
            the file of the saved state. Phase 1 does not save a state, since it takes only seconds.

    Attributes:
        tell: a function that is called once, after a few seconds of training, with the expected seconds for
            all steps of an epoch.
    """

    tell: Callable[[float], None] | None = None

    def __init__(self, work: Work) -> None:
        self.work, self.saved_at = work, time.monotonic()

    @torch.no_grad()
    def restore(self, state: Any) -> None:
        saved = self.work.state and self.work.state.is_file() and read_state(self.work.state)
        if not saved or saved["made_from"] != digest(self.work.made_from):
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
            self.work.record({**metric, "replayed": True})

    def track(self, items: Iterable[T], description: str, total: int, done: int = 0) -> Iterable[T]:
        bar = progress_bar(items, description, total=total, initial=done)
        tell, self.tell = self.tell, None
        return estimated(bar, total, tell) if tell else bar

    def after_round(self, state: Any, metric: Metric) -> None:
        if self.work.state and not ranks.rank() and time.monotonic() >= self.saved_at + EVERY_SECONDS:
            values = {
                "made_from": digest(self.work.made_from),
                "metrics": [*self.work.metrics, metric],
                "weights": {name: weight.detach() for name, weight in state.weights.items()},
                "averages": state.stepper.averages,
                "best": state.best,
                "optimizer": state.stepper.optimizer.state_dict(),
            }
            write_state(self.work.state, values)
            self.saved_at = time.monotonic()
        self.work.record(metric)

    def after_steps(self, metric: Metric) -> None:
        self.work.record(metric)

    shard = staticmethod(ranks.shard)
    all_reduce = staticmethod(ranks.all_reduce)


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
