"""Build the model of a run, load and save its weights, and load its caches."""

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from ..data.config import DataConfig
from ..data.conversations import Conversations
from ..data.kneser_ney import smoothed_unigram
from ..data.token_table import corpus_counts
from ..errors import UserError
from ..files import mib, read_tensors, write_tensors
from ..method.caches import Cache
from ..method.config import GPT2_VOCAB_SIZE
from ..method.memory import GIB
from ..method.model import ContextKV
from ..plugins.hooks import HOOKS
from .config import ExperimentConfig

WEIGHTS = "checkpoint/weights.safetensors"  # path in a run folder
HEADROOM_BYTES = GIB  # GPU memory left for training


@torch.random.fork_rng(devices=[])
def untrained_model(config: ExperimentConfig, vocab_size: int, has_unigram: bool) -> ContextKV:
    """Build the untrained model of an experiment. Its weights depend only on the seed and the shapes.

    Raises:
        UserError: A plug-in does not make a torch.nn.Module, or a layer's `reads` is not what its plug-in
            declares.
    """
    torch.manual_seed(config.runtime.seed)
    parts: dict[str, Any] = {}
    for hook, plugin in config.plugins.items():
        if HOOKS[hook].is_module:
            parts[hook] = plugin.make
    if config.reads == "tokens":
        parts["block"] = None
    model = ContextKV(config.model, vocab_size, has_unigram, **parts)
    if model.layer.reads != config.reads:
        raise UserError(
            f"{config.plugins['layer'].name} makes a layer that reads {model.layer.reads}; give its class, "
            f"with reads = {model.layer.reads!r} as an attribute of the class."
        )
    return model


def frozen_model(config: ExperimentConfig, table: Tensor, log_unigram: Tensor | None) -> ContextKV:
    """Build the model and load the table `[vocab_size, hidden_size]` and log-frequencies `[vocab_size]`."""
    model = untrained_model(config, len(table), log_unigram is not None)
    model.load_table(table, log_unigram)
    return model


def log_frequencies(data: DataConfig, corpus: Conversations | None) -> Tensor | None:
    """Compute the log-frequencies of all tokens, float32 `[vocab_size]`. The model adds them to its logits.

    Return None if `data.unigram` is "none" or `corpus` is None.
    """
    if data.unigram == "none" or corpus is None:
        return None
    return torch.from_numpy(smoothed_unigram(corpus_counts(data, corpus).numpy())).log().float()


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


def load_block(model: ContextKV, path: Path) -> None:
    """Load the trained ContextBlock from a run folder. Do nothing if the model's layer reads tokens."""
    if model.layer.reads == "contexts":
        model.context_block.load_state_dict(read_tensors(path / "checkpoint" / "context_block.safetensors"))


def save_weights(model: ContextKV, path: Path) -> None:
    """Write all weights and buffers except the token table, with the same names as in the saved model."""
    tensors = dict[str, Tensor]([*model.named_buffers(), *model.named_parameters()])
    del tensors["wte.weight"]
    shard = {f"model.{name}": tensor for name, tensor in tensors.items()}
    write_tensors(path / WEIGHTS, shard, {"format": "pt"})


def saved_weights(path: Path) -> dict[str, Tensor]:
    """Memory-map all weights and buffers of a run's trained model, except the token table."""
    return {name.removeprefix("model."): tensor for name, tensor in read_tensors(path / WEIGHTS).items()}


def load_weights(model: ContextKV, path: Path) -> None:
    """Load all trained weights of a run folder into `model`, and switch it to evaluation mode."""
    model.load_state_dict(saved_weights(path), strict=False)
    model.eval()


def load_caches(folder: Path) -> dict[str, Cache]:
    """Memory-map the caches of both streams, "train" and "val", on the CPU.

    Raises:
        DamagedFile: A file is damaged.
    """
    caches: dict[str, Cache] = {}
    for split in ("train", "val"):
        tensors = read_tensors(folder / f"{split}_emb.safetensors")
        # If the layer reads tokens, there is no file with contexts.
        if (contexts := folder / f"{split}_ctx.safetensors").is_file():
            tensors |= read_tensors(contexts)
        caches[split] = Cache(**tensors)
    return caches


def place_caches(caches: dict[str, Cache], device: torch.device) -> tuple[dict[str, Cache], str]:
    """Move the caches that fit to the GPU, smallest first. Return all caches and a text on where they are."""
    placed, words = dict[str, Cache](), []
    for split, cache in sorted(caches.items(), key=lambda item: item[1].nbytes):
        placed[split], place = cache, "mapped from its files"
        if device.type != "cpu":
            on_gpu = device.type == "cuda"  # mps shares the CPU's memory
            free_bytes = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
            if cache.nbytes + HEADROOM_BYTES <= free_bytes:
                placed[split], place = cache.map(lambda tensor: tensor.to(device)), f"on {device.type}"
        words.append(f"{split} {mib(cache.nbytes):,.0f} MiB {place}")
    return placed, ", ".join(words)
