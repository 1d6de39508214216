"""The model of an experiment, with its plug-ins and its token table."""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..data.counts import unigram_floor
from ..data.embeddings import TokenTable, corpus_counts, load_table
from ..errors import UserError, is_out_of_memory, values_of_user
from ..method.caches import StreamCache
from ..method.config import GPT2_VOCAB_SIZE
from ..method.copying import Copying
from ..method.evaluation import token_scores
from ..method.model import ContextKV, Parts, project_inputs
from ..method.windows import Window
from .config import ExperimentConfig
from .plugins import PlugIn, built
from .rows import MixerModel

ROW = 64  # tokens on which a mixer is tried
READ_AGAIN = 256  # positions on which a model is compared with what was saved of it


def load_frozen(config: ExperimentConfig) -> tuple[TokenTable, TokenTable | None]:
    """Read or make the token table, and the token counts if the model adds their log-frequencies."""
    table = load_table(config.data, config.model.hidden_size, config.runtime.seed)
    return table, corpus_counts(config.data) if config.data.unigram == "corpus" else None


@torch.random.fork_rng(devices=[])
def untrained_model(config: ExperimentConfig, vocab_size: int, has_unigram: bool) -> ContextKV:
    """Build the model of an experiment; its weights depend on seed and shapes only.

    Raises:
        UserError: a plug-in is missing, or does not accept these shapes.
    """
    torch.manual_seed(config.runtime.seed)
    hooks = ("block", "attention", "mixer")
    parts = {hook: built(plugin) for hook, plugin in config.plugins.items() if hook in hooks}
    try:
        if "mixer" in parts:
            return MixerModel(config.model, parts["mixer"], vocab_size, has_unigram)
        return ContextKV(config.model, vocab_size, has_unigram, Parts(**parts))
    except Exception as error:  # whatever code of the user raises
        if not parts or is_out_of_memory(error):
            raise
        names = ", ".join(plugin.name for plugin in config.plugins.values())
        raise UserError(f"The model cannot be built with {names}: {str(error).rstrip('.')}.") from error


def frozen_model(config: ExperimentConfig, table: TokenTable, counts: TokenTable | None) -> ContextKV:
    """Make the model with its token table and log-frequencies."""
    model = untrained_model(config, len(table.weight), counts is not None)
    unigram = None if counts is None else torch.from_numpy(unigram_floor(counts.weight.numpy()))
    model.load_table(table.weight, unigram)
    return model


