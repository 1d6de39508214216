"""Files that are complete and intact, or absent.

Everything is written beside its final name and then renamed; tensors carry a checksum, verified when read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from xxhash import xxh3_128

from .errors import DamagedFile

if TYPE_CHECKING:
    from torch import Tensor

CACHE_VARIABLE = "CTXKV_CACHE"
CHECKSUM = "checksum"
UNSEALED = "0" * 32  # in the place of a checksum while it is taken
LEFT_OVER = re.compile(r"\..*\.\d+\.part")  # what `replacing` writes to
DIGITS = 16  # of a digest
PIECE_BYTES = 1 << 20
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Numbers in safetensors' words.
KINDS = {"uint8": "U8", "uint16": "U16", "int64": "I64", "bfloat16": "BF16", "float32": "F32"}
NAMES_BYTES = 2**14  # set aside in a header before names and sizes are known; the format allows blanks


def cache_dir() -> Path:
    """Folder for downloads and tables shared between runs: `$CTXKV_CACHE`, or `~/.cache/ctxkv`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "ctxkv")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a file or folder, which takes its place only if the block succeeds.

    It is on the disk before it takes the place; what a killed process leaves beside, `sweep` removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    replaced = path.with_name(f".{path.name}.old.{os.getpid()}.part")
    remove(beside)  # of a killed process with the same number
    try:
        yield beside
        _flush(beside)
        if path.is_dir():  # only a file can take another's place
            os.replace(path, replaced)
        os.replace(beside, path)
        _flush_names(path.parent)
    finally:
        remove(beside)
        remove(replaced)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; of a link to one, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bring a file, or a folder and what is in it, to the disk."""
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if each.is_dir():
            _flush_names(each)
        else:
            with each.open("r+b") as file:
                os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot, and needs not
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def rust_writes(path: Path) -> Iterator[None]:
    """Inside, safetensors or tokenizers writes: a full disk is an OSError, not an error of their own."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        if "(os error " not in str(error):  # how Rust ends every message of the system's
            raise
        raise OSError(f"{path} could not be written: {error}") from error


def sweep(folder: Path, deep: bool = True) -> None:
    """Remove what killed processes left in `folder`, and below if `deep`; only while no other writes."""
    for path in list(folder.rglob(".*") if deep else folder.glob(".*")):
        if LEFT_OVER.fullmatch(path.name):
            remove(path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows_json(path: Path, value: dict[str, Any]) -> None:
    """As `write_json`, with a line for each member of a member: the shortest for tables of small rows."""
    write_text(path, _lines(value, _rows) + "\n")


def _rows(value: Any) -> str:
    return _lines(value, _json) if isinstance(value, dict | list) else _json(value)


def _lines(value: dict[str, Any] | list[Any], as_json: Callable[[Any], str]) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(as_json, value)) + "\n]"
    return "{\n" + ",\n".join(f"{_json(key)}: {as_json(each)}" for key, each in value.items()) + "\n}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises DamagedFile if there is none in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        raise DamagedFile(path, "it is not JSON") from None


def write_sealed_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object with its own checksum in it."""
    write_json(path, {CHECKSUM: digest(values), **values})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote.

    Raises:
        DamagedFile: it is something else.
        FileNotFoundError: there is none.
    """
    values = read_json(path)
    if not isinstance(values, dict) or CHECKSUM not in values:
        raise DamagedFile(path, "it has no checksum")
    if values.pop(CHECKSUM) != digest(values):
        raise DamagedFile(path, "its checksum differs")
    return values


def digest(value: Any) -> str:
    """16 hexadecimal digits that change when the JSON form of `value` does."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:DIGITS]


def digest_of_lists(head: Any, *lists: Iterable[Any]) -> str:
    """`digest([head, *lists])` of lists that need not be in memory: their items are made as they are read."""
    hasher = hashlib.sha256(f"[{_canonical(head)}".encode())
    for each in lists:
        hasher.update(b", [")
        for number, item in enumerate(each):
            hasher.update(f"{', ' if number else ''}{_canonical(item)}".encode())
        hasher.update(b"]")
    hasher.update(b"]")
    return hasher.hexdigest()[:DIGITS]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def checksum(path: Path) -> str:
    """XXH3 of a file's bytes, 32 hexadecimal digits. It finds damage, not forgery."""
    with path.open("rb") as file:
        return _hashed(file, xxh3_128())


def _hashed(file: IO[bytes], hasher: xxh3_128) -> str:
    """Hash of what is left of a file, read in pieces: mapping it would fill the memory."""
    while piece := file.read(PIECE_BYTES):
        hasher.update(piece)
    return hasher.hexdigest()


def checksums(folder: Path, parts: Iterable[Path]) -> dict[str, str]:
    """Checksum of every file that is, or is below, one of `parts`, by its path in `folder`."""
    files = [file for part in parts for file in (part.rglob("*") if part.is_dir() else [part])]
    return {file.relative_to(folder).as_posix(): checksum(file) for file in sorted(files) if file.is_file()}


def state(file: Path, expected: str) -> str:
    """`intact`, `missing`, or `damaged`: not the file of that checksum."""
    if not file.is_file():
        return "missing"
    return "intact" if checksum(file) == expected else "damaged"


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, and strings beside them, as one safetensors file with a checksum inside."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        with rust_writes(path):
            save_file(contiguous, beside, metadata={**(metadata or {}), CHECKSUM: UNSEALED})
        _seal(beside)


def write_streamed(path: Path, pieces: Iterable[tuple[str, "Tensor"]], metadata: dict[str, str]) -> None:
    """`write_tensors` for tensors that come in pieces, of which one at a time is in memory.

    Args:
        pieces: the name of a tensor and its next rows (or all of it), those of a tensor one after another.
            Each must begin at a multiple of its numbers' size: small numbers come last, or are filled up.
    """
    from torch import uint8

    header: dict[str, Any] = {"__metadata__": {CHECKSUM: UNSEALED, **metadata}}
    room, end = len(json.dumps(header)) // 8 * 8 + NAMES_BYTES, 0
    with replacing(path) as beside:
        with beside.open("wb") as file:
            file.write(bytes(8 + room))
            for name, piece in pieces:
                rows = piece.detach().cpu().contiguous()
                begin, end = end, end + file.write(rows.flatten().view(uint8).numpy().data)
                if name in header:
                    header[name]["shape"][0] += len(rows)
                    header[name]["data_offsets"][1] = end
                else:
                    kind = KINDS[str(rows.dtype).removeprefix("torch.")]
                    header[name] = {"dtype": kind, "shape": [*rows.shape], "data_offsets": [begin, end]}
            text = json.dumps(header, separators=(",", ":")).encode().ljust(room)
            assert len(text) == room
            file.seek(0)
            file.write(room.to_bytes(8, "little") + text)
        _seal(beside)


def read_tensors(path: Path, key: str | None = None) -> dict[str, Any]:
    """Tensors of a file that `write_tensors` made, on the CPU and mapped from it.

    Args:
        key: what the strings beside the tensors must hold as `key`; None takes any.

    Raises:
        DamagedFile: it is not what was written, has no checksum, or another key.
        FileNotFoundError: there is none.
    """
    from safetensors.torch import load_file

    found = tensor_metadata(path).get("key")
    if key is not None and found != key:
        raise DamagedFile(path, "it was made from something else")
    return load_file(path)


def tensor_metadata(path: Path) -> dict[str, str]:
    """The strings that `write_tensors` put beside the tensors; raises as `read_tensors`."""
    from safetensors import safe_open

    with path.open("rb") as file:
        start, stored, _ = _header(file, path)
        if _hashed(file, xxh3_128(start)) != stored:
            raise DamagedFile(path, "its checksum differs")
    with safe_open(path, framework="pt") as tensors:
        return {name: text for name, text in tensors.metadata().items() if name != CHECKSUM}


def _seal(path: Path) -> None:
    """Put the checksum of a safetensors file, taken with zeros in its place, into the header."""
    with path.open("r+b") as file:
        start, _, place = _header(file, path)
        sealed = _hashed(file, xxh3_128(start))
        file.seek(place)
        file.write(sealed.encode())


def _header(file: IO[bytes], path: Path) -> tuple[bytes, str, int]:
    """Header of a safetensors file with zeros for its checksum, that checksum, and where it stands.

    The format: 8 bytes, the little-endian length of a JSON header; the header; the tensors.
    """
    size = file.read(8)
    header = file.read(min(int.from_bytes(size, "little"), MOST_HEADER_BYTES))
    before, mark, rest = header.partition(f'"{CHECKSUM}":"'.encode())
    if not mark:
        raise DamagedFile(path, "it has no checksum")
    stored, after = rest[: len(UNSEALED)], rest[len(UNSEALED) :]
    place = len(size) + len(before) + len(mark)
    return size + before + mark + UNSEALED.encode() + after, stored.decode(errors="replace"), place
