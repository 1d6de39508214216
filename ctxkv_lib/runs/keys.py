"""What each stage of a run is computed from, in one table. A digest of that is the stage's key.

What is not in the table changes no stage: where and how it runs (`runtime.device` and `.threads`, folders),
how many conversations are asked for (the texts themselves count), and code that only reads, checks or writes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files import digest, source_digest
from .config import flat

if TYPE_CHECKING:
    from .experiment import Experiment

_RUN = ("runs.build", "runs.experiment", "runs.stages")
_PHASE1 = ("method.contexts", "method.model", "method.oacd", "plugins.mixer", *_RUN)
_LAYER = ("method.caches", "method.copying", "method.losses", "method.windows")
_SCORES = (*_LAYER, "method.scoring")
_TRAINING = ("method.optimizer", "method.phase2", "runs.saved_epochs", "data.cooccurrence")  # log-frequencies


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
    "phase1": Sources(  # neither window nor heads
        settings=("model.context_dim", "model.hidden_size", "phase1", "runtime.seed"),
        inputs=("train text", "tokenizer", "token table"),
        hooks=("block", "loss", "mixer"),
        code=_PHASE1,
    ),
    "caches": Sources(
        stages=("phase1",),
        settings=("runtime.embedding_cache",),
        inputs=("validation text", "precision"),
        code=(*_PHASE1, "method.caches", "method.scoring"),  # dtypes, and the effective rank
    ),
    "phase2": Sources(  # not the caches, which Phase 1 and the texts determine: lost ones do not matter
        stages=("phase1",),
        settings=("model", "phase2", "runtime.embedding_cache"),
        inputs=("validation text", "precision", "log-frequencies"),
        hooks=("attention", "mixer"),
        code=(*_PHASE1, *_SCORES, *_TRAINING),
    ),
    "model": Sources(stages=("phase2",), code=("method.modeling", "runs.export")),
    "test": Sources(stages=("caches", "phase2"), inputs=("test text",), code=(*_PHASE1, *_SCORES)),
}
MEASUREMENTS = {
    "ngrams": Sources(stages=("test",), code=("data.cooccurrence", "measure.ngrams")),
    "probe": Sources(stages=("test",), code=(*_PHASE1, *_SCORES, "measure.probe")),
}
# Of all that a result is computed with; the folder for transformers is no result.
RESULT_CODE = tuple(sorted({module for name in STAGES if name != "model" for module in STAGES[name].code}))


def stage_key(name: str, experiment: "Experiment") -> str:
    """Digest what a stage is computed from; the stages before it must be finished."""
    sources = STAGES[name]
    settings = {
        key: value
        for key, value in flat(experiment.config.to_dict())
        if key in sources.settings or key.partition(".")[0] in sources.settings
    }
    plugins = [experiment.config.plugins.get(hook) for hook in sources.hooks]
    stages = [experiment.folder.stages[stage] for stage in sources.stages]
    return digest(
        {
            "code": source_digest(*sources.code),
            "settings": settings,
            "inputs": [experiment.inputs[source] for source in sources.inputs],
            "plugins": [plugin and plugin.to_dict() for plugin in plugins],
            "stages": [[stage.key, stage.files] for stage in stages],
        }
    )


def measurement_key(name: str, test_key: str) -> str:
    """Digest what a measurement is computed from: the tested weights and texts, and code."""
    return digest([source_digest(*MEASUREMENTS[name].code), test_key])