@torch.no_grad()
def check_parts(model: ContextKV, config: ExperimentConfig, precision: str) -> None:
    """Try every plug-in on a few positions, in training and after it; leave the model as after it.

    Raises:
        UserError: one fails, forwards or backwards, returns another shape or type than it should, numbers
            that are not finite, or a loss without a gradient; it changes its inputs; a mixer reads ahead;
            rows are mixed; slots lie ahead; Phase 2 has nothing to train, or a buffer changes.
    """
    count, shapes, window = 2, config.model, len(model.window)
    in_bf16 = precision == "bf16" and model.device.type == "cuda"  # as `phase2.batch_gradients`
    rows = model.embed(torch.arange(2 * ROW, device=model.device).view(2, ROW))
    embeddings = rows[0, :count].clone()
    contexts = torch.zeros(count, shapes.context_dim, device=model.device)
    slots = contexts.new_zeros(count, window, shapes.context_dim)
    present = contexts.new_ones(count, window, dtype=torch.bool)
    present[0, 1:] = False  # as at the start of a stream
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    offsets = model.window.offsets
    if {*map(type, offsets)} != {int} or offsets != sorted({*offsets}) or offsets[0] != 0:
        raise UserError(f"slot_offsets are {offsets}; allowed: whole numbers, ascending from 0.")
    bias = model.current_token_bias
    if not isinstance(bias, Real) or not math.isfinite(bias):
        raise UserError(f"current_token_bias is {bias!r}; allowed: a finite number, which is not trained.")
    if (copying := model.copying) is not None:
        if not isinstance(copying, Copying):
            raise UserError(
                f"copying is {copying!r}; allowed: a Copying of ctxkv_lib.method.copying, or None."
            )
        if not (0 <= copying.weight < 1 and copying.sharpness >= 0):
            raise UserError(f"{copying}; allowed: a weight from 0 to less than 1, a sharpness of 0 or more.")
    start = min(2, model.history(trained=False)) if isinstance(model, MixerModel) else 0
    mixed = (2, ROW - start, shapes.hidden_size)

    def read() -> Tensor:
        return slots.bfloat16() if torch.is_autocast_enabled("cuda") else slots

    tried: dict[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {
        "mixer": lambda: (_without_reading_ahead(model.attention, rows, start), mixed),
        "block": lambda: (_from_zeros(model, contexts, embeddings), (count, shapes.context_dim)),
        "loss": lambda: (_loss_of(config.plugins["loss"], torch.randn_like(contexts)), ()),
        "attention": lambda: (_attended(model, embeddings, read(), present), (count, shapes.hidden_size)),
    }
    by_row: dict[str, tuple[Any, ...]] = {
        "mixer": (lambda rows: model.attention(rows, start), rows),
        "block": (lambda *given: _from_zeros(model, *given), contexts, embeddings),
        "attention": (lambda *given: model.attend(*given, torch.ones_like(present))[0], embeddings, slots),
    }
    hooks = [hook for hook in tried if hook in config.plugins]
    for hook, in_training in itertools.product(hooks, (True, False)):
        model.train(in_training)
        model.set_phase(1 if hook == "block" else 2)
        name = config.plugins[hook].name
        versions = [given._version for given in (contexts, embeddings, slots, rows)]
        half = in_bf16 and in_training and hook in ("attention", "mixer")
        with _failures_told(name, count), torch.set_grad_enabled(in_training):
            with torch.autocast("cuda", torch.bfloat16, half, cache_enabled=False):
                found, expected = tried[hook]()
            found = found.float() if half and isinstance(found, Tensor) else found
            if in_training:
                _go_backward(model, hook, found, config)
        if versions != [given._version for given in (contexts, embeddings, slots, rows)]:
            raise UserError(f"{name} changes what it is given in place; compute a new tensor instead.")
        kind = getattr(found, "dtype", None) if hook == "loss" else torch.float32  # a loss may be of any
        returned, right = _words(found), _words(torch.empty(expected, dtype=kind))
        if returned != right:
            of_type = "" if getattr(found, "dtype", kind) == kind else " of type float32"
            raise UserError(f"{name} returned {returned}; it must return {right}{of_type}.")
        if not found.isfinite().all():
            first = "the first contexts of a stream are zeros, and at its start only slot 0 is present"
            raise UserError(f"{name} returned NaN or infinity; {first}.")
        if hook in by_row and not in_training:
            with _failures_told(name, count):
                _refuse_mixed_rows(name, *by_row[hook])
    model.set_phase(2)
    if not model.trained_weights():
        raise UserError("Phase 2 has no weights to train; give attention or mixer a parameter.")
    kept = model.state_dict()
    for name, buffer in before.items():
        now = kept.get(name, buffer)
        if now.shape != buffer.shape or not torch.allclose(now, buffer, rtol=0, atol=0, equal_nan=True):
            raise UserError(
                f"Training changes the buffer {name}, which is not kept with the weights; use parameters, or "
                "a layer without running statistics, such as LayerNorm."
            )
    model.eval()


@contextmanager
def _failures_told(name: str, count: int) -> Iterator[None]:
    """Turn what a plug-in raises on `count` positions, but for memory that ends, into a UserError."""
    try:
        yield
    except Exception as error:  # whatever code of the user raises
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"{name} fails on {count} positions: {type(error).__name__}: {error}; help(ctxkv_lib.run) says "
            "where what it is given and returns is described."
        ) from error


def _go_backward(model: ContextKV, hook: str, found: Any, config: ExperimentConfig) -> None:
    """Compute the gradients of what a plug-in returned with respect to its parameters, if it is trained."""
    is_trained = hook in ("attention", "mixer") or (hook == "block" and config.phase1.max_iterations)
    weights = [*model.trained_weights().values()] if is_trained else []
    if weights and isinstance(found, Tensor) and found.is_floating_point() and found.isfinite().all():
        torch.autograd.grad(found.sum(), weights, allow_unused=True)


def _from_zeros(model: ContextKV, contexts: Tensor, embeddings: Tensor) -> Any:
    """Return the block's first contexts, after a check of what its init would be given."""
    block: Any = model.context_block
    _check_init(block)
    return block(contexts, project_inputs(block, embeddings))


def _check_init(part: Any) -> None:
    """Refuse a block or mixer, a UserError, whose `init_weights` does not take what it is given."""
    try:
        if init := getattr(part, "init_weights", None):
            inspect.signature(init).bind("embeddings", "tokens", "config")
    except TypeError:
        name = type(part).__name__
        raise UserError(
            f"{name}.init_weights must take (embeddings, tokens, config); change it, or rename it."
        ) from None


