"""Context-KV attention: a language model that attends to 32 compressed contexts, not to every past token.

::

    import ctxkv_lib as ctxkv

    config = ctxkv.build_config("offline", samples=10)
    run = ctxkv.run(config, listener=ctxkv.LiveCurves())
    ctxkv.explore_runs([run.path])

The names in `__init__.pyi` are the public API; notebooks and scripts need no other names. Where to look:

- `ctxkv_lib.method`: the model, and both phases of training. Phase 1 uses Origin-Anchored Centroid Dispersion
  (OACD). The module `method.modeling` contains the model for Hugging Face transformers.
- `ctxkv_lib.data`: loads conversations, tokens and token tables.
- `ctxkv_lib.plugins`: lets users replace parts of the method with their own code.
- `ctxkv_lib.baselines`: ordinary layers, a block and losses to compare such code with.
- `ctxkv_lib.runs` and `ctxkv_lib.experiments`: the settings, steps and run folder of an experiment.
- `ctxkv_lib.report`: tables and written reports.
- `ctxkv_lib.views`: figures, explorers and live curves, made from run folders.
- `ctxkv_lib.measure`: measurements of a finished run, such as n-gram baselines or scores on other text.
"""

import os
import re
from importlib import import_module
from pathlib import Path

__version__ = "0.5.0"

# The public names are read from `__init__.pyi`, the stub for type checkers. Each name is imported when it is
# first used, so that `ctxkv --help` answers at once.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULE_OF = {name: module for module, name in re.findall(r"(?m)^from (\S+) import (\w+) as", _STUB)}
__all__ = [*_MODULE_OF]

# GOMP_SPINCOUNT must be set before torch loads libgomp. By default, libgomp's waiting threads spin 300,000
# times and starve other work.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _MODULE_OF[name]
    is_module = home == "."
    value = import_module(f".{name}", __name__) if is_module else getattr(import_module(home, __name__), name)
    # Later look-ups find the name in the module and do not call this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
