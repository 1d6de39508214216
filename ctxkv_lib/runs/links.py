"""Equal weights and caches are stored once: a file that several runs have is one file with several names."""

import os
from collections.abc import Mapping
from contextlib import suppress

from ..files import damage, replacing
from .folder import RECORDS, RunFolder
from .records import Record


def link_equal_files(folder: RunFolder, stage: str, files: Mapping[str, str]) -> None:
    """Replace tensor files of a stage by hard links to equal files of this run or of the runs beside it.

    A link is checked before it takes the place of a file. Files stay as they are where the file system has no
    hard links. Only tensor files are linked, since every program writes those beside and renames them.

    Args:
        files: the files that the stage has written, as in a record.
    """
    beside = sorted(folder.path.parent.glob(f"[!.]*/{RECORDS}/{stage}.json"))
    runs = [(file.parents[1], Record.read(file)) for file in beside]
    runs += [(folder.path, record) for record in folder.records.values()]
    known = {
        content: path / name
        for path, record in runs
        if record
        for name, content in record.files.items()
        if name.endswith(".safetensors") and (path / name).is_file()
    }
    for name, content in files.items():
        if content in known:
            with suppress(OSError), replacing(folder.path / name) as link:
                os.link(known[content], link)
                if reason := damage(link, content):
                    raise OSError(reason)
