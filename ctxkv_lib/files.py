"""Files that are complete or absent: everything is written beside its final name and then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "CTXKV_CACHE"


def cache_dir() -> Path:
    """Folder for downloads and tables shared between runs: `$CTXKV_CACHE`, or `~/.cache/ctxkv`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "ctxkv")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a file or folder, which takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(value: Any) -> str:
    """16 hexadecimal digits that change when the JSON form of `value` does."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, and strings beside them, as one safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        try:
            save_file(contiguous, beside, metadata=metadata)
        except SafetensorError as error:  # how it reports a full disk, too
            raise OSError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


def tensor_metadata(path: Path) -> dict[str, str]:
    """The strings that `write_tensors` put beside the tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
