"""The stages of an experiment in order; intact stages in the run folder are reused.

Phase 1 trains the ContextBlock, from which the caches are computed. Phase 2 trains attention and
feed-forward. The model combines both. Missing or damaged files are rebuilt from intact stages.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..errors import UserError, is_out_of_memory, memory_advice, one_line
from ..files import replacing, rust_writes, write_tensors
from ..method.caches import StreamCache
from ..method.contexts import distinct_rows
from ..method.memory import snapshot
from ..method.model import ContextKV
from ..method.phase2 import train_attention
from ..progress import notice, say, stage, transformers_bars_hidden
from .caches import load_cache, place_caches
from .contexts import context_summary, contexts_of, sampled_ids
from .models import check_saved, frozen_model, parameter_counts
from .package_code import replaced_parts
from .records import Record, SummaryPart
from .rows import MixerModel, as_read
from .trained import for_transformers, stop_after_text
from .work import Work


@dataclass(frozen=True)
class Prepared:
    """A run whose contexts are computed: the input of Phase 2."""

    model: ContextKV
    placement: str  # where the caches are held, in words
    record: SummaryPart  # `phase1`, `memory`, `caches_mib`, `tokens` and `parameters` of the summary
    caches: dict[str, StreamCache]  # "train" and "val"


def run_stages(work: Work) -> tuple[SummaryPart, SummaryPart]:
    """Bring an experiment to its trained state; return the summary parts of the contexts, and of Phase 2."""
    folder = work.folder
    phase1, caches = contexts_of(work)
    phase2 = _attention(work, phase1, caches)
    with stage("Saving the model"):
        key = work.model_key(phase2)
        if not folder.finished("model", key):
            folder.finish("model", key, ranks.on_rank_0(lambda: _write_model(work)))
    folder.keep_metrics(phase1, phase2)
    return context_summary(phase1, caches), {**phase2.result, "epochs": phase2.metrics}


def prepare(work: Work) -> Prepared:
    """Compute the contexts of an experiment; `run_stages` continues from there."""
    phase1, caches = contexts_of(work)
    if "phase2" not in work.folder.records.stages:
        work.folder.keep_metrics(phase1)
    return _prepare(work, phase1, caches)


@memory_advice("Preparing the model and the caches", "use fewer conversations, or a smaller model")
def _prepare(work: Work, phase1: Record, cached: Record) -> Prepared:
    files, model = work.folder.caches, work.model
    work.folder.load_block(model)
    loaded = {split: as_read(model, load_cache(files, split), split == "train") for split in work.ids}
    caches, placement = place_caches(loaded, work.device)
    say(f"Caches: {placement}")
    summary = context_summary(phase1, cached)
    summary["memory"] = [*summary["memory"], snapshot("phase 2 prepared", work.device)]
    summary["parameters"] = parameter_counts(model)
    return Prepared(model, placement, summary, caches)


@memory_advice("Phase 2", "lower phase2.batch_size")
def _attention(work: Work, phase1: Record, caches: Record) -> Record:
    """Train Phase 2, and write the best epoch's weights to the folder."""
    folder, config, key = work.folder, work.config, work.phase2_key(phase1)
    if done := folder.finished("phase2", key):
        work.report(done)
        return done
    prepared, model = _prepare(work, phase1, caches), work.model
    folder.keep_metrics(phase1)
    _init_attention(work)
    _check_saved(work, prepared)  # most of what it finds is there before training
    result = train_attention(
        model,
        prepared.caches["train"],
        prepared.caches["val"],
        config.phase2,
        config.runtime.seed,
        work.loop(),
    )
    drawn = {f"attention.{name}": each.clone() for name, each in model.attention.named_buffers()}
    trained = {**drawn, **model.trained_weights()}
    ranks.on_rank_0(lambda: write_tensors(folder.attention, trained))
    _check_saved(work, prepared)
    summary = {
        "parameters": parameter_counts(model),
        "offsets": None if isinstance(model, MixerModel) else model.window.offsets,
        "stop_reason": result.stop_reason,
        "provenance": work.provenance(prepared.placement),
        "memory": prepared.record["memory"][-1:],
    }
    return folder.finish("phase2", key, [folder.attention], summary, result.epochs)


def _check_saved(work: Work, prepared: Prepared) -> None:
    """Refuse an idea of the user that computes with more than its parameters and buffers."""
    if work.config.has_ideas:
        again = frozen_model(work.config, work.table, work.counts).to(work.device)
        again.load_state_dict(work.model.state_dict(), strict=False)
        ranks.on_rank_0(lambda: check_saved(work.model, again, prepared.caches["val"]))


def _init_attention(work: Work) -> None:
    """Call a plug-in's init of Phase 2's weights, which depends on the trained ContextBlock or the tokens."""
    attention: Any = work.model.attention
    torch.manual_seed(work.config.runtime.seed)  # in each process, and whether Phase 1 was reused or not
    if hasattr(attention, "init_from_block"):
        attention.init_from_block(work.model.context_block)
    elif isinstance(work.model, MixerModel) and hasattr(attention, "init_weights"):
        attention.init_weights(*distinct_rows(work.model, sampled_ids(work)), work.config.phase1)


def _write_model(work: Work) -> list[Path]:
    """Write the model for transformers, its code included; a line instead if that cannot be exported."""
    folder = work.folder
    try:
        folder.load_block(work.model)  # where stages are reused, it is untrained
        folder.load_attention(work.model)
        if replaced := [name for name, _ in replaced_parts()]:
            raise UserError(f"{replaced[0]} was replaced; use a plug-in, whose code is saved with the model.")
        model, tokenizer = for_transformers(work.model, work.config), deepcopy(work.tokenizer)
        stop_after_text(model, tokenizer)
        with replacing(folder.model) as beside, rust_writes(folder.model), transformers_bars_hidden():
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            names = beside / "tokenizer_config.json"  # transformers 4 knows its class by another name
            saved = names.read_text(encoding="utf-8")
            names.write_text(saved.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and (not work.config.has_ideas or is_out_of_memory(error)):
            raise
        notice(f"The model is not saved for transformers: {one_line(str(error))}")
        return []
    return [folder.model]
