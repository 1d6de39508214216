"""The stages of an experiment, in order: settings, contexts (Phase 1 and the caches), Phase 2, test.

`experiment_stages` says what each stage is made from, and which files it writes. The functions
`compute_contexts`, `train_phase2` and `score_test` each compute one stage. `driver` decides whether a stage
must be computed, and records what it was made from. Rank 0 computes everything except Phase 2, whose batches
are divided among all processes (see `ranks`). `experiments` defines the last two stages: the results, and the
saved model, which `write_model` writes. `measure.measurements` defines the stage of the n-gram baselines.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..data.tokens import validation_stream
from ..errors import UserError
from ..files import mib, write_json, write_parts, write_tensors, write_text
from ..method.caches import DTYPES, Cache
from ..method.config import Phase1Config
from ..method.contexts import contexts_by_passes, distinct_rows, exact_contexts
from ..method.loop import Diverged
from ..method.model import ContextKV
from ..method.oacd import UNTRAINED, Phase1Result, train_context_block
from ..method.objective import asked_tensors
from ..method.phase2 import train_layer
from ..method.scoring import effective_rank, perplexity, token_scores
from ..plugins.checks import refuse_unsaved
from ..plugins.hooks import HOOKS
from ..plugins.source_text import source_text
from ..progress import epochs_ahead, log, print_on_terminal, status_line
from .build import (
    WEIGHTS,
    load_block,
    load_caches,
    load_weights,
    parameter_counts,
    place_caches,
    save_weights,
)
from .config import GROUPS, ExperimentConfig
from .driver import Stage, Work
from .folder import SETTINGS
from .inputs import Inputs, settings_table
from .presets import usual_epochs
from .provenance import provenance
from .training import RunHooks

SCAN_TOKENS = 2**18  # tokens per chunk of contexts (256 MiB)
EMBEDDED_TOKENS = 2**13  # tokens per chunk of embeddings
# Settings that the stage `contexts` depends on. The other `model` settings (`interval`) affect only Phase 2.
CONTEXT_SETTINGS: tuple[str, ...] = ("phase1", "block", "loss", "model.context_dim", "model.hidden_size")
CONTEXT_SETTINGS += ("runtime.seed", "runtime.embedding_cache")
OWN_PARTS = "own_parts"  # folder for the user's source code
CONTEXT_DIGESTS = ("code", "training text", "validation text", "tokenizer", "token table", "precision")


def settings_stage(config: ExperimentConfig) -> Stage:
    """Return the stage that every run starts with. Its record contains all settings.

    The stage writes config.json and, if it can be found, the source text of the user's own parts.
    """

    def compute(work: Work) -> dict[str, Any]:
        values: dict[str, Any] = config.to_dict()
        write_json(work.folder.path / "config.json", values)
        for hook, plugin in config.plugins.items():
            if text := source_text(plugin):
                write_text(work.folder.path / OWN_PARTS / f"{hook}.py", text)
        return values

    table = settings_table(config, "preset", "recipe", *GROUPS, *HOOKS)
    return Stage(SETTINGS, compute, table, files=("config.json",), editable=(OWN_PARTS,))


def experiment_stages(inputs: Inputs) -> list[Stage]:
    """Return the stages of an experiment in order, from the settings to the test."""

    def made_from(settings: tuple[str, ...], digests: tuple[str, ...]) -> dict[str, Any]:
        return settings_table(inputs.config, *settings) | {name: inputs.digests[name] for name in digests}

    return [
        settings_stage(inputs.config),
        Stage(
            "contexts",
            partial(compute_contexts, inputs),
            made_from(CONTEXT_SETTINGS, CONTEXT_DIGESTS) | {"reads": inputs.config.reads},
            files=("checkpoint/context_block.safetensors", "caches"),
            is_linked=True,
        ),
        Stage(
            "phase2",
            partial(train_phase2, inputs),
            made_from(("model", "phase2", "layer"), (*CONTEXT_DIGESTS, "token frequencies")),
            after=("contexts",),
            files=(WEIGHTS,),
            state="checkpoint/phase2.pt",
            is_collective=True,
        ),
        Stage(
            "test",
            partial(score_test, inputs),
            made_from((), ("code", "test text")),
            after=("contexts", "phase2"),
        ),
    ]


def compute_contexts(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Train the ContextBlock (Phase 1), and write the block and the caches of both streams.

    A model without contexts has no Phase 1, and its caches hold only tokens.
    """
    config, ids = inputs.config, inputs.ids
    work.snapshot("data loaded")
    model = inputs.model
    work.snapshot("model built")
    generator = torch.Generator(inputs.device).manual_seed(config.runtime.seed)
    result, last, weights = UNTRAINED, None, 0
    if config.reads == "contexts":
        result, last, weights = _train_block(inputs, work, generator)
        block = work.folder.path / "checkpoint" / "context_block.safetensors"
        write_tensors(block, model.context_block.state_dict())
    work.snapshot("phase 1 done")
    with status_line("Computing the contexts of all positions"):
        rank = _write_caches(inputs, work, last, generator)
    phase1 = {**asdict(result), "seconds": round(result.seconds, 3), "effective_rank": rank}
    return {
        "phase1": {**phase1, "context_method": config.phase1.context_method},
        "tokens": {split: len(stream) for split, stream in ids.items()},
        "caches_mib": _sizes_mib(load_caches(work.folder.path / "caches")),
        **({"parameters": {"objective": weights}} if weights else {}),
    }


