"""Write and read files that are complete and intact, or absent.

Everything is written beside its final name and then renamed. Tensors carry a checksum, verified when read.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from .errors import DamagedFile, UserError

if TYPE_CHECKING:
    from torch import Tensor

CACHE_VARIABLE = "CTXKV_CACHE"
CHECKSUM = "checksum"
NO_CHECKSUM = "0" * 32  # in the place of a checksum while it is computed
TEMPORARY = re.compile(r"\..*\.\d+\.part")  # names that `replacing` writes to
DIGITS = 16  # of a digest
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
ENTRY_BYTES = 2**9  # of a header, reserved for each tensor before its name and size are known, in blanks
# Names of torch's number types in safetensors files.
KINDS = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL"}
KINDS |= {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "complex64": "C64"}
KINDS |= {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def expanded(path: Path | str) -> Path:
    """Return a path whose `~` is the user's home; as it is where there is none (`Path.expanduser` raises)."""
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise UserError(f"{kind} is no path; name a folder or a file as text (a Run has it as `path`).")
    return Path(os.path.expanduser(path))


def cache_dir() -> Path:
    """Return the folder of downloads and tables that runs share: `$CTXKV_CACHE`, or `~/.cache/ctxkv`."""
    path = expanded(os.environ.get(CACHE_VARIABLE) or "~/.cache/ctxkv")
    if path.parts[0][0] == "~":
        raise UserError(f"There is no home folder for {path}; set ${CACHE_VARIABLE} to a folder.")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a file or folder, which is renamed to `path` if the block succeeds.

    It is synced to the disk before it is renamed. `sweep` removes leftovers of killed processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    replaced = path.with_name(f".{path.name}.old.{os.getpid()}.part")
    remove(beside)  # of a killed process with the same number
    beside.touch()
    mode = beside.stat().st_mode  # as of any other new file here
    beside.unlink()
    try:
        yield beside
        for each in [beside, *beside.rglob("*")] if beside.is_dir() else [beside]:
            if each.is_file() and not each.is_symlink():
                with suppress(OSError):  # not every file system has permissions
                    each.chmod(mode)  # since safetensors gives its files to their owner alone
            _sync(each)
        if path.is_dir():  # only a file can be replaced by a rename
            os.replace(path, replaced)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        remove(beside)
        remove(replaced)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_file():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    elif os.name == "posix":  # Windows cannot sync folders, and need not
        descriptor = os.open(path, os.O_RDONLY)
        with suppress(OSError):  # not every network file system can
            os.fsync(descriptor)
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists; of a link to a folder, the link only."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def sweep(folder: Path, deep: bool = True) -> None:
    """Remove leftovers of killed processes in `folder`, and below if `deep`; not while others write."""
    for path in list(folder.rglob(".*") if deep else folder.glob(".*")):
        if TEMPORARY.fullmatch(path.name):
            remove(path)


@contextmanager
def rust_writes(path: Path) -> Iterator[None]:
    """Turn system errors from safetensors or tokenizers, such as a full disk, into OSError."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        if "(os error " not in str(error):  # how Rust ends every message of the system's
            raise
        raise OSError(f"{path} could not be written: {error}") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DamagedFile: it is not JSON.
        FileNotFoundError: there is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        raise DamagedFile(path, "it is not JSON") from None


def write_sealed_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object with its own checksum in it."""
    write_json(path, {CHECKSUM: digest(values), **values})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote; raises as `read_json`, also if the checksum differs."""
    values = read_json(path)
    if not isinstance(values, dict) or CHECKSUM not in values:
        raise DamagedFile(path, "it has no checksum")
    if values.pop(CHECKSUM) != digest(values):
        raise DamagedFile(path, "its checksum differs")
    return values


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that change when the JSON form of `value` does."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:DIGITS]


def digest_of_lists(head: Any, *lists: Iterable[Any]) -> str:
    """Return `digest([head, *lists])`, reading the lists item by item."""
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
    """Return XXH3 of a file's bytes, 32 hexadecimal digits. It finds damage, not forgery."""
    with path.open("rb") as file:
        return _checksum(file)


def _checksum(file: BufferedIOBase, start: bytes = b"") -> str:
    """Return XXH3 of `start` and the rest of a file, read in chunks to save memory."""
    return hashlib.file_digest(file, lambda: xxh3_128(start)).hexdigest()


def content_digest(path: str) -> str:
    """Return the checksum of a file, read once while it does not change; its path if there is none."""
    file = expanded(path)
    if not file.is_file():
        return path
    found = file.stat()
    return _content(file, found.st_mtime_ns, found.st_size)


@functools.cache
def _content(file: Path, *_: int) -> str:
    return checksum(file)


