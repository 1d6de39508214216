"""Context-KV attention: a language model that attends 32 compressed contexts instead of every past token.

    import ctxkv_lib as ctxkv

    config = ctxkv.build_config("offline", samples=10)
    run = ctxkv.run(config, listener=ctxkv.LiveCurves())
    ctxkv.explore_runs([run.path])

The names below are the front door: what a notebook or a script needs. All else has its place in a room.

## How the parts fit

<img src="../.github/packages.png" width="100%" alt="The packages, and what the data becomes in each">

`data` reads conversations and joins their tokens into one stream. `training` makes contexts of it (Phase
1), keeps them in caches, and trains attention on these (Phase 2); the layers are those of `model`, which
stands alone because its files are saved beside the weights. `baselines` has what contexts are compared with.
Everything goes into one folder on disk, which `runs` knows. `measures` adds what a trained run is worth: a
test split, n-grams, what its contexts hold and what they are used for. `report` and `views` read such folders
and nothing else, so that a figure can be drawn long after the training. `experiments` does the stages in
order and leaves out what is done already; `cli` only parses, calls and prints.

| to find | look in |
|---|---|
| what a setting means, with its unit and reason | `ctxkv_lib.config` |
| the losses | `ctxkv_lib.training.phase1`, `ctxkv_lib.model.losses` |
| which positions a window sees | `ctxkv_lib.model.windows` |
| the recurrence that makes contexts | `ctxkv_lib.model.recurrence`, `ctxkv_lib.training.recurrence` |
| where conversations come from | `ctxkv_lib.data` |
| what contexts are compared with, and a grid of runs | `ctxkv_lib.baselines`, `ctxkv_lib.experiments.sweep` |
| what a trained run is measured by | `ctxkv_lib.measures` |
| the figures | `ctxkv_lib.views.figures` (of runs), `.pictures` (of notebooks), `.measures` |
| what a run folder holds, when it is reused | `ctxkv_lib.runs.run_folder`, `ctxkv_lib.experiments.stages` |
| perplexity on other text, and generated text | `ctxkv_lib.runs.inference` |
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import UserError as UserError
    from .experiments import compare as compare
    from .experiments import prepare as prepare
    from .experiments import run as run
    from .report import comparison_table as comparison_table
    from .report import write_report as write_report
    from .runs.config import build_config as build_config
    from .runs.inference import evaluate_texts as evaluate_texts
    from .runs.inference import generate_text as generate_text
    from .runs.inference import load_trained as load_trained
    from .runs.published import PUBLISHED as PUBLISHED
    from .runs.run_folder import comparison_folder as comparison_folder
    from .runs.run_folder import load_run as load_run
    from .runs.run_folder import run_folder_of as run_folder_of
    from .views.live import LiveCurves as LiveCurves
    from .views.markup import show as show
    from .views.plots import explore_runs as explore_runs
    from .views.plots import explore_window as explore_window
    from .views.plots import memory_timeline as memory_timeline

__version__ = "0.1.0"

# The same names once more, by the module that has them: each is imported when it is first used, so that
# `ctxkv --help` answers before anything heavy is loaded.
_HOMES = {
    "runs.config": ("build_config",),
    "errors": ("UserError",),
    "experiments": ("compare", "prepare", "run"),
    "report": ("comparison_table", "write_report"),
    "runs.inference": ("evaluate_texts", "generate_text", "load_trained"),
    "runs.published": ("PUBLISHED",),
    "runs.run_folder": ("comparison_folder", "load_run", "run_folder_of"),
    "views.live": ("LiveCurves",),
    "views.markup": ("show",),
    "views.plots": ("explore_runs", "explore_window", "memory_timeline"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*_HOME_OF]

if not TYPE_CHECKING:  # a type checker should refuse a name that is not above

    def __getattr__(name):
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value  # from now on without this function
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
