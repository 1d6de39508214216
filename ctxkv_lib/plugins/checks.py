"""What would be silently wrong with a user's plug-in, found on a few positions before anything is trained.

Shape, type, numbers that are not finite, rows that depend on each other, and reading ahead; and, after
training, a model that computes with something that is not saved. All else fails by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..method.caches import TokenCache
from ..method.model import ContextKV, project_inputs
from ..method.scoring import token_scores
from .hooks import PlugIn

TRIED = 64  # rows or tokens that a part is tried on
COMPARED_POSITIONS = 256  # at which a model is compared with what was saved of it
CLOSE = 1e-4  # float32's rounding, with a margin


@torch.no_grad()
def try_plugins(model: ContextKV, plugins: Mapping[str, PlugIn]) -> None:
    """Try plug-ins, by hook; a UserError names what is wrong."""
    trials = {"block": _try_block, "loss": _try_loss, "attention": _try_attention, "mixer": _try_mixer}
    model.eval()
    for hook, plugin in plugins.items():
        trials[hook](model, plugin)


def _try_block(model: ContextKV, plugin: PlugIn) -> None:
    embeddings = model.embed(torch.arange(2, device=model.device))
    contexts = torch.zeros(2, model.config.context_dim, device=model.device)  # as a stream begins
    block, name = model.context_block, plugin.name

    def step(contexts: Tensor, embeddings: Tensor) -> Tensor:
        return block(contexts, project_inputs(block, embeddings))

    _refuse_wrong(name, step(contexts, embeddings), contexts.shape)
    _refuse_mixed_rows(name, step, contexts, embeddings)
    buffers = {key: buffer.clone() for key, buffer in block.named_buffers()}
    block.train()  # where a BatchNorm, say, mixes rows, and changes its buffers
    _refuse_mixed_rows(name, step, contexts, embeddings)
    block.eval()
    for key, buffer in block.named_buffers():
        buffer.copy_(buffers[key])


def _try_attention(model: ContextKV, plugin: PlugIn) -> None:
    offsets, name = model.window.offsets, plugin.name
    if {*map(type, offsets)} != {int} or offsets != sorted({*offsets}) or offsets[0] != 0:
        raise UserError(f"slot_offsets of {name} are {offsets}; allowed: whole numbers, ascending from 0.")
    embeddings = model.embed(torch.arange(2, device=model.device))
    window = torch.zeros(2, len(offsets), model.config.context_dim, device=model.device)
    present = torch.ones(2, len(offsets), dtype=torch.bool, device=model.device)
    present[0, 1:] = False  # as at the start of a stream
    hidden, weights = model.attend(embeddings, window, present)
    _refuse_wrong(name, hidden, embeddings.shape)
    if weights is not None and (weights.ndim != 3 or weights.shape[::2] != window.shape[:2]):
        raise UserError(f"{name} returned weights of shape {[*weights.shape]}; allowed: [n, heads, slots].")
    inputs = embeddings, window, torch.ones_like(present)
    _refuse_mixed_rows(name, lambda *rows: model.attend(*rows)[0], *inputs)


def _try_mixer(model: Any, plugin: PlugIn) -> None:
    rows, name = model.embed(torch.arange(2 * TRIED, device=model.device).view(2, TRIED)), plugin.name
    start = min(2, model.history(training=False))

    def read(rows: Tensor) -> Tensor:
        return model.attention(rows, start)

    hidden = read(rows)
    _refuse_wrong(name, hidden, torch.Size((2, TRIED - start, rows.shape[-1])))
    other_end = torch.cat([rows[:, :-1], -rows[:, -1:]], dim=1)
    if not torch.allclose(read(other_end)[:, :-1], hidden[:, :-1], atol=CLOSE):
        raise UserError(f"{name} reads ahead: the hidden state of a column may not depend on later ones.")
    _refuse_mixed_rows(name, read, rows)


def _try_loss(model: ContextKV, plugin: PlugIn) -> None:
    contexts = torch.randn(TRIED, model.config.context_dim, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():  # of no leaf, as a loss may work in place
        value = plugin.build()(contexts.requires_grad_().to(model.device, copy=True))
    if not isinstance(value, Tensor) or value.shape != () or not value.isfinite():
        raise UserError(f"{plugin.name} returned {_in_words(value)}; a loss must return a finite scalar.")
    if not value.requires_grad:
        raise UserError(
            f"{plugin.name} returned a number without a gradient, so that it trains nothing; compute it from "
            "the contexts with torch, without detach, item or NumPy."
        )


def _refuse_wrong(name: str, output: Any, shape: torch.Size) -> None:
    if not isinstance(output, Tensor) or output.shape != shape or output.dtype != torch.float32:
        raise UserError(f"{name} returned {_in_words(output)}; it must return float32 of shape {[*shape]}.")
    if not output.isfinite().all():
        raise UserError(
            f"{name} returned NaN or infinity; the first contexts of a stream are zeros, and at its start "
            "only slot 0 is present."
        )


def _refuse_mixed_rows(name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Refuse a plug-in if a row it returns depends on the other row, or on earlier calls.

    `inputs` have two rows. The second of numbers, x, is replaced by 1 - x, so that the two differ.
    """
    inputs = tuple(x if x.dtype == torch.bool else torch.stack([x[0], 1 - x[1]]) for x in inputs)
    outputs = []
    for rows in ([0, 1], [0, 0], [1, 1]):
        torch.manual_seed(0)  # where it draws
        outputs.append(compute(*(x[rows] for x in inputs)))
    both, first, second = outputs
    if not torch.allclose(both, torch.stack([first[0], second[1]]), atol=CLOSE):
        raise UserError(
            f"What {name} returns in a row depends on other rows of what it is given, or on earlier calls; "
            "compute each row from that row alone, as with batch_first=True."
        )


def _in_words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} of shape {[*value.shape]}" if value.shape else f"the {dtype} {value.item():g}"


@torch.no_grad()
def refuse_unsaved(model: ContextKV, loaded: ContextKV, cache: TokenCache) -> None:
    """Raise a UserError if a trained model differs from `loaded`, which has what is saved of it.

    They are compared at the first positions of `cache`; a plug-in may compute with what is not saved.
    """
    positions = torch.arange(min(COMPARED_POSITIONS, len(cache)))

    def outputs(model: ContextKV) -> list[Tensor]:
        model.eval()
        torch.manual_seed(0)  # where it draws
        losses = token_scores(model, cache, positions)[0]
        if not model.has_contexts:
            return [losses]
        embeddings = model.embed(torch.arange(TRIED, device=model.device))
        contexts = torch.zeros(TRIED, model.config.context_dim, device=model.device)
        return [losses, model.context_block(contexts, project_inputs(model.context_block, embeddings))]

    for trained_output, loaded_output in zip(outputs(model), outputs(loaded), strict=True):
        if not torch.allclose(trained_output, loaded_output, rtol=1e-2, atol=1e-2):
            raise UserError(
                "The model computes something else than what is saved of it; keep all that a plug-in "
                "computes with in parameters or registered buffers."
            )
