"""Check a user's plug-in before training, to find mistakes that raise no exception.

Each plug-in is called with a few rows or tokens. The checks find wrong shapes and types, numbers that are not
finite, rows that depend on each other, layers that read later tokens, random numbers in evaluation, and
weights that torch does not register. After training, the model is compared with its saved copy.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..method.block import Block
from ..method.caches import Cache
from ..method.layer import Layer
from ..method.model import ContextKV
from ..method.oacd import Objective
from ..method.scoring import token_scores
from .hooks import HOOKS, PlugIn, imported

TRIED = 64  # rows or tokens per check
# Number of positions at which a trained model is compared with its saved copy.
COMPARED_POSITIONS = 256
# Absolute tolerance in comparisons. It is larger than the rounding errors of float32.
CLOSE = 1e-4


@torch.no_grad()
def try_plugins(model: ContextKV, plugins: Mapping[str, PlugIn]) -> None:
    """Check each plug-in of the model. Raises a UserError that describes the first mistake."""
    model.eval()
    for hook, plugin in plugins.items():
        imported(HOOKS[hook].trial)(model, plugin)


def try_block(model: ContextKV, plugin: PlugIn) -> None:
    embeddings = model.embed(torch.arange(2, device=model.device))
    # Before the first token of a stream, the context is a zero vector.
    contexts = torch.zeros(2, model.config.context_dim, device=model.device)
    block, name = model.context_block, plugin.name
    _refuse_hidden_weights(name, block)
    _refuse_other_meanings(name, block, Block)

    def step(contexts: Tensor, embeddings: Tensor) -> Tensor:
        next_contexts: Tensor = block(contexts, block.project_inputs(embeddings))
        return next_contexts

    _refuse_wrong(name, step(contexts, embeddings), contexts.shape)
    _refuse_other_calls(name, step, contexts, embeddings)
    _refuse_mixed_rows(name, step, contexts, embeddings)
    buffers = {key: buffer.clone() for key, buffer in block.named_buffers()}
    # Repeat the check in training mode, where a BatchNorm mixes rows and changes its buffers.
    block.train()
    _refuse_mixed_rows(name, step, contexts, embeddings)
    block.eval()
    for key, buffer in block.named_buffers():
        buffer.copy_(buffers[key])


def try_layer(model: ContextKV, plugin: PlugIn) -> None:
    _refuse_hidden_weights(plugin.name, model.layer)
    _refuse_other_meanings(plugin.name, model.layer, Layer)
    if not any(True for _ in model.layer.parameters()):
        raise UserError(f"{plugin.name} has no parameters, so Phase 2 has nothing to train; give it some.")
    (_try_on_tokens if model.layer.reads == "tokens" else _try_on_contexts)(model, plugin.name)


def _try_on_contexts(model: ContextKV, name: str) -> None:
    offsets = model.window.offsets
    if {*map(type, offsets)} != {int} or offsets != sorted({*offsets}) or offsets[0] != 0:
        raise UserError(f"slot_offsets of {name} are {offsets}; allowed: whole numbers, ascending from 0.")
    embeddings = model.embed(torch.arange(2, device=model.device))
    window = torch.zeros(2, len(offsets), model.config.context_dim, device=model.device)
    present = torch.ones(2, len(offsets), dtype=torch.bool, device=model.device)
    # At the start of a stream, only slot 0 is present.
    present[0, 1:] = False
    if not _takes(model.layer.forward, 3):
        hint = 'write reads = "tokens" in the class if it reads rows of tokens. ' * _takes(
            model.layer.forward, 2
        )
        raise UserError(
            f"forward of {name} cannot be called with (embeddings, window, present), which is how a layer "
            f"that reads contexts is called; {hint or 'give it these arguments.'}".strip()
        )
    hidden, weights = model.apply_layer(embeddings, window, present)
    _refuse_wrong(name, hidden, embeddings.shape)
    if weights is not None and (weights.ndim != 3 or weights.shape[::2] != window.shape[:2]):
        raise UserError(f"{name} returned weights of shape {[*weights.shape]}; allowed: [n, heads, slots].")

    def compute(*rows: Tensor) -> Tensor:
        return model.apply_layer(*rows)[0]

    _refuse_other_calls(name, compute, embeddings, window, present)
    _refuse_mixed_rows(name, compute, embeddings, window, torch.ones_like(present))


def _try_on_tokens(model: ContextKV, name: str) -> None:
    rows = model.embed(torch.arange(2 * TRIED, device=model.device).view(2, TRIED))
    start = min(2, model.window.history[False])
    if not _takes(model.layer.forward, 2):
        hint = 'remove reads = "tokens"' if _takes(model.layer.forward, 3) else "give it these arguments"
        raise UserError(
            f"forward of {name} cannot be called with (embeddings, start), which is how a layer that reads "
            f"tokens is called; {hint}."
        )

    def read(rows: Tensor) -> Tensor:
        return model.apply_layer(rows, start)[0]

    hidden = read(rows)
    _refuse_wrong(name, hidden, torch.Size((2, TRIED - start, rows.shape[-1])))
    _refuse_other_calls(name, read, rows)
    other_end = torch.cat([rows[:, :-1], -rows[:, -1:]], dim=1)
    if not torch.allclose(read(other_end)[:, :-1], hidden[:, :-1], atol=CLOSE):
        raise UserError(f"{name} reads ahead: the hidden state of a column may not depend on later columns.")
    _refuse_mixed_rows(name, read, rows)


def try_loss(model: ContextKV, plugin: PlugIn) -> None:
    compute, ids = plugin.objective(model), torch.arange(TRIED + 1, device=model.device)
    if isinstance(compute, nn.Module):
        _refuse_hidden_weights(plugin.name, compute)
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
            f"{plugin.name} returned a number without a gradient, so that it trains nothing; compute it from "
            "the contexts with torch, without detach, item or NumPy."
        )


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def _refuse_hidden_weights(name: str, part: nn.Module) -> None:
    """Raise a UserError if torch would neither train nor save some of the part's modules or tensors."""
    known = {id(value) for value in (*part.modules(), *part.parameters(), *part.buffers())}
    for place, module in part.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            if any(id(component) not in known for component in _components(value)):
                raise UserError(
                    f"{name} keeps modules or tensors in the plain attribute "
                    f"{'.'.join(filter(None, (place, attribute)))}, which are neither trained nor saved; "
                    "keep modules in nn.ModuleList or nn.ModuleDict, weights in nn.Parameter, and "
                    "constants in register_buffer."
                )


