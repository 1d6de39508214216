"""Write files atomically: each file is written under a temporary name, synced to disk and renamed.

Tensors are stored in safetensors files, everything else as JSON or text. This module also computes digests of
values, files and code.
"""

import ast
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from .errors import DamagedFile, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGE = Path(__file__).parent
MIB = 2**20
DTYPE_NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.int32": "I32"}  # safetensors names
# A tensor to write: its dtype, its shape, and an iterable that yields its rows, some at a time.
TensorParts = tuple["torch.dtype", Sequence[int], Iterable["Tensor"]]


def expanded(path: Path | str) -> Path:
    """Return a path with `~` replaced by the home folder. Raises UserError if `path` has the wrong type."""
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise UserError(
            f"{kind} is not a path; give a folder or a file as text. A Run's folder is `run.path`."
        )
    return Path(os.path.expanduser(path))


def mib(num_bytes: float) -> float:
    """Convert bytes to MiB, rounded to two decimals."""
    return round(num_bytes / MIB, 2)


def runs_root() -> Path:
    """Return the folder that contains all run folders.

    `$CTXKV_RUNS` names the folder if it is set. Otherwise, the folder is `runs` in the current folder or, if
    this is a subfolder of a clone such as `notebooks`, `runs` in the clone's top folder.
    """
    top = Path.cwd().parent
    is_in_clone = (top / "ctxkv_lib" / "__init__.py").is_file()
    return expanded(os.environ.get("CTXKV_RUNS") or (top / "runs" if is_in_clone else "runs"))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if the block succeeds.

    The block writes a file or a folder to the temporary path. Its name is random, since processes in other
    containers or on other hosts may write the same file in a shared folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary_path
        for written in [temporary_path, *temporary_path.rglob("*")]:
            is_file = written.is_file() and not written.is_symlink()
            if is_file:
                # safetensors makes its files readable for the owner only. Some file systems refuse chmod.
                with suppress(PermissionError):
                    written.chmod(0o644)
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
        if path.is_dir():  # a rename cannot replace a folder; for a moment, there is none
            remove(path)
        os.replace(temporary_path, path)
    finally:
        remove(temporary_path)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists. If `path` is a link, only the link itself is deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete the temporary files and folders that a killed process has left. The caller holds the lock."""
    for leftover in [*folder.glob(pattern)]:
        remove(leftover)


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, except hidden files and files in hidden folders."""
    for path in folder.rglob("*"):
        if "/." not in f"/{path.relative_to(folder).as_posix()}" and path.is_file():
            yield path


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary_path:
        temporary_path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DamagedFile if the content is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        raise DamagedFile(path, "it is not JSON") from None


def digest(value: Any) -> str:
    """Return a digest of the JSON form of `value`, as 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


@cache
def source_digest(*modules: str) -> str:
    """Return a digest of modules of this package, such as `runs.contexts`, and their imports from `method`.

    Imports may be relative or absolute. The digest ignores docstrings, comments and layout.
    """
    sources: dict[str, str] = {}
    unread = [*modules]
    while unread:
        module = unread.pop()
        if module in sources:
            continue
        tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
            if isinstance(node, ast.ImportFrom) and node.module:
                folder = module.split(".")[: -node.level] if node.level else []
                name = ".".join([*folder, node.module.removeprefix(f"{PACKAGE.name}.")])
                unread += [name] * name.startswith("method.")
        sources[module] = ast.unparse(tree)
    return digest(sources)


def checksum(path: Path) -> str:
    """Return the XXH3 checksum of a file, as 32 hexadecimal digits. It detects damage but not forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


def checksums(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """Return the size and checksum of each file in the given parts of a folder.

    A part is a file, or a folder with all files below it. Parts and the names in the result are paths
    relative to `folder`.
    """
    paths = [path for part in parts for path in (folder / part, *(folder / part).rglob("*"))]
    files = sorted(path for path in paths if path.is_file())
    return {file.relative_to(folder).as_posix(): f"{file.stat().st_size} {checksum(file)}" for file in files}


def damage(file: Path, known: str, only_size: bool = False) -> str:
    """Describe what is wrong with a file, or return an empty string if it is intact.

    `known` is the file's entry in the result of `checksums`. With `only_size`, the checksum is not computed.
    """
    if not file.is_file():
        return f"{file} is missing"
    size, _, expected = known.partition(" ")
    is_whole = file.stat().st_size == int(size) and (only_size or checksum(file) == expected)
    return "" if is_whole else f"{file} is damaged"


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write named tensors as one safetensors file."""
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    content = save(copies, {"format": "pt"})
    with replacing(path) as temporary_path:
        # safetensors' `save_file` would leave its own temporary file behind if the process were killed.
        temporary_path.write_bytes(content)


def write_parts(path: Path, tensors: Mapping[str, TensorParts]) -> None:
    """Write the tensors of one safetensors file in parts, so that they need not fit into memory.

    The file consists of the header's length (8 bytes, little-endian), the header as JSON, and the tensors.
    """
    header, end = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[str(dtype)], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary_path, temporary_path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, _, parts in tensors.values():
            for part in parts:
                rows = part.detach().to("cpu", dtype).contiguous()
                file.write(_bytes(rows))


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Memory-map the tensors of a safetensors file on the CPU. Raises DamagedFile if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (`file` is not a dict)
    except SafetensorError as error:
        raise DamagedFile(path, str(error)) from None


def _bytes(tensor: "Tensor") -> Any:
    """Return the bytes of a contiguous tensor on the CPU without copying them."""
    from torch import uint8

    return tensor.reshape(-1).view(uint8).numpy().data
