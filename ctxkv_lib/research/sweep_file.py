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
OFTEN_SHARED = ("precision", "threads", "git_commit")  # said once if all entries of a row have the same


def write_sweep(path: Path, results: Results) -> None:
    """Write the results of a sweep, without those that wait, and of rows only what their entries share."""
    entries = [entry for entry in results["cells"] if entry["state"] != "waiting"]
    shared: dict[Any, Entry] = {}
    for entry in entries:
        others = shared.get(_row(entry), entry)
        common = {name: others[name] for name in OFTEN_SHARED if name in others}
        shared[_row(entry)] = {
            name: value for name, value in common.items() if (name, value) in entry.items()
        }
    rows = [
        {**{name: row[name] for name in ("variant", "samples", *OF_ROW)}, **shared[_row(row)]}
        for row in results["rows"]
        if row["seeds"]
    ]
    cells = [
        {k: v for k, v in entry.items() if (k, v) not in FINISHED.items() and k not in shared[_row(entry)]}
        for entry in entries
    ]
    write_rows_json(path, {**results, "cells": cells, "rows": rows})


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
    rows = {_row(row): row for row in stored["rows"]}
    entries = []
    for entry in stored["cells"]:
        row = rows.get(_row(entry), {})
        shared = {name: row[name] for name in (*OF_ROW, *OFTEN_SHARED) if name in row}
        ngrams = stored["ngrams"].get(str(entry["samples"]), {})
        missing = {} if "state" in entry else {k: FINISHED[k] for k in FINISHED if k not in entry}
        entries.append({**shared, "ngrams": ngrams, **entry, **missing})
    return entries


def _row(entry: Entry) -> tuple[str, int]:
    """Name the row of the table that an entry, or a row, is of."""
    return entry["variant"], entry["samples"]


def _complete(stored: dict[str, Any]) -> Results:
    return summarize(stored["variants"], entries_of(stored))
