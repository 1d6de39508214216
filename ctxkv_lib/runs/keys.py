"""What each stage of a run is computed from, in one table. A digest of that is the stage's key.

`Experiment.finished` asks for a stage by its key: `RunFolder.finished` reuses that of the run's own folder if
all files are intact, `RunFolder.link` that of a folder beside it (Phase 1 and caches only). One exception is
in `stages.contexts_stages`: caches by parallel passes need Phase 1 to have run in the same process.

The record's last stage, `results`, has the key `summary.results_key`. What is not in the table changes no
stage: where and how it runs (`runtime.device` and `.threads`, folders), how many conversations are asked for
(the texts themselves count), and code that only reads, checks or writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files import digest, source_digest

if TYPE_CHECKING:
    from .folder import RunFolder

# `tuned`, since a user's part may be built on its parts; those themselves count as plug-ins.
_BUILD: tuple[str, ...] = (
    "method.block",
    "method.layer",
    "method.model",
    "method.tuned",
    "runs.build",
    "runs.experiment",
)
_BUILD += ("runs.stages",)
_CONTEXTS = (*_BUILD, "method.contexts", "method.oacd")
_PHASE2_MODEL = ("method.caches", "method.copying", "method.losses", "method.windows")
_SCORES = (*_PHASE2_MODEL, "method.scoring")
_TRAINING = ("method.optimizer", "method.phase2", "runs.saved_epochs", "data.cooccurrence")  # log-frequencies
# What the folder for transformers is made of and with.
_SAVED: tuple[str, ...] = (
    *_PHASE2_MODEL,
    "method.arguments",
    "method.block",
    "method.config",
    "method.contexts",
    "method.fields",
    "method.layer",
    "method.model",
    "method.modeling",
)
_SAVED += ("method.own_code", "method.tuned", "runs.export")


@dataclass(frozen=True)
class Sources:
    """What a stage is computed from.

    Attributes:
        code: modules of this package that it computes with.
        settings: groups of settings, or single ones.
        inputs: names of `Experiment.inputs`.
        hooks: plug-ins, by their names, code and settings.
        stages: earlier stages; their keys and files count.
    """

    code: tuple[str, ...]
    settings: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


STAGES = {
    "phase1": Sources(  # not what only attention reads: window, heads
        settings=("model.context_dim", "model.hidden_size", "phase1", "runtime.seed"),
        inputs=("train text", "tokenizer", "token table"),
        hooks=("block", "loss"),
        code=_CONTEXTS,
    ),
    "caches": Sources(
        stages=("phase1",),
        settings=("runtime.embedding_cache",),
        inputs=("validation text", "precision"),
        code=(*_CONTEXTS, "method.caches", "method.scoring"),  # dtypes, and the effective rank
    ),
    "phase2": Sources(  # not the caches, which Phase 1 and the texts determine: lost ones do not matter here
        stages=("phase1",),
        settings=("model", "phase2", "runtime.embedding_cache"),
        inputs=("validation text", "precision", "log-frequencies"),
        hooks=("layer",),
        code=(*_CONTEXTS, *_SCORES, *_TRAINING),
    ),
    "model": Sources(stages=("phase2",), code=_SAVED),
    "test": Sources(stages=("caches", "phase2"), inputs=("test text",), code=(*_CONTEXTS, *_SCORES)),
    "ngrams": Sources(stages=("test",), code=("data.cooccurrence", "measure.ngrams")),
    "probe": Sources(stages=("test",), code=(*_CONTEXTS, *_SCORES, "measure.probe")),
}
MEASUREMENTS = ("ngrams", "probe")  # made when asked for
# Of all that a result is computed with; the folder for transformers is no result.
RESULT_CODE = tuple(
    sorted({module for name in ("phase1", "caches", "phase2", "test") for module in STAGES[name].code})
)


def stage_key(name: str, folder: "RunFolder", inputs: Mapping[str, str]) -> str:
    """Digest what a stage is computed from; the stages before it must be finished.

    Args:
        inputs: of `Experiment.inputs`, those that the table names; measurements have none.
    """
    sources = STAGES[name]
    settings = {
        key: value
        for key, value in folder.config.flat().items()
        if key in sources.settings or key.partition(".")[0] in sources.settings
    }
    plugins = [folder.config.plugins.get(hook) for hook in sources.hooks]
    stages = [folder.stages[stage] for stage in sources.stages]
    return digest(
        {
            "code": source_digest(*sources.code),
            "settings": settings,
            "inputs": [inputs[source] for source in sources.inputs],
            "reads": folder.config.reads,
            "plugins": [plugin and plugin.to_dict() for plugin in plugins],
            "stages": [[stage.key, stage.files] for stage in stages],
        }
    )
