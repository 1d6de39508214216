"""Check a user's plug-ins before training, to find mistakes that raise no exception.

Each plug-in is called with a few rows or tokens. The checks find wrong shapes and types, numbers that are not
finite, rows that depend on each other, layers that read later tokens, and losses whose gradient does not
reach the contexts. After training, the model is compared with its saved copy.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..method.block import project_inputs
from ..method.model import ContextKV
from ..method.oacd import Objective
from ..method.scoring import token_scores
from ..method.streams import Stream
from .plugins import PlugIn

TRIED = 64  # rows or tokens per check
# Number of positions at which a trained model is compared with its saved copy.
COMPARED_POSITIONS = 256
# Absolute tolerance in comparisons. It is larger than the rounding errors of float32.
CLOSE = 1e-4


@torch.no_grad()
def try_plugins(model: ContextKV, plugins: Mapping[str, PlugIn]) -> None:
    """Check each plug-in of the model. Raises a UserError that describes the first mistake."""
    model.eval()
    for kind, plugin in plugins.items():
        TRIALS[kind](model, plugin)
        _refuse_changed(plugin)


def _refuse_changed(plugin: PlugIn) -> None:
    try:
        plugin.require_same_code()
    except UserError:
        raise UserError(
            f"{plugin.name} changes itself, or values that it uses, when it is called; keep numbers that "
            "change in registered buffers."
        ) from None


def try_block(model: ContextKV, plugin: PlugIn) -> None:
    embeddings = model.embed(torch.arange(2, device=model.device))
    # Before the first token of a stream, the context is a zero vector.
    contexts = torch.zeros(2, model.config.context_dim, device=model.device)
    block, name = model.context_block, plugin.name

    def step(contexts: Tensor, embeddings: Tensor) -> Tensor:
        next_contexts: Tensor = block(contexts, project_inputs(block, embeddings))
        return next_contexts

    _refuse_wrong(name, step(contexts, embeddings), contexts.shape)
    _refuse_mixed_rows(name, step, contexts, embeddings)
    with _in_training(block):  # where a BatchNorm mixes rows
        _refuse_mixed_rows(name, step, contexts, embeddings)


@contextmanager
def _in_training(part: nn.Module) -> Iterator[None]:
    """Set training mode while the block runs, and restore the part's buffers afterwards."""
    buffers = {key: buffer.clone() for key, buffer in part.named_buffers()}
    part.train()
    yield
    part.eval()
    for key, buffer in part.named_buffers():
        buffer.copy_(buffers[key])


def try_layer(model: ContextKV, plugin: PlugIn) -> None:
    if not any(True for _ in model.layer.parameters()):
        raise UserError(f"{plugin.name} has no parameters, so Phase 2 has nothing to train; give it some.")
    (_try_on_tokens if not model.has_contexts else _try_on_contexts)(model, plugin.name)


def _try_on_contexts(model: ContextKV, name: str) -> None:
    offsets = model.window.offsets
    if {*map(type, offsets)} != {int} or offsets != sorted({*offsets}) or offsets[0] != 0:
        raise UserError(f"slot_offsets of {name} are {offsets}; allowed: whole numbers, ascending from 0.")
    embeddings = model.embed(torch.arange(2, device=model.device))
    window = torch.zeros(2, len(offsets), model.config.context_dim, device=model.device)
    present = torch.ones(2, len(offsets), dtype=torch.bool, device=model.device)
    # At the start of a stream, only slot 0 is present.
    present[0, 1:] = False
    hidden, weights = model.apply_layer(embeddings, window, present)
    _refuse_wrong(name, hidden, embeddings.shape)
    if weights is not None and (weights.ndim != 3 or weights.shape[::2] != window.shape[:2]):
        raise UserError(f"{name} returned weights of shape {[*weights.shape]}; allowed: [n, heads, slots].")

    def compute(*rows: Tensor) -> Tensor:
        return model.apply_layer(*rows)[0]

    _refuse_mixed_rows(name, compute, embeddings, window, torch.ones_like(present))
    with _in_training(model.layer):
        compute(embeddings, window, present)


