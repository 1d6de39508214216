"""Read UltraChat-200k from the Hugging Face Hub, with the same rows as the published experiment."""

from collections.abc import Iterator
from itertools import chain, islice

from ..errors import UserError
from .hub import ULTRACHAT, download
from .texts import text_of

# Shards of the Hub's split train_sft. Each shard has 69,000 rows and 240 MB.
# The first shard has all rows for validation, test and corpus, and 63,000 rows for training.
SHARDS = (
    "data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
    "data/train_sft-00001-of-00003-0a1804bcb6ae68c6.parquet",
    "data/train_sft-00002-of-00003-ee46ed25cfae92c6.parquet",
)
# Row numbers of each split, counted over all shards. The size of one split does not change the others.
# The published experiment validated on the first 20 rows of `validation`.
SPLITS = {
    "train": (range(50_000), range(56_000, 207_865)),
    "validation": (range(50_000, 50_500),),
    "test": (range(50_500, 51_000),),
    "corpus": (range(51_000, 56_000),),
}


def available(split: str) -> int:
    """Return the number of conversations in a split."""
    return sum(map(len, SPLITS[split]))


def row_numbers(split: str, count: int) -> list[int]:
    """Return the row numbers of the first `count` conversations in a split."""
    return [*islice(chain(*SPLITS[split]), count)]


def read(split: str, count: int) -> list[str]:
    """Read the first `count` conversations of a split. Raises UserError if the Hub cannot be reached."""
    wanted = {*row_numbers(split, count)}
    # `islice` stops after the last wanted row, so later shards are not downloaded.
    return [*islice(_texts(wanted), count)]


def _texts(wanted: set[int]) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    # `start` is the row number at which the next row group starts.
    start = 0
    for shard in SHARDS:
        path = download(ULTRACHAT, shard, "dataset")
        try:
            with ParquetFile(path) as parquet:
                for number in range(parquet.num_row_groups):
                    rows = range(start, start := start + parquet.metadata.row_group(number).num_rows)
                    if places := [row - rows.start for row in rows if row in wanted]:
                        group = parquet.read_row_group(number, columns=["messages"])
                        yield from (text_of(shard, record) for record in group.take(places).to_pylist())
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run again.") from error
