"""Context-KV attention: a language model that attends 32 compressed contexts instead of every past token.

    import ctxkv_lib as ctxkv

    config = ctxkv.build_config("offline", samples=10)
    run = ctxkv.run(config, listener=ctxkv.LiveCurves())
    ctxkv.explore_runs([run.path])

The names below are the public API: what a notebook or a script needs.

| to find | look in |
|---|---|
| the method: contexts, attention, Origin-Anchored Centroid Dispersion (OACD), phases | `ctxkv_lib.method` |
| where conversations, tokens and token tables come from | `ctxkv_lib.data` |
| the model for transformers: generation, key-value cache | `ctxkv_lib.hf` |
| settings, stages and run folders of an experiment | `ctxkv_lib.runs`, `ctxkv_lib.experiments` |
| the written report | `ctxkv_lib.report` |
| figures, explorers and live curves, made from run folders | `ctxkv_lib.views` |
| plug-ins and measurements: recipes, baselines, probe, sweep, benchmark | `ctxkv_lib.research` |
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import UserError as UserError
    from .experiments import compare as compare
    from .experiments import prepare as prepare
    from .experiments import run as run
    from .hf.inference import evaluate_texts as evaluate_texts
    from .hf.inference import generate_text as generate_text
    from .report import comparison_table as comparison_table
    from .report import write_report as write_report
    from .runs.config import build_config as build_config
    from .runs.published import PUBLISHED as PUBLISHED
    from .runs.run_folder import comparison_folder as comparison_folder
    from .runs.run_folder import load_run as load_run
    from .runs.run_folder import run_folder_of as run_folder_of
    from .runs.trained import load_trained as load_trained
    from .views.live import LiveCurves as LiveCurves
    from .views.markup import show as show
    from .views.plots import explore_runs as explore_runs
    from .views.plots import explore_window as explore_window
    from .views.plots import memory_timeline as memory_timeline

__version__ = "0.1.0"

# The same names by module. Each is imported when it is first used, so that `ctxkv --help` answers at once.
_NAMES = {
    "errors": ("UserError",),
    "experiments": ("compare", "prepare", "run"),
    "report": ("comparison_table", "write_report"),
    "runs.config": ("build_config",),
    "hf.inference": ("evaluate_texts", "generate_text"),
    "runs.trained": ("load_trained",),
    "runs.published": ("PUBLISHED",),
    "runs.run_folder": ("comparison_folder", "load_run", "run_folder_of"),
    "views.live": ("LiveCurves",),
    "views.markup": ("show",),
    "views.plots": ("explore_runs", "explore_window", "memory_timeline"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_MODULE_OF]

# Before torch loads libgomp, whose waiting threads otherwise spin 300,000 times and starve other work.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if not TYPE_CHECKING:  # a type checker should refuse a name that is not above

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value  # from now on without this function
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