def _refuse_other_meanings(name: str, part: nn.Module, base: type[nn.Module]) -> None:
    """Raise a UserError if a weight hides an attribute of `base`, or if `init_weights` cannot be called."""
    registered = {**part._parameters, **part._buffers, **part._modules}
    if taken := sorted(registered.keys() & (vars(base).keys() | base.__annotations__.keys())):
        raise UserError(
            f"{name} has a weight or module named {taken[0]}, which means something else here; rename it."
        )
    if not _takes(part.init_weights, 3):  # type: ignore[arg-type]
        raise UserError(
            f"init_weights of {name} cannot be called with (embeddings, tokens, config), which is how it is "
            "called before training; give it these arguments, or another name."
        )


def _components(value: Any) -> Iterator[Any]:
    """Yield the modules and tensors in an attribute's value, except tensors computed from weights."""
    if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.grad_fn is None):
        yield value
    elif isinstance(value, Mapping):
        yield from (component for item in value.values() for component in _components(item))
    elif isinstance(value, list | tuple | set):
        yield from (component for item in value for component in _components(item))


def _refuse_wrong(name: str, output: Any, shape: torch.Size) -> None:
    if not isinstance(output, Tensor) or output.shape != shape or output.dtype != torch.float32:
        raise UserError(f"{name} returned {_in_words(output)}; it must return float32 of shape {[*shape]}.")
    if not output.isfinite().all():
        raise UserError(
            f"{name} returned NaN or infinity; the first contexts of a stream are zeros, and at its start "
            "only slot 0 is present."
        )


def _refuse_other_calls(name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Raise a UserError if, in evaluation mode, a second call with the same inputs gives another result."""
    if not torch.allclose(compute(*inputs), compute(*inputs), atol=CLOSE):
        raise UserError(
            f"{name} returned something else in evaluation when it was called again with the same values; "
            "draw random numbers only if self.training, and keep nothing from call to call."
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
def refuse_unsaved(model: ContextKV, loaded: ContextKV, cache: Cache) -> None:
    """Raise a UserError if a trained model differs from `loaded`, its saved copy.

    `loaded` was built with a different seed, so a weight that was not saved has a different value. Both
    models are compared at the first positions of `cache`.
    """
    positions = torch.arange(min(COMPARED_POSITIONS, len(cache)))

    def outputs(model: ContextKV) -> list[Tensor]:
        model.eval()
        losses = token_scores(model, cache, positions)[0]
        if model.layer.reads == "tokens":
            return [losses]
        embeddings = model.embed(torch.arange(TRIED, device=model.device))
        contexts = torch.zeros(TRIED, model.config.context_dim, device=model.device)
        return [losses, model.context_block(contexts, model.context_block.project_inputs(embeddings))]

    for trained_output, loaded_output in zip(outputs(model), outputs(loaded), strict=True):
        if not torch.allclose(trained_output, loaded_output, rtol=1e-2, atol=1e-2):
            raise UserError(
                "The model computes something different from its saved copy; keep all numbers that a "
                "plug-in uses in parameters or registered buffers."
            )
