"""A Phase 2 step as a CUDA graph: the GPU is given all kernels of a step at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ranks
from ..errors import UserError, is_out_of_memory
from ..method.caches import Batch
from .config import ExperimentConfig

EAGER_STEPS = 3  # before the capture: libraries set up their workspaces, the optimiser its state


def use_cuda_graph(config: ExperimentConfig, device: torch.device) -> bool:
    """Return whether Phase 2 takes its steps as a graph.

    Raises:
        UserError: it is asked for where it cannot be.
    """
    if config.runtime.cuda_graph == "off":
        return False
    cause = {
        f"the device is {device.type}": device.type != "cuda",
        "several processes train together": ranks.world_size() > 1,
        "a mixer's batches differ in shape": "mixer" in config.plugins,
    }
    for reason, holds in cause.items():
        if holds:
            raise UserError(f"runtime.cuda_graph is 'on', but {reason}; allowed here: off.")
    return True


class CapturedStep:
    """A step of training on batches of one size: the first ones as usual, then a replayed graph each.

    Args:
        step: takes a step with a batch, of which it gets the size, and returns its loss; what it changes
            keeps its place in memory.
        size: of these batches; smaller ones are computed as usual.
        device: of type cuda.

    Reference: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, step: Callable[[Batch, int], Tensor], size: int, device: torch.device) -> None:
        self.step, self.size, self.stream = step, size, torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = EAGER_STEPS

    def __call__(self, batch: Batch, count: int) -> Tensor:
        """Take a step; returns its loss, which the next step overwrites."""
        if count < self.size:
            return self.step(batch, count)
        if self.eager:
            self.eager -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # as usual, but where the graph is captured later
                loss = self.step(batch, self.size)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.graph = self._capture(batch)
        for name, static in self.batch.tensors().items():
            static.copy_(getattr(batch, name))
        self.graph.replay()
        return self.loss

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """Record a step on a copy of the batch, which later batches overwrite; nothing is computed.

        Meanwhile the thread that reads batches ahead may allocate, hence `thread_local`.
        """
        self.batch, graph = batch.each(torch.clone), torch.cuda.CUDAGraph()
        capturing = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), capturing:  # which does not leave its stream if it fails
                self.loss = self.step(self.batch, self.size)
        except RuntimeError as error:
            cause = error.__context__ or error  # an error in a capture makes its end another one
            if is_out_of_memory(cause):
                raise cause from None
            first_line, *_ = str(cause).split("\n")
            raise UserError(
                f"A step of Phase 2 cannot be captured: {first_line}; set "
                "runtime.cuda_graph=off, or compute without waiting for the GPU (`.item()`, a bool as index)."
            ) from error
        return graph
