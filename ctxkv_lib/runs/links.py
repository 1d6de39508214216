"""Store equal weights and caches of several runs only once, by means of hard links."""

import os
from collections.abc import Mapping
from contextlib import suppress

from ..files import damage, replacing
from .folder import RunFolder


def link_equal_files(folder: RunFolder, stage: str, files: Mapping[str, str]) -> None:
    """Replace a stage's tensor files with hard links to equal files of this run or a neighbouring run.

    A neighbouring run is a run in the same parent folder. The content of a link is checked before the link
    replaces a file. If the file system does not support hard links, all files stay as they are. Only tensor
    files are linked, since they are never changed in place: each new version is written under a temporary
    name and then renamed.

    Args:
        files: size and checksum of each file that the stage has written, by path, as in `Record.files`.
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
