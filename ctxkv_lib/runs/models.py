"""The model of an experiment, with its plug-ins and its token table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.counts import unigram_floor
from ..data.embeddings import TokenTable, corpus_counts, load_table
from ..errors import UserError, is_out_of_memory
from ..method.config import GPT2_VOCAB_SIZE
from ..method.model import ContextKV, Parts, project_inputs
from ..method.windows import Window
from .config import ExperimentConfig
from .plugins import PlugIn, built
from .rows import MixerModel


def load_frozen(config: ExperimentConfig) -> tuple[TokenTable, TokenTable | None]:
    """Read or make the token table, and the token counts if the model adds their log-frequencies."""
    table = load_table(config.data, config.model.hidden_size, config.runtime.seed)
    counted = config.data.unigram == "corpus"
    return table, corpus_counts(config.data) if counted else None


def untrained_model(config: ExperimentConfig, vocab_size: int, has_unigram: bool) -> ContextKV:
    """Build the model of an experiment; its weights depend on seed and shapes only.

    Raises:
        UserError: a plug-in is missing, or does not accept these shapes.
    """
    torch.manual_seed(config.runtime.seed)
    parts = {
        hook: built(plugin)
        for hook, plugin in config.plugins.items()
        if hook in ("block", "attention", "mixer")
    }
    try:
        if "mixer" in parts:
            return MixerModel(config.model, parts["mixer"], vocab_size, has_unigram)
        return ContextKV(config.model, vocab_size, has_unigram, Parts(**parts))
    except (TypeError, ValueError) as error:
        if not parts:
            raise
        names = ", ".join(plugin.name for plugin in config.plugins.values())
        raise UserError(f"The model cannot be built with {names}: {error}.") from error


def frozen_model(config: ExperimentConfig, table: TokenTable, counts: TokenTable | None) -> ContextKV:
    """Make the model with its token table and log-frequencies."""
    model = untrained_model(config, len(table.weight), counts is not None)
    unigram = None if counts is None else torch.from_numpy(unigram_floor(counts.weight.numpy()))
    model.load_table(table.weight, unigram)
    return model


@torch.no_grad()
def check_parts(model: ContextKV, config: ExperimentConfig) -> None:
    """Try every plug-in on two positions.

    Raises:
        UserError: one fails, or returns another shape than it should, or a loss without a gradient.
    """
    count, shapes, window = 2, config.model, len(model.window)
    embeddings = model.embed(torch.arange(count, device=model.device))
    contexts = torch.zeros(count, shapes.context_dim, device=model.device)
    slots = contexts.new_zeros(count, window, shapes.context_dim)
    present = contexts.new_ones(count, window, dtype=torch.bool)
    hidden = (count, shapes.hidden_size)
    tried: dict[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {
        "mixer": lambda: (model.attention.eval()(embeddings[None], 0), (1, *hidden)),
        "block": lambda: (
            model.context_block(contexts, project_inputs(model.context_block, embeddings)),
            (count, shapes.context_dim),
        ),
        "loss": lambda: (_loss_of(config.plugins["loss"], torch.ones_like(contexts)), ()),
        "attention": lambda: (model.eval().attend(embeddings, slots, present)[0], hidden),
    }
    for hook, attempt in tried.items():
        if hook in config.plugins:
            name = config.plugins[hook].name
            try:
                found, expected = attempt()
            except Exception as error:  # whatever code of the user raises
                if isinstance(error, UserError) or is_out_of_memory(error):
                    raise
                cause = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{name} fails on {count} positions: {cause}; help(ctxkv_lib.run) says where what it is "
                    "given and returns is described."
                ) from error
            returned, right = _words(found), _words(torch.empty(expected))
            if returned != right:
                raise UserError(f"{name} returned {returned}; it must return {right}.")


def _loss_of(plugin: PlugIn, contexts: Tensor) -> Any:
    with torch.enable_grad():
        found = built(plugin)(contexts.requires_grad_())
    if isinstance(found, Tensor) and not found.shape and not found.requires_grad:
        raise UserError(
            f"{plugin.name} returned a scalar without a gradient; compute it from the contexts by torch "
            "operations."
        )
    return found


def _words(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"a tensor of shape {[*found.shape]}" if found.shape else "a scalar tensor"


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count all parameters, and those that Phase 2 trains, of a model that is set to it."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return {
        "total": sum(size for size, _ in sizes),
        "trainable_phase2": sum(size for size, is_trained in sizes if is_trained),
    }


def shapes(config: ExperimentConfig) -> tuple[dict[str, int], Window]:
    """Return parameter counts and window of an experiment's model, without allocating its weights."""
    with torch.device("meta"):
        model = untrained_model(config, GPT2_VOCAB_SIZE, config.data.unigram == "corpus")
    return parameter_counts(model), model.window
