"""Grid points of a sweep: variants x sample counts x seeds, from options or from a JSON file.

Each is an ordinary experiment with a run folder of its own.
"""

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import digest
from ..progress import counted, say
from ..runs.config import ExperimentConfig
from ..runs.configure import configure, once, short_names
from ..runs.plugins import HOOKS
from ..runs.run_folder import run_folder_of

Settings = dict[str, Any]
KINDS = {"preset": str, "recipe": str, "settings": dict, "samples": list, "seeds": list, "variants": dict}
NAMES = {str: "a string", dict: "an object", list: "a list of whole numbers"}
# Settings of the data that change validation or test.
HELD_OUT = ("source", "path", "split", "validation_samples", "test_samples")
VARIANT_KEYS = ("recipe", "settings", "samples", "seeds")
FORM = (
    'a protocol is JSON such as {"preset": "offline", "samples": [10, 50], "seeds": [42, 43], "variants": '
    '{"NAME": {"recipe": "exact", "settings": {"phase2.weight_decay": 0.3}}}}'
)


@dataclass(frozen=True)
class GridPoint:
    """One run of a sweep; a variant is shared by all its seeds and sample counts."""

    variant: str
    config: ExperimentConfig

    def folder(self, root: Path | str) -> Path:
        """Return the run folder under `root`."""
        return run_folder_of(self.config, root)

    def __str__(self) -> str:
        return f"{self.variant}, {counted(self.config.data.samples)}, seed {self.config.runtime.seed}"


def points_around(
    base: ExperimentConfig, variants: Mapping[str, Settings], seeds: Sequence[int] | None = None
) -> list[GridPoint]:
    """Make grid points of `{name: settings on top of base}` for each seed; None is each one's own seed."""
    if seeds is None:
        return [GridPoint(name, base.replace(settings)) for name, settings in variants.items()]
    for settings in variants.values():
        once(settings, "runtime.seed", "seeds")
    return [
        GridPoint(name, base.replace({**settings, "runtime.seed": seed}))
        for seed in dict.fromkeys(seeds)
        for name, settings in variants.items()
    ]


def asked_for(file: Path | None, options: Mapping[str, Any], settings: Settings) -> Settings:
    """Return the protocol in `file`, or one made from command-line options and shared `settings`.

    Raises:
        UserError: both are given, or the file is not as `read_protocol` says.
    """
    named = {name: options[name] for name in ("preset", "recipe", "samples", "seeds", "grid")}
    if file is None:
        own = ", ".join(str(settings[hook]).rpartition(":")[2] for hook in HOOKS if hook in settings)
        variants = grid(named["recipe"], named["grid"], own or "base")
        return {**named, "recipe": None, "settings": settings, "variants": variants}
    if given := [name for name in (*named, "data", "set", *HOOKS) if options.get(name)]:
        raise UserError(f"--{given[0]} does not go with --protocol; write it into {file}.")
    return read_protocol(file)


def grid(recipes: Sequence[str] | None, axes: Sequence[str], alone: str = "base") -> dict[str, Settings]:
    """Combine each recipe (None: the preset's own) with each value of each axis to variants of a protocol.

    Args:
        alone: name of the variant if there is one, with nothing to name it by.

    Raises:
        UserError: an axis of another form than `group.field=value,value,...`.
    """
    variants: dict[str, Settings] = {}
    named: Sequence[str | None] = recipes or [None]
    along = [_axis(axis) for axis in axes]
    keys = [axis[0][0] for axis in along]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UserError(
            f"--grid has {min(twice)} twice; write all its values in one: --grid {min(twice)}=A,B."
        )
    for recipe, values in itertools.product(named, itertools.product(*along)):
        words = [f"{name} {value}" for name, (_, value) in zip(short_names(keys), values, strict=True)]
        if recipe and (not words or len(named) > 1):
            words.insert(0, recipe)
        variants[", ".join(words) or alone] = {"recipe": recipe, "settings": dict(values)}
    return variants


