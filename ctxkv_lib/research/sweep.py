"""Many experiments side by side: each cell an ordinary run, the results written after every one."""

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
from ..runs.run_folder import Run, RunFolder, load_run, run_folder_of
from ..views.axes import save
from ..views.study import sweep_figure
from .measure import measure, measurements_of
from .protocol import Cell
from .sweep_table import Facts, cell_results, format_sweep, rounded, summarize, sweep_document

DONE = ("finished", "diverged")


@dataclass(frozen=True)
class Outcome:
    """A cell and what became of it.

    Attributes:
        facts: its entry in `sweep.json`. `state` is "waiting", "finished", "diverged", which would happen
            again, or "failed", which is tried again; `error` says why a cell did not finish.
        run: of a finished cell whose folder is there.
    """

    cell: Cell
    folder: Path
    facts: Facts
    run: Run | None = None

    @property
    def state(self) -> str:
        return str(self.facts["state"])

    def __str__(self) -> str:
        if self.run:
            return f"{self.cell}: val PPL {self.run.summary['phase2']['val_ppl']:,.1f}"
        return f"{self.cell}: {self.state}: {self.facts.get('error')}"


@stopped_calmly()
def sweep(
    cells: Sequence[Cell],
    root: Path,
    out: Path,
    listener: Listener = lambda _: None,
    hours: float | None = None,
    keep: bool = False,
    tell: Callable[[str], None] = notice,
) -> list[Outcome]:
    """Run and measure every cell that is not done; write `sweep.json`, `sweep.md`, `sweep.png` after each.

    A cell that fails is recorded with its reason, and the others go on. A finished cell is not run again,
    whatever code it ran: its summary names the commit. Unless artefacts are to be kept, its entry in
    `sweep.json` is enough, so that a study goes on from results that were passed on.

    Args:
        root: folder of the run folders.
        out: folder of the results.
        listener: gets every metric of every run, with the cell's name as `run`.
        hours: begin no cell once so much time has passed; None sets no limit.
        keep: keep model, caches and checkpoints of the cells that are run now; else only their results.
        tell: gets a line of text for each cell that is run.

    Raises:
        UserError: before anything is computed, if there are fewer conversations than the largest cell asks
            for, or `sweep.json` is damaged.
    """
    load_conversations(max(cells, key=lambda cell: cell.config.data.samples).config.data, "train")
    began = time.monotonic()
    with only_process(out):
        remove_left_overs(out, deep=False)  # the run folders below may be in use
        outcomes = _found(cells, root, out, keep)
        waiting = [place for place, outcome in enumerate(outcomes) if outcome.state not in DONE]
        for place in progress_bar(waiting, "Cells of the sweep", unit="cell"):
            if hours is not None and time.monotonic() - began >= hours * 3600:
                notice(f"{hours:g} hours are over; the same command goes on with the cells that wait.")
                break
            outcomes[place] = _run(cells[place], outcomes[place].folder, listener, keep)
            tell(f"{place + 1} of {len(cells)}: {outcomes[place]}")
            _write(out, outcomes)
        _write(out, outcomes)
    return outcomes


