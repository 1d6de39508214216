"""UltraChat-200k on the Hugging Face Hub: the published rows, read once and kept as an Arrow copy."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataConfig
from ..errors import DamagedFile
from ..files import cache_dir, checksums, read_sealed_json, replacing, state, write_sealed_json
from ..locks import made_once
from .hub import ULTRACHAT_SHARD, open_file
from .rows import Row, Split, first_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

# Rows of the shard. The published validation rows are the first 20 of theirs; the rest is room for more.
ULTRACHAT_VALIDATION = range(50_000, 50_500)
ULTRACHAT_TEST = range(50_500, 51_000)
CHECKSUMS = "checksums.json"  # of the files of an Arrow copy, beside them


def ultrachat_rows(data: DataConfig, split: Split) -> list[Row]:
    if split == "corpus":  # up to the end of the shard, which only the shard knows
        rows = range(ULTRACHAT_TEST.stop, ULTRACHAT_TEST.stop + data.corpus_samples)
    else:
        held_back = {"validation": ULTRACHAT_VALIDATION, "test": ULTRACHAT_TEST}
        available = held_back.get(split, range(ULTRACHAT_VALIDATION.start))
        rows = first_rows(available, data, split, "UltraChat")
    copy, start = made_once(lambda: _local_copy(rows), lambda: _fetch_copy(rows, data, split))
    contents = copy[rows.start - start : rows.stop - start]["messages"]
    return [(f"ultrachat:train_sft:{row}", content) for row, content in zip(rows, contents, strict=True)]


def _copies() -> Path:
    return cache_dir() / f"ultrachat-{ULTRACHAT_SHARD.revision[:12]}"


def _local_copy(rows: range) -> "tuple[Dataset, int]":
    """An intact Arrow copy that holds `rows`, and the row it starts at.

    Raises:
        DamagedFile: a copy holds them, but is not what was written.
        FileNotFoundError: no earlier run left one.
    """
    problem: Exception = FileNotFoundError(_copies())
    for folder in sorted(_copies().glob("rows-*")):
        _, start, stop = folder.name.split("-")
        if int(start) <= rows.start and rows.stop <= int(stop):
            try:
                return _open_copy(folder), int(start)
            except DamagedFile as error:
                problem = error
    raise problem


def _open_copy(folder: Path) -> "Dataset":
    from datasets import load_from_disk

    try:
        kept = read_sealed_json(folder / CHECKSUMS)
    except (DamagedFile, FileNotFoundError):
        raise DamagedFile(folder, "its checksums are missing or damaged") from None
    for name, expected in kept["files"].items():
        if kept["rows"] != folder.name or state(folder / name, expected) != "intact":
            raise DamagedFile(folder, f"{name} is not what was written")
    return load_from_disk(str(folder))


def _fetch_copy(rows: range, data: DataConfig, split: Split) -> None:
    """Read the row groups that hold `rows` and keep them as an Arrow copy.

    `data.download=ranged` transfers the needed row groups' `messages` only. `whole` is slower (244 MB), but
    leaves the complete shard in huggingface_hub's cache.
    """
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    with open_file(ULTRACHAT_SHARD, data.download) as stream:
        shard = ParquetFile(stream, pre_buffer=True)  # one request a row group, not one a column
        total = shard.metadata.num_rows
        if rows.stop > total:
            first_rows(range(ULTRACHAT_TEST.stop, total), data, split, "UltraChat's first shard")
        table, start = _read_groups(shard, rows)
    copy = Dataset(table)
    name = f"rows-{start}-{start + len(copy)}"
    with replacing(_copies() / name) as beside:
        copy.save_to_disk(str(beside))
        kept = {"rows": name, "files": checksums(beside, [beside])}
        write_sealed_json(beside / CHECKSUMS, kept)


def _read_groups(shard: "ParquetFile", rows: range) -> tuple[Any, int]:
    """The `messages` of the row groups that overlap `rows` as a pyarrow Table, and the table's first row."""
    import pyarrow
    from tqdm import tqdm

    sizes = [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    wanted = [i for i, at in enumerate(starts) if at < rows.stop and at + sizes[i] > rows.start]
    progress = tqdm(wanted, desc="UltraChat", unit="group", disable=None)
    tables = [shard.read_row_group(i, columns=["messages"]) for i in progress]
    # The schema's metadata is the Hub's description of all columns, of which this is one.
    return pyarrow.concat_tables(tables).replace_schema_metadata(None), starts[wanted[0]]
