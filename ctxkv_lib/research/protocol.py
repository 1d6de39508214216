"""What a sweep is asked for: variants x sample counts x seeds, from options or from a JSON file.

Every combination is a cell, an ordinary experiment with a run folder of its own.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import digest, read_json
from ..progress import say
from ..runs.config import ExperimentConfig
from ..runs.configure import configure

Settings = dict[str, Any]
VARIANT_KEYS = ("recipe", "settings", "samples", "seeds")
KEYS = ("preset", *VARIANT_KEYS, "variants")
FORM = (
    'a protocol is JSON such as {"preset": "offline", "samples": [10, 50], "seeds": [42, 43], "variants": '
    '{"NAME": {"recipe": "exact", "settings": {"phase2.weight_decay": 0.3}}}}'
)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; its variant is what all its seeds and sample counts have in common."""

    variant: str
    config: ExperimentConfig

    def __str__(self) -> str:
        return f"{self.variant}, {self.config.data.samples:,} samples, seed {self.config.runtime.seed}"


def cells_around(
    base: ExperimentConfig, variants: Mapping[str, Settings], seeds: Sequence[int] | None = None
) -> list[Cell]:
    """Cells of `{name: settings on top of base}`, seed by seed; None takes the base's own."""
    return [
        Cell(name, base.replace({**settings, "runtime.seed": seed}))
        for seed in seeds or [base.runtime.seed]
        for name, settings in variants.items()
    ]


def asked_for(file: Path | None, options: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The protocol in `file`, or the one that options name.

    Args:
        options: `preset`, `recipe` (one or more), `samples`, `seeds` and `grid`; empty if not given.
        settings: common to all variants.

    Raises:
        UserError: both are given, or the file is not as `read_protocol` says.
    """
    named = {name: options[name] for name in ("preset", "recipe", "samples", "seeds", "grid")}
    if file is None:
        variants = grid(named["recipe"], named["grid"])
        return {**named, "recipe": None, "settings": settings, "variants": variants}
    given = [name for name, value in {**named, "set": settings}.items() if value]
    if given:
        raise UserError(f"--{given[0]} does not go with --protocol; write it into {file}.")
    return read_protocol(file)


def grid(recipes: Sequence[str] | None, axes: Sequence[str]) -> dict[str, Settings]:
    """Variants of a protocol: each recipe with each combination of the axes' values.

    Args:
        recipes: None takes the preset's own.
        axes: `concern.field=value,value,...`.

    Raises:
        UserError: an axis of another form.
    """
    variants: dict[str, Settings] = {}
    choices = itertools.product(*map(_axis, axes))
    named: Sequence[str | None] = recipes or [None]
    for recipe, values in itertools.product(named, choices):
        words = [f"{key.rpartition('.')[2]} {value}" for key, value in values]
        if recipe and (not words or len(named) > 1):
            words.insert(0, recipe)
        variants[", ".join(words) or "base"] = {"recipe": recipe, "settings": dict(values)}
    return variants


def _axis(pair: str) -> list[tuple[str, str]]:
    key, _, values = (part.strip() for part in pair.partition("="))
    found = [value.strip() for value in values.split(",")]
    if not key or not all(found):
        raise UserError(f"--grid {pair!r} is no axis; write --grid concern.field=value,value.")
    return [(key, value) for value in found]


def read_protocol(path: Path) -> dict[str, Any]:
    """A protocol file: a JSON object, of which only `variants` is needed.

    It has `preset`, `recipe`, `settings`, `samples` and `seeds`, and as `variants` an object of them by name.
    All but the preset a variant may have for itself; its settings go on top of the common ones.

    Raises:
        UserError: it is not there, not JSON, or not of that form.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; {FORM}.")
    found = read_json(path)
    _check(f"{path}: the protocol", found, KEYS)
    if not found.get("variants"):
        raise UserError(f"{path} names no variants; {FORM}.")
    for name, variant in found["variants"].items():
        _check(f"{path}: variant {name!r}", variant, VARIANT_KEYS)
    return found


def _check(what: str, values: Any, allowed: Sequence[str]) -> None:
    """Whether an object of a protocol has allowed keys, each with a value of its kind."""
    if not isinstance(values, dict):
        raise UserError(f"{what} is no object; {FORM}.")
    for key, value in values.items():
        if key not in allowed:
            raise UserError(f"{what} has {key!r}; allowed: {', '.join(allowed)}.")
        if key in ("samples", "seeds"):
            fits = isinstance(value, list) and value and all(type(each) is int for each in value)
            kind = "a list of whole numbers"
        elif key in ("settings", "variants"):
            fits, kind = isinstance(value, dict), "an object"
        else:
            fits, kind = isinstance(value, str), "a string"
        if not fits:
            raise UserError(f"{what} has {value!r} as {key}; allowed: {kind}.")


def cells_of(protocol: Mapping[str, Any], tell: Callable[[str], None] = say) -> list[Cell]:
    """Every cell of a protocol in the order in which they run: small counts first, then first seeds.

    All variants read the same validation and test.

    Args:
        protocol: as from `read_protocol`; what it leaves out, or has as None, is left to the preset.
        tell: gets a line on how a file of one's own is split.

    Raises:
        UserError: a setting or a size that is not allowed; it names the variant.
    """
    preset, common = protocol.get("preset") or ExperimentConfig.preset, protocol.get("settings") or {}
    variants = {
        name: {key: variant.get(key) or protocol.get(key) for key in ("recipe", "samples", "seeds")}
        for name, variant in protocol["variants"].items()
    }
    counts = [count for variant in variants.values() for count in variant["samples"] or []]
    base = configure(preset, protocol.get("recipe"), max(counts, default=None), common, tell)
    sizes = ("samples", "validation_samples", "test_samples") if base.data.source == "file" else ("samples",)
    shared = {f"data.{size}": getattr(base.data, size) for size in sizes}
    placed: list[tuple[int, int, Cell]] = []
    for name, variant in variants.items():
        settings = {**shared, **common, **(protocol["variants"][name].get("settings") or {})}
        try:
            config = configure(preset, variant["recipe"], None, settings, lambda _: None)
            for count in variant["samples"] or [config.data.samples]:
                for place, seed in enumerate(variant["seeds"] or [config.runtime.seed]):
                    own = config.replace({"data.samples": count, "runtime.seed": seed})
                    placed.append((count, place, Cell(name, own)))
        except UserError as error:
            raise UserError(f"Variant {name!r}: {error}") from None
    return [cell for *_, cell in sorted(placed, key=lambda each: each[:2])]


def sweep_name(cells: Sequence[Cell], file: Path | None) -> str:
    """Of a protocol file its name; of a sweep given by options its preset, and a short hash of its cells."""
    if file:
        return file.stem
    contents = digest([[cell.variant, cell.config.to_dict()] for cell in cells])
    return f"sweep-{cells[0].config.preset}-{contents[:6]}"