def sweep_folders(cells: Sequence[Cell], root: Path) -> list[Path]:
    """The run folders of `sweep` with the same arguments."""
    return [run_folder_of(cell.config, root) for cell in cells]


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Format the table for a terminal, and why cells did not finish."""
    return format_sweep(_results(outcomes))


def finished_runs(outcomes: Sequence[Outcome]) -> dict[str, list[Run]]:
    """`{variant: its finished runs}`, of the variants that have one."""
    runs: dict[str, list[Run]] = {}
    for outcome in outcomes:
        if outcome.run:
            runs.setdefault(outcome.cell.variant, []).append(outcome.run)
    return runs


def _found(cells: Sequence[Cell], root: Path, out: Path, keep: bool) -> list[Outcome]:
    """What earlier calls left of each cell."""
    entries, outcomes = _entries(out / "sweep.json"), []
    for cell, folder in zip(cells, sweep_folders(cells, root), strict=True):
        facts = _facts(cell, folder, "waiting")
        entry = entries.get(facts["config"], facts)
        counts = {"finished": not keep, "diverged": folder.is_dir()}  # deleted, it is run again
        if counts.get(entry["state"]):
            facts = {**entry, "variant": cell.variant, "folder": folder.name}
        outcomes.append(_finished(cell, folder) or Outcome(cell, folder, facts))
    return outcomes


def _entries(path: Path) -> dict[str, Facts]:
    """Read the cells of an earlier call, by configuration, each with the n-grams of its sample count.

    Raises:
        UserError: the file is not what a sweep writes; nothing may be written over it.
    """
    try:
        results = read_json(path)
        cells = [{"ngrams": results["ngrams"].get(str(c["samples"]), {}), **c} for c in results["cells"]]
        sweep_document(summarize(results["variants"], cells))  # all that the results are written from
        return {cell["config"]: cell for cell in cells}
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
        raise UserError(
            f"{path} is damaged, or not what a sweep wrote; restore it, or move it away to begin with the "
            "results in the run folders."
        ) from None


def _finished(cell: Cell, folder: Path) -> Outcome | None:
    """Load the finished run of a cell, if it is one; measurements that it lacks are made if they can be."""
    with suppress(UserError):  # whatever is wrong with it: `run` will say so, or do it again
        found = load_run(folder)
        if found.config == cell.config:
            with suppress(UserError):  # its artefacts are dropped
                if not set(measurements_of(cell.config)) <= set(found.summary):
                    found = measure(found)
            return Outcome(cell, folder, _facts(cell, folder, "finished", run=found), found)
    return None


def _run(cell: Cell, folder: Path, listener: Listener, keep: bool) -> Outcome:
    if same := _finished(cell, folder):  # under another name, a moment ago
        return same
    state, error, done = "finished", None, None
    try:
        done = measure(run(cell.config, folder, lambda metric: listener({**metric, "run": str(cell)})))
    except Diverged as problem:
        state, error = "diverged", str(problem)
    except UserError as problem:
        state, error = "failed", str(problem)
    except RuntimeError as problem:  # torch's, of a setting that nobody had tried
        state, error = "failed", f"{type(problem).__name__}: {problem}"
    if state in DONE and not keep:
        held = RunFolder(folder)
        with held.claimed(cell.config):
            held.drop_artefacts()
    return Outcome(cell, folder, _facts(cell, folder, state, error, done), done)


def _facts(cell: Cell, folder: Path, state: str, error: str | None = None, run: Run | None = None) -> Facts:
    """A cell of `sweep.json`."""
    config = cell.config
    facts: Facts = {
        "variant": cell.variant,
        "samples": config.data.samples,
        "seed": config.runtime.seed,
        "folder": folder.name,
        "config": _identity(config),
        "state": state,
    }
    if error:
        facts["error"] = error
    return {**facts, **(rounded(cell_results(run.summary)) if run else {})}


def _identity(config: ExperimentConfig) -> str:
    """Identify a configuration, also after settings were added whose defaults do what was done before."""
    plugins = {hook: replace(PlugIn.of(plugin.name), source="") for hook, plugin in config.plugins.items()}
    plain = ExperimentConfig("", "", plugins=plugins).to_dict()
    defaults = {key: value for key, value in flat(plain) if not key.endswith(".plugin")}
    return digest({key: value for key, value in flat(config.to_dict()) if value != defaults.get(key)})


def _results(outcomes: Sequence[Outcome]) -> Facts:
    """`sweep.json`."""
    variants = {}
    for cell in (outcome.cell for outcome in outcomes):
        changed = changed_settings(cell.config).items()
        settings = {key: value for key, value in changed if key != "runtime.seed"}
        named = {"preset": cell.config.preset, "recipe": cell.config.recipe}
        variants[cell.variant] = {**named, "settings": settings}
    return summarize(variants, [outcome.facts for outcome in outcomes])


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    results = _results(outcomes)
    write_rows_json(out / "sweep.json", results)
    write_text(out / "sweep.md", sweep_document(results))
    if results["rows"]:
        save(sweep_figure(results), out / "sweep.png")