def _train_block(
    inputs: Inputs, work: Work, generator: torch.Generator
) -> tuple[Phase1Result, Tensor | None, int]:
    """Train the ContextBlock (Phase 1).

    Returns:
        the result; the contexts of the last iteration, from which parallel passes start; and the number of
        weights in the user's own loss, which are not saved.
    """
    model, config, loss = inputs.model, inputs.config, inputs.config.plugins.get("loss")
    model.set_phase(1)
    model.train()
    # Reset the seed, so that earlier random draws do not affect the weights of the user's loss or the block's
    # dropout.
    torch.manual_seed(config.runtime.seed)
    objective: Any = loss.objective(model) if loss else None
    reads_ahead = loss and "next_embeddings" in asked_tensors(objective)
    result, last = train_context_block(
        model.context_block,
        *distinct_rows(model, phase1_ids(inputs)),
        config.phase1,
        generator,
        objective,
        RunHooks(work),
        distinct_rows(model, phase1_ids(inputs, ahead=1)) if reads_ahead else None,
    )
    if loss and result.stop_reason == "untrained":
        raise UserError(f"Phase 1 trains nothing here, so {loss.name} has no effect; leave loss out.")
    model.set_phase(2)
    model.eval()
    weights = objective.parameters() if isinstance(objective, nn.Module) else ()
    return result, last, sum(weight.numel() for weight in weights)


