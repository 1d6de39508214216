"""The words of the report: (English, Japanese) for each key; every number comes in through a placeholder.

The pairs stand side by side so that one cannot change without the other being seen. Both of a pair use the
same placeholders (a test compares them).
"""

from .baselines import BASELINES
from .ending import ENDING
from .measured import MEASURED
from .runs import RUNS

LANGUAGES = ("en", "ja")

TEXT: dict[str, tuple[str, str]] = {**RUNS, **MEASURED, **BASELINES, **ENDING}
