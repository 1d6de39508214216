"""UltraChat-200k on the Hugging Face Hub: the published rows, read once and kept as Arrow copies."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DamagedFile
from ..files import cache_dir, remove
from ..locks import made_once
from ..progress import progress_bar
from ..runs.config import DataConfig
from .hub import ULTRACHAT_REVISION, ULTRACHAT_SHARDS, HubFile, open_file
from .rows import Rows, Split, asked_rows, keep_rows, kept_rows

if TYPE_CHECKING:
    from pyarrow import Table

# Rows of train_sft, counted over all its shards. The published validation rows are the first 20 of theirs.
# Fixed blocks, so that no setting moves the rows of another split; what is in none of them is for training.
ULTRACHAT_VALIDATION = range(50_000, 50_500)
ULTRACHAT_TEST = range(50_500, 51_000)
ULTRACHAT_CORPUS = range(51_000, 56_000)
ANY_TOTAL = 2**62  # stands for the number of rows as long as no shard was asked


class Group(NamedTuple):
    """One row group of a shard."""

    file: HubFile
    footer: Any  # pyarrow's FileMetaData, which is imported late
    number: int
    rows: range  # of the split


def ultrachat_rows(data: DataConfig, split: Split) -> Rows:
    wanted = _wanted(data, split, ANY_TOTAL)
    return made_once(lambda: _kept(wanted), lambda: _fetch(wanted, data, split))


def _wanted(data: DataConfig, split: Split, total: int) -> list[range]:
    """The rows that `data` asks for, if the shards hold `total` in all."""
    held_back = {"validation": ULTRACHAT_VALIDATION, "test": ULTRACHAT_TEST, "corpus": ULTRACHAT_CORPUS}
    around = [range(ULTRACHAT_VALIDATION.start), range(ULTRACHAT_CORPUS.stop, total)]
    blocks = [held_back[split]] if split in held_back else around
    blocks = [range(block.start, min(block.stop, total)) for block in blocks]
    left = asked_rows(sum(len(block) for block in blocks), data, split, "UltraChat")
    wanted = []
    for block in blocks:
        wanted.append(block[:left])
        left -= len(wanted[-1])
    return [rows for rows in wanted if rows]


def _copies() -> Path:
    return cache_dir() / f"ultrachat-{ULTRACHAT_REVISION[:12]}"


def _kept(wanted: list[range]) -> Rows:
    """Raises as `kept_rows`."""
    return sum((kept_rows(_copies(), rows) for rows in wanted), Rows(()))


def _fetch(wanted: list[range], data: DataConfig, split: Split) -> None:
    """Keep an Arrow copy of each row group that holds wanted rows, if there is none.

    `data.download=ranged` transfers the needed row groups' `messages` only. `whole` is slower (244 MB a
    shard), but leaves complete shards in huggingface_hub's cache.
    """
    groups = _groups(data, wanted[-1].stop)
    _wanted(data, split, groups[-1].rows.stop)  # refuses what is more than there is
    needed = [g for g in groups if any(g.rows.start < w.stop and w.start < g.rows.stop for w in wanted)]
    missing = [group for group in needed if not _is_kept(group.rows)]
    for rows, table in progress_bar(
        _tables(missing, data.download), "UltraChat", unit="group", total=len(missing)
    ):
        keep_rows(_copies(), rows.start, [f"ultrachat:train_sft:{row}" for row in rows], table)


def _groups(data: DataConfig, stop: int) -> list[Group]:
    """The row groups of the first shards, of as many as hold `stop` rows or of all."""
    from pyarrow.parquet import ParquetFile

    groups: list[Group] = []
    start = 0
    for file in ULTRACHAT_SHARDS:
        if start < stop:
            with open_file(file, data.download) as stream:
                footer = ParquetFile(stream).metadata
            for number in range(footer.num_row_groups):
                count = footer.row_group(number).num_rows
                groups.append(Group(file, footer, number, range(start, start + count)))
                start += count
    return groups


def _is_kept(rows: range) -> bool:
    try:
        return len(kept_rows(_copies(), rows)) > 0
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        remove(error.path)
        return False


def _tables(groups: list[Group], download: str) -> Iterator[tuple[range, "Table"]]:
    """The rows of each group, and their `messages`."""
    from pyarrow.parquet import ParquetFile

    for file, of_shard in groupby(groups, key=lambda group: group.file):
        with open_file(file, download) as stream:
            for group in of_shard:
                # pre_buffer: one request a row group, not one a column
                shard = ParquetFile(stream, metadata=group.footer, pre_buffer=True)
                yield group.rows, shard.read_row_group(group.number, columns=["messages"])