def _attended(model: ContextKV, embeddings: Tensor, slots: Tensor, present: Tensor) -> Any:
    """Return the hidden states, after a check of the init from a block."""
    if hasattr(model.attention, "init_from_block"):
        attention: Any = copy.deepcopy(model.attention)
        with values_of_user(), torch.autocast("cuda", enabled=False):  # as before Phase 2
            attention.init_from_block(model.context_block)
    hidden, weights = model.attend(embeddings, slots, present)
    if weights is not None and (weights.dim() != 3 or weights.shape[::2] != present.shape):
        right = f"[{len(present)}, heads, {present.shape[1]}]"
        raise UserError(f"The weights of attention are {_words(weights)}; allowed: {right}, or none.")
    return hidden


def _refuse_mixed_rows(name: str, compute: Callable[..., Tensor], *given: Tensor) -> None:
    """Refuse a plug-in, a UserError, if a row it returns depends on the other, or on earlier calls."""
    given = tuple(torch.stack([first, 1 - second]) for first, second in given)
    found = []
    for rows in ([0, 1], [0, 0], [1, 1]):
        torch.manual_seed(0)  # where it draws
        found.append(compute(*(each[rows] for each in given)))
    both, first, second = found
    if not torch.allclose(both, torch.stack([first[0], second[1]]), atol=1e-4):
        raise UserError(
            f"What {name} returns in a row depends on other rows of what it is given, or on earlier calls; "
            "compute each row from that row alone, as with batch_first=True."
        )


def _without_reading_ahead(mixer: nn.Module, rows: Tensor, start: int) -> Any:
    """Check a mixer's init; return what it makes of rows `[r, length, hidden_size]` from `start` on."""
    _check_init(mixer)
    torch.manual_seed(0)
    found = mixer(rows, start)
    is_exact = not torch.is_autocast_enabled("cuda")  # bf16 rounds more than is allowed below
    if is_exact and isinstance(found, Tensor) and found.shape[1:2] == (rows.shape[1] - start,):
        torch.manual_seed(0)
        changed = torch.cat([rows[:, :-1], -rows[:, -1:]], dim=1)
        if not torch.allclose(mixer(changed, start)[:, :-1], found[:, :-1], atol=1e-4):
            raise UserError(
                "The mixer reads ahead: the hidden state of a column may not depend on later ones."
            )
    return found


def _loss_of(plugin: PlugIn, contexts: Tensor) -> Any:
    with torch.enable_grad():
        found = built(plugin)(contexts.requires_grad_())
    if isinstance(found, Tensor) and not found.shape:
        if not found.requires_grad:
            raise UserError(
                f"{plugin.name} returned a scalar without a gradient; compute it from the contexts by torch "
                "operations."
            )
        torch.autograd.grad(found, contexts)
    return found


def _words(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    kind = "" if found.dtype == torch.float32 else f"{found.dtype} ".removeprefix("torch.")
    return f"a {kind}tensor of shape {[*found.shape]}" if found.shape else f"a scalar {kind}tensor"


def check_saved(model: ContextKV, again: ContextKV, cache: StreamCache) -> None:
    """Compare a model with `again`, which has its parameters and buffers only, on a few positions of `cache`.

    Raises:
        UserError: they differ, so that a plug-in computes with something that is not saved.
    """
    positions = torch.arange(min(READ_AGAIN, len(cache)))
    embeddings = model.embed(torch.arange(ROW, device=model.device))
    contexts = torch.zeros(ROW, model.config.context_dim, device=model.device)

    def computed(each: ContextKV) -> list[Tensor]:
        torch.manual_seed(0)  # where it draws
        losses = token_scores(each, cache, positions)[0]
        return [losses] if isinstance(each, MixerModel) else [losses, _from_zeros(each, contexts, embeddings)]

    with torch.no_grad():
        for now, loaded in zip(computed(model.eval()), computed(again.eval()), strict=True):
            alike = torch.allclose(now, loaded, rtol=1e-2, atol=1e-2)
            if not alike or model.copying != again.copying:
                raise UserError(
                    "The model computes something else than what is saved of it; keep all that a plug-in "
                    "computes with in parameters or registered buffers."
                )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count all parameters, and those that Phase 2 trains, of a model that is set to it."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {"total": sum(weight.numel() for weight in model.parameters()), "trainable_phase2": trained}


def shapes(config: ExperimentConfig) -> tuple[dict[str, int], Window, bool]:
    """Return parameter counts, window, and whether it copies, of a model that is not allocated."""
    with torch.device("meta"):
        model = untrained_model(config, GPT2_VOCAB_SIZE, config.data.unigram == "corpus")
    return parameter_counts(model), model.window, model.copying is not None
