"""Many experiments side by side: each grid point an ordinary run, the results written after every one."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import TemplateError

from ..data.conversations import load_conversations
from ..errors import Diverged, UserError
from ..experiments import run, stopped_calmly
from ..files import digest, read_json, write_rows_json, write_text
from ..files import sweep as remove_left_overs
from ..locks import only_process
from ..progress import Listener, notice, progress_bar
from ..runs.config import ExperimentConfig, changed_settings, flat
from ..runs.plugins import PlugIn
from ..runs.run_folder import Run, RunFolder, load_run
from ..views.axes import save
from ..views.study import sweep_figure
from .measure import measure, measurements_of
from .protocol import GridPoint
from .sweep_table import Entry, Results, results_of, summarize, sweep_document

DONE = ("finished", "diverged")


@dataclass(frozen=True)
class Outcome:
    """A grid point and what became of it.

    Attributes:
        entry: what `sweep.json` has of it. `state` is "waiting", "finished", "diverged", which would happen
            again, or "failed", which is tried again; `error` says why a run did not finish.
        run: of a finished one whose folder is there.
    """

    point: GridPoint
    entry: Entry
    run: Run | None = None

    def __str__(self) -> str:
        if self.run:
            return f"{self.point}: val PPL {self.run.summary['phase2']['val_ppl']:,.1f}"
        return f"{self.point}: {self.entry['state']}: {self.entry.get('error')}"


@stopped_calmly()
def sweep(
    points: Sequence[GridPoint],
    root: Path,
    out: Path,
    listener: Listener = lambda _: None,
    hours: float | None = None,
    keep: bool = False,
    tell: Callable[[str], None] = notice,
) -> list[Outcome]:
    """Run and measure every grid point that is not done; write `sweep.json`, `.md` and `.png` after each.

    A run that fails is recorded with its reason, and the others go on. A finished one is not run again,
    whatever code it ran: its summary names the commit. Unless artefacts are to be kept, its entry in
    `sweep.json` is enough, so that a study goes on from results that were passed on.

    Args:
        root, out: folders of the run folders, and of the results.
        listener, tell: get every metric of every run, and a line of text for each run.
        hours: begin no run once so much time has passed.
        keep: keep model, caches and checkpoints of what is run now, not only the results.

    Raises:
        UserError: before anything is computed, if there are fewer conversations than the largest run asks
            for, or `sweep.json` is damaged.
    """
    load_conversations(max((point.config.data for point in points), key=lambda data: data.samples), "train")
    began = time.monotonic()
    with only_process(out):
        remove_left_overs(out, deep=False)  # the run folders below may be in use
        earlier = _entries(out / "sweep.json")
        outcomes = [_found(point, root, earlier, keep) for point in points]
        waiting = [place for place, each in enumerate(outcomes) if each.entry["state"] not in DONE]
        for place in progress_bar(waiting, "Runs of the sweep", unit="run"):
            if hours is not None and time.monotonic() - began >= hours * 3600:
                notice(f"{hours:g} hours are over; the same command goes on with the runs that wait.")
                break
            outcomes[place] = _run(points[place], root, listener, keep)
            tell(f"{place + 1} of {len(points)}: {outcomes[place]}")
            _write(out, outcomes)
        _write(out, outcomes)
    return outcomes


def finished_runs(outcomes: Sequence[Outcome]) -> dict[str, list[Run]]:
    """Return `{variant: its finished runs}`, of the variants that have one."""
    runs: dict[str, list[Run]] = {}
    for each in outcomes:
        if each.run:
            runs.setdefault(each.point.variant, []).append(each.run)
    return runs


def _entries(path: Path) -> dict[str, Entry]:
    """Read the entries of an earlier call, by configuration, each with the n-grams of its sample count.

    Raises:
        UserError: the file is not what a sweep writes; nothing may be written over it.
    """
    try:
        results = read_json(path)
        entries = [{"ngrams": results["ngrams"].get(str(e["samples"]), {}), **e} for e in results["cells"]]
        sweep_document(summarize(results["variants"], entries))  # all that the results are written from
        return {entry["config"]: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        raise UserError(
            f"{path} is damaged, or not what a sweep wrote; restore it, or move it away to begin with the "
            "results in the run folders."
        ) from None


def _found(point: GridPoint, root: Path, earlier: dict[str, Entry], keep: bool) -> Outcome:
    """Return what earlier calls left of a grid point."""
    if done := _finished(point, root):
        return done
    waiting = _outcome(point, root, "waiting")
    left = earlier.get(waiting.entry["config"], waiting.entry)
    counts = {"finished": not keep, "diverged": point.folder(root).is_dir()}  # deleted, it is run again
    named = {name: waiting.entry[name] for name in ("variant", "folder")}
    return Outcome(point, {**left, **named}) if counts.get(left["state"]) else waiting


def _finished(point: GridPoint, root: Path) -> Outcome | None:
    """Load a finished run, if there is one; measurements that it lacks are made if they can be."""
    with suppress(UserError):  # whatever is wrong with it: `run` will say so, or do it again
        found = load_run(point.folder(root))
        if found.config == point.config:
            with suppress(UserError):  # its artefacts are dropped
                if not set(measurements_of(point.config)) <= set(found.summary):
                    found = measure(found)
            return _outcome(point, root, "finished", run=found)
    return None


def _run(point: GridPoint, root: Path, listener: Listener, keep: bool) -> Outcome:
    if same := _finished(point, root):  # under another name, a moment ago
        return same
    folder = RunFolder(point.folder(root))
    try:
        done = _outcome(point, root, "finished", run=measure(run(point.config, folder.path, listener)))
    except Diverged as problem:
        done = _outcome(point, root, "diverged", str(problem))
    except UserError as problem:
        return _outcome(point, root, "failed", str(problem))
    except RuntimeError as problem:  # torch's, of a setting that nobody had tried
        return _outcome(point, root, "failed", f"{type(problem).__name__}: {problem}")
    if not keep:
        with folder.claimed(point.config):
            folder.drop_artefacts()
    return done


def _outcome(
    point: GridPoint, root: Path, state: str, error: str | None = None, run: Run | None = None
) -> Outcome:
    entry = {
        "variant": point.variant,
        "samples": point.config.data.samples,
        "seed": point.config.runtime.seed,
        "folder": point.folder(root).name,
        "config": _identity(point.config),
        "state": state,
        **({"error": error} if error else {}),
        **(results_of(run.summary) if run else {}),
    }
    return Outcome(point, entry, run)


def _identity(config: ExperimentConfig) -> str:
    """Identify a configuration, also after settings were added whose defaults do what was done before."""
    plugins = {hook: replace(PlugIn.of(plugin.name), source="") for hook, plugin in config.plugins.items()}
    plain = ExperimentConfig("", "", plugins=plugins).to_dict()
    defaults = {key: value for key, value in flat(plain) if not key.endswith(".plugin")}
    return digest({key: value for key, value in flat(config.to_dict()) if value != defaults.get(key)})


def sweep_results(outcomes: Sequence[Outcome]) -> Results:
    """Make `sweep.json`."""
    variants = {}
    for point in (each.point for each in outcomes):
        changed = changed_settings(point.config)
        changed.pop("runtime.seed", None)
        named = {"preset": point.config.preset, "recipe": point.config.recipe}
        variants[point.variant] = {**named, "settings": changed}
    return summarize(variants, [each.entry for each in outcomes])


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    results = sweep_results(outcomes)
    write_rows_json(out / "sweep.json", results)
    write_text(out / "sweep.md", sweep_document(results))
    if results["rows"]:
        save(sweep_figure(results), out / "sweep.png")
