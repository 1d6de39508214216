"""Score the test split of a trained run, once, as a stage of its folder."""

import torch
from torch import Tensor

from ..data.conversations import load_conversations
from ..data.tokens import TokenStream, load_tokenizer, validation_stream
from ..errors import UserError, memory_advice
from ..files import digest
from ..method.caches import StreamCache
from ..method.contexts import distinct_rows, stream_contexts
from ..method.evaluation import perplexity, token_scores
from ..method.model import ContextKV, project_inputs
from ..progress import notice, stage
from .config import ExperimentConfig
from .long_run import LongRun
from .package_code import code_with_imports
from .provenance import choose_device
from .records import MEASUREMENTS, SummaryPart
from .rows import MixerModel, as_read
from .run_folder import RunFolder
from .trained import load_model


@memory_advice("Scoring the test split", "close other programs that use it")
def test(config: ExperimentConfig, folder: RunFolder) -> SummaryPart:
    """Score the test split with the best weights, or return the recorded scores.

    Args:
        folder: claimed, of a run that is trained.

    Returns:
        `ppl`, `acc` and `tokens`; `conversations`, of each the number of predicted tokens and their mean
        loss in nats; `fingerprint` of the split. Nothing if there is no token to predict.
    """
    conversations = load_conversations(config.data, "test")
    code = code_with_imports("runs/testing")
    key = digest([_trained_key(folder), conversations.fingerprint, code])
    done = folder.finished("test", key)
    if done is None:
        with stage("Scoring the test split"):
            stream = test_stream(config)
            found = _score(config, trained_model(config, folder), stream) if stream else {}
            if found:
                found["fingerprint"] = conversations.fingerprint
            done = folder.finish("test", key, (), found)
    return done.result


def test_stream(config: ExperimentConfig) -> TokenStream | None:
    """Read the test split as one stream; None if no token of it can be predicted."""
    conversations = load_conversations(config.data, "test")
    if not len(conversations):
        return None
    stream = validation_stream(conversations, load_tokenizer(config.data.tokenizer))
    return stream if len(stream.ids) > 1 else None


def trained_model(config: ExperimentConfig, folder: RunFolder) -> ContextKV:
    """Rebuild a run's model on the device of the run, or on another if this machine lacks that."""
    try:
        device = choose_device(config.runtime.device)
    except UserError:
        device = choose_device("auto")
        notice(f"The run is of {config.runtime.device}, which this machine lacks; {device.type} is used.")
    return load_model(folder.path, config).to(device)


def measurements(folder: RunFolder) -> SummaryPart:
    """Return the measurements in a folder (`measure`) that belong to its present weights."""
    stages = folder.records.stages
    return {
        name: stages[name].result
        for name in MEASUREMENTS
        if name in stages and stages[name].key.startswith(measurement_key(folder)) and stages[name].result
    }


def measurement_key(folder: RunFolder, code: str = "") -> str:
    """Digest the inputs of a measurement: the run's caches, weights and test split; then its code."""
    return f"{folder.records.stages['test'].key}-{code}"


def _trained_key(folder: RunFolder) -> str:
    """Digest caches and weights, these by the perplexities of their epochs."""
    caches, phase2 = (folder.records.stages[name] for name in ("caches", "phase2"))
    reached = [[epoch["train_ppl"], epoch["val_ppl"]] for epoch in phase2.metrics]
    return digest([caches.key, phase2.key, reached])


def test_scores(config: ExperimentConfig, model: ContextKV, stream: TokenStream) -> tuple[Tensor, Tensor]:
    """Compute `token_scores` of the test split."""
    cache, loop = test_cache(config, model, stream), LongRun(lambda _: None)
    return token_scores(model, cache, torch.arange(len(cache)), loop)


@torch.no_grad()
def test_cache(config: ExperimentConfig, model: ContextKV, stream: TokenStream) -> StreamCache:
    """Compute the contexts of the test split as those of validation."""
    ids = stream.ids.int().to(model.device)
    contexts = torch.empty(len(ids), 0, device=model.device)
    if not isinstance(model, MixerModel):
        embeddings, tokens = distinct_rows(model, ids[:-1])
        generator = torch.Generator(model.device).manual_seed(config.runtime.seed)
        inputs = project_inputs(model.context_block, embeddings)
        contexts = stream_contexts(model.context_block, inputs, tokens, config.phase1, generator)
    return as_read(model, StreamCache(ids, contexts), trained=False)


def _score(config: ExperimentConfig, model: ContextKV, stream: TokenStream) -> SummaryPart:
    losses, correct = test_scores(config, model, stream)
    return {
        "ppl": perplexity(losses.mean().item()),
        "acc": correct.float().mean().item(),
        "tokens": len(stream.ids),
        "conversations": [[len(part), part.mean().item()] for part in by_conversation(losses, stream.starts)],
    }


def by_conversation(losses: Tensor, starts: Tensor) -> list[Tensor]:
    """Split the losses, which start at the stream's second token, at the conversations' first tokens."""
    return [part for part in losses.tensor_split((starts[1:] - 1).clamp(min=0).cpu()) if len(part)]
