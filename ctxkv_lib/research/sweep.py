"""Many experiments side by side: each cell an ordinary run, the results written after every one."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.conversations import load_conversations
from ..errors import DamagedFile, Diverged, UserError
from ..experiments import run, stopped_calmly
from ..files import digest, read_json, write_rows_json, write_text
from ..files import sweep as remove_left_overs
from ..locks import only_process
from ..progress import Listener, notice, progress_bar
from ..runs.config import ExperimentConfig
from ..runs.ownership import changed_settings, flat
from ..runs.run_folder import Run, RunFolder, load_run, run_folder_of
from ..views.axes import save
from ..views.study import sweep_figure
from .protocol import Cell
from .sweep_table import SPLITS, Facts, format_sweep, measured, summarize, sweep_document

DONE = ("finished", "diverged")


@dataclass(frozen=True)
class Outcome:
    """What has become of a cell.

    Attributes:
        state: "waiting", "finished", "diverged", which the same settings would do again, or "failed", which
            is tried again.
        run: of a finished one, if its folder is there.
        error: why another one did not finish.
        recorded: what `sweep.json` has of a finished one whose folder is not there.
    """

    cell: Cell
    folder: Path
    state: str = "waiting"
    run: Run | None = None
    error: str | None = None
    recorded: Facts | None = None


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
    """Run every cell that is not done, and write `sweep.json`, `sweep.md` and `sweep.png` after each.

    A cell that fails is recorded with its reason, and the others go on. One that is finished is not run
    again, whatever has become of the code since: its summary names the commit. Unless its files are to be
    kept, what `sweep.json` says of it is enough, so that a study goes on from results that were passed on.

    Args:
        root: folder of the run folders.
        out: folder of the results.
        listener: gets every metric of every run.
        hours: begin no cell once so much time has passed; None sets no limit.
        keep: leave model, caches and checkpoints of the cells that are run now; else only their results stay.
        tell: gets a line of text for each cell that is run.

    Raises:
        UserError: there are fewer conversations than the largest cell asks for, before anything is computed.
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
            outcomes[place] = _run(outcomes[place], listener, keep)
            tell(f"{place + 1} of {len(cells)}: {_in_words(outcomes[place])}")
            _write(out, outcomes)
        _write(out, outcomes)
    return outcomes


def sweep_folders(cells: Sequence[Cell], root: Path) -> list[Path]:
    """The run folders of `sweep` with the same arguments."""
    return [run_folder_of(cell.config, root) for cell in cells]


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """The table for a terminal, and why cells did not finish."""
    return format_sweep(_results(outcomes))


def _results(outcomes: Sequence[Outcome]) -> Facts:
    """`sweep.json`."""
    variants = {outcome.cell.variant: _variant(outcome.cell.config) for outcome in outcomes}
    results = summarize(variants, [_facts(outcome) for outcome in outcomes])
    return {**results, "rows": _rounded(results["rows"]), "power_laws": _rounded(results["power_laws"])}


def finished_runs(outcomes: Sequence[Outcome]) -> dict[str, list[Run]]:
    """`{variant: its finished runs}`, of the variants that have one."""
    runs: dict[str, list[Run]] = {}
    for outcome in outcomes:
        if outcome.run:
            runs.setdefault(outcome.cell.variant, []).append(outcome.run)
    return runs


def _found(cells: Sequence[Cell], root: Path, out: Path, keep: bool) -> list[Outcome]:
    """What earlier calls have left of each cell."""
    entries: dict[str, Facts] = {}
    with suppress(FileNotFoundError, DamagedFile, LookupError, TypeError, AttributeError):
        left = read_json(out / "sweep.json")
        counted = left.get("yardsticks", {})
        for entry in left["cells"]:
            entries[entry["config"]] = {"yardsticks": counted.get(str(entry["samples"]), {}), **entry}
    outcomes = []
    for cell, folder in zip(cells, sweep_folders(cells, root), strict=True):
        waiting, entry = Outcome(cell, folder), entries.get(_identity(cell.config), {})
        recorded = None if keep else _recorded(waiting, entry)
        outcomes.append(_finished(waiting) or recorded or _diverged(waiting, entry) or waiting)
    return outcomes


