"""Format measurements of one run as tables: probe and ablations."""

from collections.abc import Mapping
from typing import Any

from ..method.config import ModelConfig
from .columns import Column, probe_blocks
from .document import words
from .tables import table_cells, terminal_table


def probe_table(probe: Mapping[str, Any], model: ModelConfig, language: str = "en") -> list[list[str]]:
    """Compare one run's contexts with those of untrained blocks: rows of cells, header first."""
    blocks = probe_blocks([Column("", {"probe": probe})], with_untrained=True)
    return table_cells(words(language).probe(blocks, model.interval))


def format_probe(probe: Mapping[str, Any], model: ModelConfig, language: str = "en") -> str:
    """Format `probe_table` for a terminal."""
    return terminal_table(probe_table(probe, model, language))


def format_ablations(ablations: Mapping[str, Any], language: str = "en") -> str:
    """Format the ablations for a terminal, overall and by kind of position."""
    macros = words(language)
    tables = macros.ablation(ablations), macros.position_kinds(ablations)
    return "\n\n".join(terminal_table(table_cells(table)) for table in tables)
