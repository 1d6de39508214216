"""The written report, the comparison table, and `info` and `settings`, which need no run.

Modules of the report load with the first of the names below; `info` and `settings` do not need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .document import LANGUAGES as LANGUAGES
    from .document import comparison_table as comparison_table
    from .document import improvement as improvement
    from .document import observations as observations
    from .document import write_report as write_report
else:

    def __getattr__(name):
        if name not in ("LANGUAGES", "comparison_table", "improvement", "observations", "write_report"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".document", __name__), name)