def _finished(outcome: Outcome) -> Outcome | None:
    with suppress(UserError):  # whatever is wrong with it: `run` will say so, or do it again
        found = load_run(outcome.folder)
        if found.config == outcome.cell.config:
            return Outcome(outcome.cell, outcome.folder, "finished", found)
    return None


def _recorded(outcome: Outcome, entry: Facts) -> Outcome | None:
    if entry.get("state") != "finished":
        return None
    recorded = {**entry, "variant": outcome.cell.variant, "folder": outcome.folder.name}
    return Outcome(outcome.cell, outcome.folder, "finished", recorded=recorded)


def _diverged(outcome: Outcome, entry: Facts) -> Outcome | None:
    """As recorded, unless its folder was deleted to have it run again."""
    if entry.get("state") != "diverged" or not outcome.folder.is_dir():
        return None
    return Outcome(outcome.cell, outcome.folder, "diverged", None, entry["error"])


def _run(outcome: Outcome, listener: Listener, keep: bool) -> Outcome:
    cell, folder = outcome.cell, outcome.folder
    if same := _finished(outcome):  # under another name, a moment ago
        return same
    try:
        done = run(cell.config, folder, listener)
    except Diverged as error:
        ended = Outcome(cell, folder, "diverged", None, str(error))
    except UserError as error:
        return Outcome(cell, folder, "failed", None, str(error))
    except RuntimeError as error:  # torch's, of a setting that nobody had tried
        return Outcome(cell, folder, "failed", None, f"{type(error).__name__}: {error}")
    else:
        ended = Outcome(cell, folder, "finished", done)
    if not keep:
        held = RunFolder(folder)
        with held.claimed(cell.config):
            held.drop_artefacts()
    return ended


def _in_words(outcome: Outcome) -> str:
    end = f"{outcome.state}: {outcome.error}"
    if outcome.run:
        end = f"val PPL {outcome.run.summary['phase2']['val_ppl']:,.1f}"
    return f"{outcome.cell}: {end}"


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    """The results so far."""
    results = _results(outcomes)
    write_rows_json(out / "sweep.json", results)
    write_text(out / "sweep.md", sweep_document(results))
    if results["rows"]:
        save(sweep_figure(results), out / "sweep.png")


def _variant(config: ExperimentConfig) -> Facts:
    settings = changed_settings(config.to_dict())
    settings.pop("runtime.seed", None)
    return {"preset": config.preset, "recipe": config.recipe, "settings": settings}


def _identity(config: ExperimentConfig) -> str:
    """Stands for a configuration, also after settings were added whose defaults do what was done before."""
    defaults = dict(flat(ExperimentConfig("", "").to_dict()))
    return digest({key: value for key, value in flat(config.to_dict()) if value != defaults[key]})


def _facts(outcome: Outcome) -> Facts:
    """A cell of `sweep.json`."""
    config = outcome.cell.config
    if outcome.recorded:
        return outcome.recorded
    facts: Facts = {
        "variant": outcome.cell.variant,
        "samples": config.data.samples,
        "seed": config.runtime.seed,
        "folder": outcome.folder.name,
        "config": _identity(config),
        "state": outcome.state,
    }
    if outcome.error:
        facts["error"] = outcome.error
    if outcome.run is None:
        return facts
    summary = outcome.run.summary
    phase2, test = summary["phase2"], summary.get("test", {})
    yardsticks = summary.get("yardsticks", {})
    found = {
        "train_tokens": summary["train_tokens"],
        "trained": summary["parameters"]["trainable_phase2"],
        **{name: phase2[name] for name in ("best_epoch", "val_ppl", "val_acc", "train_ppl")},
        **{f"test_{name}": test[name] for name in ("ppl", "acc") if name in test},
        "measured": measured(summary),
        "seconds": summary["phase1"]["seconds"] + sum(epoch["seconds"] for epoch in phase2["epochs"]),
        "yardsticks": {kind: {k: row[k] for k in SPLITS if k in row} for kind, row in yardsticks.items()},
        **{name: summary["provenance"][name] for name in ("precision", "threads")},
        "git_commit": _short(summary["provenance"]["git_commit"]),
    }
    return {**facts, **_rounded(found)}


def _short(commit: str | None) -> str | None:
    """Its first 12 digits, and whether it was changed."""
    return commit and commit[:12] + commit[40:]


def _rounded(value: Any) -> Any:
    """With numbers of six digits, since studies are passed on."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
