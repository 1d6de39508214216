"""Sweeps: every grid point is an ordinary run, and results are written after each."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jinja2 import TemplateError

from ..data.conversations import load_conversations
from ..errors import Diverged, UserError, ended_calmly
from ..experiments import run
from ..files import digest, expanded, read_json, write_text
from ..files import sweep as remove_left_overs
from ..locks import only_process
from ..progress import Listener, Metric, counted, notice, progress_bar
from ..runs.config import ExperimentConfig, flat
from ..runs.configure import stated_settings
from ..runs.plugins import PlugIn
from ..runs.run_folder import Run, RunFolder, load_run
from ..views.axes import save
from ..views.study import sweep_figure
from .measure import changed_split, measure, measurements_of, own_fingerprints
from .protocol import GridPoint
from .sweep_file import entries_of, write_sweep
from .sweep_table import Entry, Results, results_of, summarize, sweep_document

DIGITS_OF_IDENTITY = 8  # hexadecimal, of a configuration in `sweep.json`


@ended_calmly()
def sweep(
    points: Sequence[GridPoint],
    root: Path | str,
    out: Path | str,
    listener: Listener = lambda _: None,
    hours: float | None = None,
    keep: bool = False,
    tell: Callable[[str], None] = notice,
) -> Results:
    """Run and measure every grid point that is not done; write `sweep.json`, `.md` and `.png` after each.

    A failed run is recorded with its reason, and the others go on. A finished run is not repeated with newer
    code: its summary names the commit. Unless artefacts are to be kept, its entry in `sweep.json` is enough,
    so a study continues from results alone. An entry of a finished run stays until another takes its place;
    if other grid points were swept into `out` before, the earlier `sweep.json` is kept under another name.

    Args:
        root, out: folders of the run folders, and of the results.
        listener, tell: called with every metric of every run, and with a line of text for each run.
        hours: start no run after this time.
        keep: keep model, caches and checkpoints of new runs, not only the results.

    Returns:
        the `variants`, an entry of each grid point (`cells`), `ngrams` by sample count, and the `rows` of the
        table. The `state` of an entry is "waiting", "finished", "diverged", which would happen again, or
        "failed", which is tried again; its `error` says why. `read_sweep` reads all but those that wait.

    Raises:
        UserError: before anything is computed, if there are no points, `hours` is no number of 0 or more,
            there are fewer conversations than the largest run asks for, or `sweep.json` is damaged.
    """
    points = [*points]
    if not points:
        raise UserError("A sweep of no grid points has no results; give at least one.")
    if hours is not None and not hours >= 0:
        raise UserError(f"--hours is {hours}; allowed: 0 or more.")
    out = expanded(out)
    load_conversations(max((point.config.data for point in points), key=lambda data: data.samples), "train")
    began = time.monotonic()
    with only_process(out):
        remove_left_overs(out, deep=False)  # the run folders below may be in use
        earlier = _entries(out / "sweep.json")
        _keep_others(out, {*earlier} - {identity(point.config) for point in points}, earlier)
        left = [_left(point, root, earlier, keep) for point in points]
        entries = [entry for entry, _ in left]
        results = _write(out, points, entries)
        waiting = [place for place, (_, is_done) in enumerate(left) if not is_done]
        for place in progress_bar(waiting, "Runs of the sweep", unit="run"):
            if hours is not None and time.monotonic() - began >= hours * 3600:
                notice(f"{hours:g} hours are over; the same command goes on with the runs that wait.")
                break
            entry = _run(points[place], root, listener, keep)
            if entry["state"] == "finished" or entries[place]["state"] != "finished":
                entries[place] = entry
            found = f"val PPL {entry['val_ppl']:,.1f}" if "val_ppl" in entry else entry["error"]
            tell(f"{place + 1} of {len(points)}: {points[place]}: {entry['state']}: {found}")
            results = _write(out, points, entries)
    return results


def finished_runs(points: Sequence[GridPoint], root: Path | str) -> dict[str, list[Run]]:
    """Load `{variant: its finished runs}` of all variants with a finished run folder."""
    runs: dict[str, list[Run]] = {}
    for point in points:
        if found := _finished(point, root):
            runs.setdefault(point.variant, []).append(found)
    return runs


def _entries(path: Path) -> dict[str, Entry]:
    """Read the entries of an earlier call, by configuration, each with what its row and sample count have.

    Raises:
        UserError: the file is damaged; it must not be overwritten.
    """
    try:
        stored = read_json(path)
        entries = entries_of(stored)
        sweep_document(summarize(stored["variants"], entries))  # all that the results are written from
        return {entry["config"][:DIGITS_OF_IDENTITY]: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        raise UserError(
            f"{path} is damaged, or not what a sweep wrote; restore it, or move it away to begin with the "
            "results in the run folders."
        ) from None


def _keep_others(out: Path, others: Collection[str], earlier: dict[str, Entry]) -> None:
    """Copy `sweep.json` if it has finished runs, by identity, that the next one will not have."""
    lost = [name for name in others if earlier[name]["state"] == "finished"]
    if lost:
        text = (out / "sweep.json").read_text(encoding="utf-8")
        kept = out / f"sweep-{digest(text)[:6]}.json"
        write_text(kept, text)
        notice(f"{counted(len(lost), ' results')} of other grid points: they are kept in {kept}.")


def _left(point: GridPoint, root: Path | str, earlier: dict[str, Entry], keep: bool) -> tuple[Entry, bool]:
    """Return the result of earlier calls for a grid point, and whether it need not be run again."""
    if found := _finished(point, root):
        return _entry(point, "finished", run=found), True
    waiting = _entry(point, "waiting")
    left = earlier.get(waiting["config"], waiting)
    done = {"finished": not keep, "diverged": point.folder(root).is_dir()}  # deleted, it is run again
    return {**left, "variant": point.variant}, done.get(left["state"], False)


def _finished(point: GridPoint, root: Path | str) -> Run | None:
    """Load a finished run, if there is one, after its missing measurements if possible."""
    with suppress(UserError):  # whatever is wrong with it: `run` will say so, or do it again
        found = load_run(point.folder(root))
        here = found.config.replace({"data.path": point.config.data.path})  # the file may have moved
        found = replace(found, config=here)
        if found.config == point.config and not changed_split(found):
            is_complete = set(measurements_of(point.config)) <= set(found.summary)
            return found if is_complete else _measured(found)
    return None


def _measured(found: Run) -> Run:
    """Make the missing measurements of a finished run; if that fails, say so and leave it without them."""
    try:
        return measure(found)
    except (UserError, RuntimeError) as problem:  # dropped artefacts, or an error of torch
        notice(f"{found.path} is not measured: {problem}")
        return found


def _run(point: GridPoint, root: Path | str, listener: Listener, keep: bool) -> Entry:
    if same := _finished(point, root):  # under another name, a moment ago
        return _entry(point, "finished", run=same)
    folder = RunFolder(point.folder(root))

    def named(metric: Metric) -> None:
        listener({**metric, "run": str(point)})

    try:
        done = _entry(point, "finished", run=_measured(run(point.config, folder.path, named)))
    except KeyboardInterrupt:  # while it was measured; as a finished run it would keep its artefacts
        if folder.holds_run():
            with folder.claimed(point.config):
                folder.records.remove("results")
        raise
    except Diverged as problem:
        done = _entry(point, "diverged", str(problem))
    except UserError as problem:
        return _entry(point, "failed", str(problem))
    except OSError:  # as of a full disk, which the others would meet, too
        raise
    except Exception as problem:  # torch's, of a setting that nobody had tried; whatever a plug-in raises
        return _entry(point, "failed", f"{type(problem).__name__}: {problem}")
    if not keep:
        with folder.claimed(point.config):
            folder.drop_artefacts()
    return done


def _entry(point: GridPoint, state: str, error: str = "", run: Run | None = None) -> Entry:
    """Make the entry of a grid point in `sweep.json`."""
    return {
        "variant": point.variant,
        "samples": point.config.data.samples,
        "seed": point.config.runtime.seed,
        "config": identity(point.config),
        "state": state,
        **({"error": error} if error else {}),
        **(results_of(run.summary) if run else {}),
    }


def identity(config: ExperimentConfig) -> str:
    """Identify a configuration and the texts of a file; new settings with their defaults do not change it."""
    plugins = {hook: replace(PlugIn.of(plugin.name), source="") for hook, plugin in config.plugins.items()}
    plain = ExperimentConfig("", "", plugins=plugins).to_dict()
    defaults = {key: value for key, value in flat(plain) if not key.endswith(".plugin")}
    changed = {key: value for key, value in flat(config.to_dict()) if value != defaults.get(key)}
    if texts := own_fingerprints(config.data):
        changed["data.path"] = texts  # wherever it is
    return digest(changed)[:DIGITS_OF_IDENTITY]


def _write(out: Path, points: Sequence[GridPoint], entries: Sequence[Entry]) -> Results:
    variants = {}
    for point in points:
        settings = stated_settings(point.config)
        settings.pop("runtime.seed", None)
        named = {"preset": point.config.preset, "recipe": point.config.recipe}
        variants[point.variant] = {**named, "settings": settings}
    results = summarize(variants, entries)
    write_sweep(out / "sweep.json", results)
    write_text(out / "sweep.md", sweep_document(results))
    if results["rows"]:
        save(sweep_figure(results), out / "sweep.png")
    return results
