"""`sweep.json`: it has each result once; what follows from them is computed when it is read."""

import json
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from ..errors import UserError
from ..files import read_json, write_rows_json
from .sweep_table import OF_ROW, Entry, Results, summarize

RAW_FILES = "https://raw.githubusercontent.com"
DOWNLOAD_SECONDS = 20  # without an answer, at most
FINISHED: Entry = {"state": "finished", "measured": {}}  # of an entry whose state the file does not say
SHARED = ("variant", "samples", "precision", "threads", "git_commit")  # said once where all have the same


def write_sweep(path: Path, results: Results) -> None:
    """Write the results of a sweep, without those that wait: a row has what its entries share, and these."""
    of_rows = {_row(row): {name: row[name] for name in OF_ROW} for row in results["rows"] if row["seeds"]}
    grouped: dict[Any, list[Entry]] = {}
    for entry in results["cells"]:
        if entry["state"] != "waiting":
            grouped.setdefault(_row(entry), []).append(entry)
    rows = []
    for row, entries in grouped.items():
        pairs = [(name, entries[0][name]) for name in SHARED if name in entries[0]]
        shared = dict(pair for pair in pairs if all(pair in entry.items() for entry in entries))
        given = {**FINISHED, **shared}.items()
        own = [{k: v for k, v in entry.items() if (k, v) not in given} for entry in entries]
        rows.append({**shared, **of_rows.get(row, {}), "cells": own})
    write_rows_json(path, {"variants": results["variants"], "ngrams": results["ngrams"], "rows": rows})


def read_sweep(path: Path) -> Results:
    """Read the results of a sweep, all but the grid points that wait.

    Raises:
        DamagedFile: it is not JSON.
        FileNotFoundError: there is none.
    """
    return _complete(read_json(path))


def study_results(part: str, repository: str, version: str) -> Results:
    """Read a part of the study from the clone that a notebook runs in, or else from GitHub.

    Args:
        part: name of a protocol in `notebooks/study`, such as "answer".
        repository: `owner/name` on GitHub.
        version: tag of the repository, such as "v0.1.0".

    Returns:
        its results, as `sweep` returns them, without the grid points that wait.

    Raises:
        UserError: the file is in neither place.
    """
    path = Path("study", "results", part, "sweep.json")
    if path.is_file():
        return read_sweep(path)
    url = f"{RAW_FILES}/{repository}/{version}/notebooks/{path.as_posix()}"
    try:
        with urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:
            return _complete(json.load(answer))
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"The study's results are not in this folder, and {url} could not be read ({error}); check the "
            "network connection, or open the notebook in a clone of the repository."
        ) from error


def entries_of(stored: dict[str, Any]) -> list[Entry]:
    """Give each stored entry what its row and its sample count have."""
    entries = []
    for row in stored["rows"]:
        shared = {name: row[name] for name in (*SHARED, *OF_ROW) if name in row}
        for entry in ({**shared, **own} for own in row["cells"]):
            missing = {} if "state" in entry else {k: FINISHED[k] for k in FINISHED if k not in entry}
            entries.append({**entry, **missing, "ngrams": stored["ngrams"].get(str(entry["samples"]), {})})
    return entries


def _row(entry: Entry) -> tuple[str, int]:
    """Name the row of the table that an entry, or a row, is of."""
    return entry["variant"], entry["samples"]


def _complete(stored: dict[str, Any]) -> Results:
    return summarize(stored["variants"], entries_of(stored))
