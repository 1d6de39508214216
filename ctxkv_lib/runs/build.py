"""Build the model of a run, and load and save its weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from ..data.cooccurrence import token_vectors
from ..data.kneser_ney import smoothed_unigram
from ..data.token_table import load_table, token_counts
from ..data.tokens import TokenStream
from ..files import read_tensors, replacing, write_tensors
from ..method.config import GPT2_VOCAB_SIZE
from ..method.model import ContextKV
from ..plugins.plugins import KINDS
from ..progress import status_line
from ..store import Work, entry
from .config import ExperimentConfig

WEIGHTS, VECTORS = "weights.safetensors", "token_vectors.safetensors"  # files of a run folder


@torch.random.fork_rng(devices=[])
def untrained_model(config: ExperimentConfig, vocab_size: int, has_unigram: bool) -> ContextKV:
    """Build the untrained model of an experiment. Its weights depend only on the seed and the shapes.

    Raises:
        UserError: A plug-in does not make a torch.nn.Module.
    """
    torch.manual_seed(config.runtime.seed)
    parts: dict[str, Any] = {
        kind: plugin.make for kind, plugin in config.plugins.items() if KINDS[kind].is_module
    }
    if not config.has_contexts:
        parts["block"] = None
    return ContextKV(config.model, vocab_size, has_unigram, **parts)


@status_line("Building the model")
def model_with_table(config: ExperimentConfig, path: Path, log_unigram: Tensor | None) -> ContextKV:
    """Build the untrained model of a run, with its token table.

    Args:
        path: the run folder. It has the vectors of the tokens if the table is computed from text.
        log_unigram: log-frequencies of all tokens, `[vocab_size]`; None if the logits have no such bias.
    """
    vectors = read_tensors(path / VECTORS) if config.data.table == "cooccurrence" else None
    table = load_table(config.data, config.model.hidden_size, config.runtime.seed, vectors)
    model = untrained_model(config, len(table), log_unigram is not None)
    model.load_table(table, log_unigram)
    return model


def compute_table(corpus: TokenStream, config: ExperimentConfig, work: Work) -> dict[str, Any]:
    """Write the token vectors of a run, from which its token table is made. Runs share them in the store."""
    sizes = GPT2_VOCAB_SIZE, config.model.hidden_size, config.data.neighbours

    @status_line("Computing the token table")
    def compute(inner: Work) -> dict[str, Any]:
        write_tensors(inner.folder / VECTORS, token_vectors(corpus, *sizes))
        return {}

    path, _ = entry("table", work.inputs, compute, [VECTORS])
    with replacing(work.folder / VECTORS) as temporary_path:
        shutil.copyfile(path / VECTORS, temporary_path)
    return {}


def log_frequencies(corpus: TokenStream) -> Tensor:
    """Compute the log-frequencies of all tokens in a text, float32 `[vocab_size]`."""
    return torch.from_numpy(smoothed_unigram(token_counts(corpus).numpy())).log().float()


def parameter_counts(model: ContextKV) -> dict[str, int]:
    """Return the number of all parameters of a model, and the number of parameters that each phase trains."""
    parts: dict[str, nn.Module | None] = {
        "total": model,
        "trainable_phase1": model.context_block,
        "trainable_phase2": model.layer,
    }
    return {
        name: 0 if part is None else sum(weight.numel() for weight in part.parameters())
        for name, part in parts.items()
    }


def unallocated_model(config: ExperimentConfig) -> ContextKV:
    """Build the model on the meta device, where its tensors have shapes but take no memory."""
    with torch.device("meta"), _NoDraws():
        return untrained_model(config, GPT2_VOCAB_SIZE, config.data.unigram == "corpus")


class _NoDraws(TorchFunctionMode):
    """A torch mode that skips random init, which would import torch's compiler (3 s) on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = kwargs or {}
        if function in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return args[0] if args else arguments["tensor"]
        return function(*args, **arguments)


def weights_of(model: ContextKV) -> dict[str, Tensor]:
    """Return all weights and buffers of a model by name, except the token table."""
    tensors = dict[str, Tensor]([*model.named_buffers(), *model.named_parameters()])
    return {name: tensor for name, tensor in tensors.items() if name != "wte.weight"}


def load_weights(model: ContextKV, path: Path) -> None:
    """Load the trained weights and buffers of a run into `model`, and switch it to evaluation mode."""
    model.load_state_dict(read_tensors(path / WEIGHTS), strict=False)
    model.eval()