def checksums(folder: Path, parts: Iterable[Path]) -> dict[str, str]:
    """Return the checksum of every file that is, or is below, one of `parts`, by its path in `folder`."""
    files = [file for part in parts for file in (part.rglob("*") if part.is_dir() else [part])]
    return {file.relative_to(folder).as_posix(): checksum(file) for file in sorted(files) if file.is_file()}


def state(file: Path, expected: str) -> str:
    """Return `intact`, `missing`, or `damaged`: not the file of that checksum."""
    if not file.is_file():
        return "missing"
    return "intact" if checksum(file) == expected else "damaged"


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors and strings as one safetensors file with a checksum inside."""
    from safetensors.torch import save_file

    contiguous, places = {}, set()
    for name, tensor in tensors.items():
        row = tensor.detach().contiguous()
        place = row.untyped_storage().data_ptr()
        contiguous[name] = row.clone() if place in places else row  # of tied weights, each has its own copy
        places.add(place)
    with replacing(path) as beside:
        with rust_writes(path):
            save_file(contiguous, beside, metadata={**(metadata or {}), CHECKSUM: NO_CHECKSUM})
        _seal(beside)


def write_streamed(
    path: Path, chunks: Iterable[tuple[str, "Tensor"]], metadata: dict[str, str], most: int = 8
) -> None:
    """Write the file that `write_tensors` would, with one chunk of a tensor at a time in memory.

    Args:
        chunks: the name of a tensor and its next rows (or all of it), those of a tensor one after another.
            Each must begin at a multiple of its numbers' size: small numbers come last, or are filled up.
        most: how many tensors, at most.
    """
    from torch import uint8

    header: dict[str, Any] = {"__metadata__": {CHECKSUM: NO_CHECKSUM, **metadata}}
    header_bytes, end = len(json.dumps(header)) // 8 * 8 + (most + 1) * ENTRY_BYTES, 0
    with replacing(path) as beside:
        with beside.open("wb") as file:
            file.write(header_bytes.to_bytes(8, "little") + bytes(header_bytes))
            for name, chunk in chunks:
                rows = chunk.detach().cpu().contiguous()
                begin, end = end, end + file.write(rows.flatten().view(uint8).numpy().data)
                if name in header:
                    header[name]["shape"][0] += len(rows)
                    header[name]["data_offsets"][1] = end
                else:
                    kind = KINDS[str(rows.dtype).removeprefix("torch.")]
                    header[name] = {"dtype": kind, "shape": [*rows.shape], "data_offsets": [begin, end]}
            text = json.dumps(header, separators=(",", ":")).encode().ljust(header_bytes)
            assert len(text) == header_bytes
            file.seek(8)
            file.write(text)
        _seal(beside)


def read_tensors(path: Path, key: str | None = None) -> dict[str, Any]:
    """Read the tensors of a file that `write_tensors` made, on the CPU and mapped from it.

    Args:
        key: what the file's metadata must hold as `key`; None takes any.

    Raises:
        DamagedFile: it is damaged, has no checksum, or another key.
        FileNotFoundError: there is none.
    """
    from safetensors.torch import load_file

    found = tensor_metadata(path).get("key")
    if key is not None and found != key:
        raise DamagedFile(path, "it was made from something else")
    return load_file(path)


def tensor_metadata(path: Path) -> dict[str, str]:
    """Read the strings that `write_tensors` put beside the tensors; raises as `read_tensors`."""
    with path.open("rb") as file:
        start, stored, _ = _header(file, path)
        if _checksum(file, start) != stored:
            raise DamagedFile(path, "its checksum differs")
    metadata = json.loads(start[8:])["__metadata__"]
    return {name: text for name, text in metadata.items() if name != CHECKSUM}


def _seal(path: Path) -> None:
    """Put the checksum of a safetensors file, computed with zeros in its place, into the header."""
    with path.open("r+b") as file:
        start, _, place = _header(file, path)
        sealed = _checksum(file, start)
        file.seek(place)
        file.write(sealed.encode())


def _header(file: BufferedIOBase, path: Path) -> tuple[bytes, str, int]:
    """Read the header of a safetensors file: with zeros for its checksum, that checksum, and its place.

    The format: 8 bytes, the little-endian length of a JSON header; the header; the tensors.
    """
    size = file.read(8)
    header = file.read(min(int.from_bytes(size, "little"), MOST_HEADER_BYTES))
    before, mark, rest = header.partition(f'"{CHECKSUM}":"'.encode())
    if not mark:
        raise DamagedFile(path, "it has no checksum")
    stored, after = rest[: len(NO_CHECKSUM)], rest[len(NO_CHECKSUM) :]
    place = len(size) + len(before) + len(mark)
    return size + before + mark + NO_CHECKSUM.encode() + after, stored.decode(errors="replace"), place