def _axis(pair: str) -> list[tuple[str, str]]:
    key, _, values = (part.strip() for part in pair.partition("="))
    found: list[str] = []
    for part in values.split(","):
        is_open = found and sum(map(found[-1].count, "[{")) > sum(map(found[-1].count, "]}"))  # of JSON
        found.append(f"{found.pop()},{part}" if is_open else part.strip())
    if not key or not all(found):
        raise UserError(f"--grid {pair!r} is no axis; write --grid group.field=value,value.")
    return [(key, value.strip()) for value in found]


def read_protocol(path: Path) -> Settings:
    """Read a protocol file: a JSON object with `variants`, an object by name, and what they share.

    A variant may have its own `recipe`, `settings`, `samples` and `seeds`; the outer object has defaults for
    these, and `preset`. A variant's settings go on top of the shared ones.

    Raises:
        UserError: it does not exist, is not JSON, has a name twice, or is not of that form.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; {FORM}.")

    def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path} has {twice[0]!r} twice; rename or delete one.")
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=named_once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {FORM}.") from None
    _check(f"{path}: the protocol", found, KINDS)
    if not found.get("variants"):
        raise UserError(f"{path} names no variants; {FORM}.")
    for name, variant in found["variants"].items():
        _check(f"{path}: variant {name!r}", variant, VARIANT_KEYS)
    return found


def _check(what: str, values: Any, allowed: Collection[str]) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{what} is no object; {FORM}.")
    for key, value in values.items():
        if key not in allowed:
            raise UserError(f"{what} has {key!r}; allowed: {', '.join(allowed)}.")
        kind = KINDS[key]
        if not isinstance(value, kind) or (kind is list and {type(each) for each in value} != {int}):
            raise UserError(f"{what} has {value!r} as {key}; allowed: {NAMES[kind]}.")


def grid_points(protocol: Settings, tell: Callable[[str], None] = say) -> list[GridPoint]:
    """Make every grid point of a protocol in running order: small counts and first seeds first.

    All variants share validation and test. Fields that are missing or None are taken from the preset. `tell`
    is called with a line on how the user's own file is split.

    Raises:
        UserError: a setting or a size that is not allowed, or another held-out text; it names the variant.
    """
    preset, common = protocol.get("preset") or ExperimentConfig.preset, protocol.get("settings") or {}
    variants = {
        name: {key: variant.get(key) or protocol.get(key) for key in ("recipe", "samples", "seeds")}
        for name, variant in protocol["variants"].items()
    }
    counts = [count for variant in variants.values() for count in variant["samples"] or []]
    base = configure(preset, protocol.get("recipe"), max(counts, default=None), common, tell)
    sizes = ("samples", "validation_samples", "test_samples")
    shared = {f"data.{size}": getattr(base.data, size) for size in sizes}
    placed: list[tuple[int, int, GridPoint]] = []
    for name, variant in variants.items():
        try:
            own_settings = protocol["variants"][name].get("settings") or {}
            for key, option in (("data.samples", "samples"), ("runtime.seed", "seeds")):
                if variant[option]:
                    once({**common, **own_settings}, key, option)
            settings = {**shared, **common, **own_settings}
            config = configure(preset, variant["recipe"], None, settings, lambda _: None)
            for count in dict.fromkeys(variant["samples"] or [config.data.samples]):
                for place, seed in enumerate(dict.fromkeys(variant["seeds"] or [config.runtime.seed])):
                    own = config.replace({"data.samples": count, "runtime.seed": seed})
                    placed.append((count, place, GridPoint(name, own)))
            for key in HELD_OUT:
                value, others = getattr(config.data, key), getattr(placed[0][-1].config.data, key)
                if value != others:
                    raise UserError(
                        f"data.{key} is {value!r}, and {others!r} in {placed[0][-1].variant!r}; variants are "
                        "compared on the same validation and test. Sweep them apart."
                    )
        except UserError as error:
            raise UserError(f"Variant {name!r}: {error}") from None
    return [point for *_, point in sorted(placed, key=lambda each: each[:2])]


def sweep_name(points: Sequence[GridPoint], file: Path | None) -> str:
    """Name a sweep's folder: like its protocol file, or by its preset and a short hash of its grid points."""
    if file:
        return file.stem
    contents = digest([[point.variant, point.config.to_dict()] for point in points])
    return f"sweep-{points[0].config.preset}-{contents[:6]}"