def phase1_ids(inputs: Inputs, ahead: int = 0) -> Tensor:
    """Return the tokens that Phase 1 trains on.

    The result, int `[n]`, has all tokens of the training stream except the last. If there are more than
    `phase1.max_tokens` and the method is not `passes`, the result has only evenly spaced chunks of the
    stream. With `ahead=1`, return the token that follows each of these tokens in the stream.
    """
    stream, config = inputs.ids["train"], inputs.config.phase1
    ids = stream[ahead : len(stream) - 1 + ahead]
    most, size = config.max_tokens, config.batch_size
    if len(ids) <= most or config.context_method == "passes":
        return ids
    count = max(1, most // size)
    gap = (len(ids) - min(size, most)) / max(1, count - 1)
    return torch.cat([ids[int(number * gap) :][: min(size, most)] for number in range(count)])


def _write_caches(
    inputs: Inputs, work: Work, last: Tensor | None, generator: torch.Generator
) -> float | None:
    """Write the caches of both streams. Return the effective rank of the validation contexts, if any.

    Args:
        last: the contexts of Phase 1's last iteration, from which parallel passes over the same text start.
    """
    path, by_passes = work.folder.path / "caches", inputs.config.phase1.context_method == "passes"
    rank = None
    for split, ids in inputs.ids.items():
        if inputs.config.reads == "contexts":
            dtype = torch.float32 if split == "val" else DTYPES[inputs.precision]
            first = last if split == "train" and by_passes else None
            contexts = _stream_contexts(inputs.model, inputs.config.phase1, ids, generator, first)
            shape = (len(ids), inputs.config.model.context_dim)
            write_parts(path / f"{split}_ctx.safetensors", {"contexts": (dtype, shape, contexts)})
        write_parts(path / f"{split}_emb.safetensors", _token_tensors(inputs, ids))
    if (validation := load_caches(path)["val"].contexts) is not None:
        draw = torch.Generator().manual_seed(inputs.config.runtime.seed)
        rank = effective_rank(validation[1:], draw)
    return rank


def read_stream(model: ContextKV, config: Phase1Config, ids: Tensor, seed: int = 0) -> Cache:
    """Compute the cache of a stream in memory, in the same way as the cache of the validation stream.

    Args:
        ids: the tokens, integers `[n + 1]`.
        seed: random seed for the contexts from which parallel passes start.
    """
    tokens = ids.int().to(model.device)
    if model.context_block is None:
        return Cache(tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    return Cache(tokens, torch.cat([*_stream_contexts(model, config, tokens, generator)]))


@torch.no_grad()
def _stream_contexts(
    model: ContextKV,
    config: Phase1Config,
    ids: Tensor,
    generator: torch.Generator,
    last: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the contexts of a stream in parts, `[n + 1, context_dim]` in total. Row 0 precedes all tokens."""
    block = model.context_block
    embeddings, tokens = distinct_rows(model, ids[:-1])
    projected = block.project_inputs(embeddings)
    if config.context_method == "passes":
        yield _finite(contexts_by_passes(block, projected, tokens, config, generator, last))
        return
    before = projected.new_zeros(block.context_dim)
    yield before[None]
    for part in tokens.split(SCAN_TOKENS):
        contexts = exact_contexts(block, projected, part, config.tolerance, before)
        before = contexts[-1].clone()
        yield _finite(contexts[1:])


def _finite(contexts: Tensor) -> Tensor:
    if not contexts.sum().isfinite():
        raise Diverged(
            "The contexts overflow; bound what the block returns, as a LayerNorm does, or lower "
            "phase1.learning_rate."
        )
    return contexts


def _token_tensors(inputs: Inputs, ids: Tensor) -> dict[str, Any]:
    """Return the tensors for the `emb` file of a stream: token ids and, in the dense layout, embeddings."""
    tensors: dict[str, Any] = {"ids": (torch.int32, (len(ids),), [ids])}
    if inputs.config.runtime.embedding_cache == "dense" and inputs.config.reads == "contexts":
        parts = ids[:-1].split(EMBEDDED_TOKENS)
        rows = (inputs.model.embed(part.to(inputs.device).int()) for part in parts)
        shape = (len(ids) - 1, inputs.config.model.hidden_size)
        tensors["embeddings"] = (torch.float32, shape, rows)
    return tensors


def _sizes_mib(caches: dict[str, Cache]) -> dict[str, float]:
    """Return the size in MiB of each stream's contexts and embeddings (or token ids)."""
    sizes = dict[str, int]()
    for split, cache in caches.items():
        contexts = 0 if cache.contexts is None else cache.contexts.nbytes
        sizes |= {f"{split}_ctx": contexts, f"{split}_emb": cache.nbytes - contexts}
    return {name: mib(size) for name, size in {**sizes, "total": sum(sizes.values())}.items()}


def load_streams(inputs: Inputs, path: Path) -> tuple[dict[str, Cache], str]:
    """Load the ContextBlock and the caches for Phase 2. Return the caches, and a text on where they are."""
    load_block(inputs.model, path)
    caches, placement = place_caches(load_caches(path / "caches"), inputs.device)
    print_on_terminal(f"Caches: {placement}")
    return caches, placement


def train_phase2(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Train the layer in all processes (Phase 2), and write the weights of the best epoch."""
    config, model, path = inputs.config, inputs.model, work.folder.path
    streams, placement = load_streams(inputs, path)
    work.snapshot("phase 2 prepared")
    train, phase2 = streams["train"], config.phase2
    # Cost of validating one position, relative to the cost of training on one position.
    scoring = 1.5 if inputs.precision == "bf16" else 0.5

    def tell(seconds: float) -> None:
        seconds *= 1 + scoring * len(streams["val"]) / len(train)
        epochs = phase2.least_epochs, phase2.max_epochs, usual_epochs(config)
        log(f"{len(train) + 1:,} tokens: {epochs_ahead(seconds, *epochs)}.")

    hooks = RunHooks(work)
    hooks.tell = tell
    # Every process must draw the same initial weights.
    torch.manual_seed(config.runtime.seed)
    model.init_layer(phase1_ids(inputs), config.phase1)
    result = train_layer(model, train, streams["val"], phase2, config.runtime.seed, inputs.precision, hooks)

    def save() -> None:
        save_weights(model, path)
        if config.has_own_parts:
            loaded = inputs.new_model(other_seed=True)
            load_weights(loaded, path)
            refuse_unsaved(model, loaded, streams["val"])

    ranks.on_rank_0(save)
    return {
        "parameters": parameter_counts(model),
        "offsets": model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": provenance(inputs, placement),
    }


@status_line("Saving the model")
def write_model(inputs: Inputs, path: Path) -> None:
    """Write the model folder for transformers."""
    from .export import save_for_transformers  # importing transformers' models takes seconds

    load_weights(inputs.model, path)
    save_for_transformers(inputs.model, inputs.config, inputs.tokenizer, path / "model")


@status_line("Scoring the test split")
def score_test(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Compute the perplexity and the accuracy on the test split.

    Returns:
        `ppl`; `acc`; `tokens`; `conversations`, a list with the number of predicted tokens and the mean loss
        in nats for each conversation; and `fingerprint`. If there is no token to predict, the dict is empty.
    """
    texts, model, config = inputs.texts["test"], inputs.model, inputs.config
    if not len(texts) or len((stream := validation_stream(texts, inputs.tokenizer)).ids) < 2:
        return {}
    load_weights(model, work.folder.path)
    cache = read_stream(model, config.phase1, stream.ids, config.runtime.seed)
    losses, correct = token_scores(model, cache, torch.arange(len(cache)))
    parts = losses.tensor_split((stream.starts[1:] - 1).clamp(min=0).cpu())  # no loss for token 0
    return {
        "ppl": perplexity(losses.mean().item()),
        "acc": correct.float().mean().item(),
        "tokens": len(stream.ids),
        "conversations": [[len(part), part.mean().item()] for part in parts if len(part)],
        "fingerprint": texts.fingerprint,
    }
