"""Store equal weights and caches of several runs only once, as one file with several names (hard links)."""

import os
from collections.abc import Mapping
from contextlib import suppress

from ..files import damage, replacing
from .folder import RunFolder


def link_equal_files(folder: RunFolder, stage: str, files: Mapping[str, str]) -> None:
    """Replace a stage's tensor files with hard links to equal files of this run or a neighbouring run.

    A neighbouring run is in the same parent folder. A link is checked before it replaces a file. If the file
    system has no hard links, the files stay as they are. Only tensor files are linked, since they are never
    changed in place: new versions are written under a temporary name and renamed.

    Args:
        files: sizes and checksums of the files that the stage has written, as in a record.
    """
    own = [(folder.path, record) for record in folder.records.values()]
    known = {
        content: path / name
        for path, record in [*folder.sibling_records(stage), *own]
        for name, content in record.files.items()
        if name.endswith(".safetensors") and (path / name).is_file()
    }
    for name, content in files.items():
        if content in known:
            with suppress(OSError), replacing(folder.path / name) as link:
                os.link(known[content], link)
                if reason := damage(link, content):
                    raise OSError(reason)
