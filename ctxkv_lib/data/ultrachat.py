"""UltraChat-200k on the Hugging Face Hub: the published rows, read once and kept in the shared cache."""

from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

from ..files import cache_dir, sweep
from ..locks import made_once
from ..progress import progress_bar
from .hub import ULTRACHAT_REVISION, ULTRACHAT_SHARDS, HubFile, open_file
from .rows import Rows, Split, keep_rows, kept_rows, rows_asked
from .settings import DataConfig

# Rows of train_sft, counted over all its shards. The published validation rows are the first 20 of theirs.
# Fixed blocks, so that no setting moves the rows of another split.
SPLITS = {
    "train": (range(50_000), range(56_000, 207_865)),
    "validation": (range(50_000, 50_500),),
    "test": (range(50_500, 51_000),),
    "corpus": (range(51_000, 56_000),),
}


def ultrachat_rows(data: DataConfig, split: Split) -> Rows:
    """Read the first rows of a split; a UserError if it has fewer, or the Hub cannot be reached."""
    wanted = row_numbers(data, split)
    return made_once(lambda: _kept(wanted), lambda: _fetch(wanted))


def row_numbers(data: DataConfig, split: Split) -> list[range]:
    """Find the first rows of a split; raises a UserError if it has fewer."""
    wanted, missing = [], rows_asked(data, split, sum(map(len, SPLITS[split])), "UltraChat")
    for block in SPLITS[split]:
        wanted.append(block[:missing])
        missing -= len(wanted[-1])
    return [rows for rows in wanted if rows]


def _copy_of(group: range) -> tuple[Path, str]:
    """Return folder and key of the copy of one row group of a shard."""
    name = f"rows-{group.start}-{group.stop}"
    return cache_dir() / f"ultrachat-{ULTRACHAT_REVISION[:12]}" / name, name


def _common(group: range, block: range) -> range:
    return range(max(group.start, block.start), min(group.stop, block.stop))


def _kept(wanted: list[range]) -> Rows:
    """Open the copies of row groups with wanted rows; raises as `kept_rows`."""
    copies = _copy_of(range(0))[0].parent
    groups = (range(*map(int, path.name.split("-")[1:])) for path in copies.glob("rows-*"))
    rows = Rows()
    for group in sorted(groups, key=lambda group: group.start):
        for part in (_common(group, block) for block in wanted):
            if part:
                rows += kept_rows(*_copy_of(group))[part.start - group.start : part.stop - group.start]
    if len(rows) < sum(map(len, wanted)):
        raise FileNotFoundError(copies)
    return rows


def _fetch(wanted: list[range]) -> None:
    """Copy each missing row group with wanted rows, shard by shard."""
    sweep(_copy_of(range(0))[0].parent)
    start = 0
    for file in ULTRACHAT_SHARDS:
        if start < wanted[-1].stop:
            start = _fetch_shard(file, start, wanted)


def _fetch_shard(file: HubFile, start: int, wanted: list[range]) -> int:
    """Download the footer and missing row groups' `messages`; returns the first row of the next shard."""
    from pyarrow.parquet import ParquetFile

    with open_file(file) as stream:
        shard = ParquetFile(stream, pre_buffer=True)  # one request a row group, not one a column
        sizes = [shard.metadata.row_group(number).num_rows for number in range(shard.num_row_groups)]
        groups = enumerate(range(*ends) for ends in pairwise(accumulate(sizes, initial=start)))
        needed = [(n, group) for n, group in groups if any(_common(group, rows) for rows in wanted)]

        def transfer(number: int, group: range) -> None:
            messages = shard.read_row_group(number, columns=["messages"])["messages"].to_pylist()
            names = (f"ultrachat:train_sft:{row}" for row in group)
            keep_rows(*_copy_of(group), zip(names, messages, strict=True))

        for number, group in progress_bar(needed, "UltraChat", unit="group"):
            made_once(partial(kept_rows, *_copy_of(group)), partial(transfer, number, group))
    return start + sum(sizes)