def _try_on_tokens(model: ContextKV, name: str) -> None:
    rows = model.embed(torch.arange(2 * TRIED, device=model.device).view(2, TRIED))
    start = min(2, model.window.evaluation_history)

    def read(rows: Tensor) -> Tensor:
        return model.apply_layer(rows, start)[0]

    hidden = read(rows)
    _refuse_wrong(name, hidden, torch.Size((2, TRIED - start, rows.shape[-1])))
    # The last column before the change would notice a layer that looks any number of columns ahead.
    half = TRIED // 2
    other_end = torch.cat([rows[:, :half], 1 - rows[:, half:]], dim=1)
    if not torch.allclose(read(other_end)[:, : half - start], hidden[:, : half - start], atol=CLOSE):
        raise UserError(f"{name} reads ahead: the hidden state of a column may not depend on later columns.")
    _refuse_mixed_rows(name, read, rows)
    with _in_training(model.layer):
        read(rows)


def try_loss(model: ContextKV, plugin: PlugIn) -> None:
    compute, ids = plugin.make_loss(model), torch.arange(TRIED + 1, device=model.device)
    embeddings, draw = model.embed(ids), torch.Generator().manual_seed(0)
    objective = Objective(compute, (embeddings, ids[:-1]), (embeddings, ids[1:]))
    contexts, previous = torch.randn(2, TRIED, model.config.context_dim, generator=draw).to(model.device)
    contexts.requires_grad_()
    with torch.enable_grad():
        # A loss may change its contexts in place. Torch allows this for a clone but not for a leaf.
        value = objective.loss(contexts.clone(), previous, slice(TRIED))
    if not isinstance(value, Tensor) or value.shape != () or not value.isfinite():
        raise UserError(f"{plugin.name} returned {_in_words(value)}; a loss must return a finite scalar.")
    if not value.requires_grad or torch.autograd.grad(value, contexts, allow_unused=True)[0] is None:
        raise UserError(
            f"{plugin.name} returned a number without a gradient, so nothing would be trained; compute it "
            "from the contexts with torch, without detach, item or NumPy."
        )


TRIALS: dict[str, Callable[[ContextKV, PlugIn], None]] = {
    "block": try_block,
    "loss": try_loss,
    "layer": try_layer,
}


def _refuse_wrong(name: str, output: Any, shape: torch.Size) -> None:
    if not isinstance(output, Tensor) or output.shape != shape or output.dtype != torch.float32:
        raise UserError(f"{name} returned {_in_words(output)}; it must return float32 of shape {[*shape]}.")
    if not output.isfinite().all():
        raise UserError(
            f"{name} returned NaN or infinity; the first contexts of a stream are zeros, and at its start "
            "only slot 0 is present."
        )


def _refuse_mixed_rows(name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Raise a UserError if a row of the result depends on other rows of the inputs or on earlier calls.

    Each tensor in `inputs` has two rows. In the second row, each number x is replaced by 1 - x, so that the
    rows differ.
    """
    inputs = tuple(x if x.dtype == torch.bool else torch.stack([x[0], 1 - x[1]]) for x in inputs)
    outputs = []
    for rows in ([0, 1], [0, 0], [1, 1]):
        # Each call uses the same seed, since a block may draw random numbers in training mode.
        torch.manual_seed(0)
        outputs.append(compute(*(x[rows] for x in inputs)))
    both, first, second = outputs
    if not torch.allclose(both, torch.stack([first[0], second[1]]), atol=CLOSE):
        raise UserError(
            f"What {name} returns in a row depends on other rows of its arguments, or on earlier calls; "
            "compute each row from that row alone, as with batch_first=True."
        )


def _in_words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} of shape {[*value.shape]}" if value.shape else f"the {dtype} {value.item():g}"


@torch.no_grad()
def refuse_unsaved(model: ContextKV, loaded: ContextKV, stream: Stream) -> None:
    """Raise a UserError if a trained model differs from `loaded`, its saved copy.

    `loaded` was built with a different seed, so a weight that was not saved has a different value. Both
    models are compared at the first positions of `stream`.
    """
    positions = torch.arange(min(COMPARED_POSITIONS, len(stream)))

    def outputs(model: ContextKV) -> list[Tensor]:
        model.eval()
        losses, block = token_scores(model, stream, positions)[0], model.context_block
        if block is None:
            return [losses]
        embeddings = model.embed(torch.arange(TRIED, device=model.device))
        contexts = torch.zeros(TRIED, model.config.context_dim, device=model.device)
        return [losses, block(contexts, project_inputs(block, embeddings))]

    for trained_output, loaded_output in zip(outputs(model), outputs(loaded), strict=True):
        if not torch.allclose(trained_output, loaded_output, rtol=1e-2, atol=1e-2):
            raise UserError(
                "The model computes something different from its saved copy; keep all numbers that a "
                "plug-in uses in parameters or registered buffers."
            )
