"""Files from outside: pinned repositories on the Hugging Face Hub, and data files of installed packages."""

import errno
import importlib.util
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ..errors import UserError, is_disk_full


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at one commit."""

    repo: str
    path: str
    revision: str  # a commit, never a branch, so that its content never changes
    kind: Literal["dataset", "model"]


# The repositories' pinned commits. "gpt2" alone is refused by huggingface_hub 2.
ULTRACHAT_REVISION = "8049631c405ae6576f93f445c6b8166f76f5505a"
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
ULTRACHAT_SHARDS = tuple(
    HubFile("HuggingFaceH4/ultrachat_200k", f"data/train_sft-{shard}.parquet", ULTRACHAT_REVISION, "dataset")
    for shard in (
        "00000-of-00003-a3ecf92756993583",
        "00001-of-00003-0a1804bcb6ae68c6",
        "00002-of-00003-ee46ed25cfae92c6",
    )
)


def gpt2_file(path: str) -> HubFile:
    """Name a file of GPT-2's repository."""
    return HubFile("openai-community/gpt2", path, GPT2_REVISION, "model")


@contextmanager
def hub_errors(failure: str, advice: str, *others: type[Exception]) -> Iterator[None]:
    """Turn an error of the Hub, or one of `others`, into a UserError: "`failure` (the error); `advice`."."""
    from huggingface_hub.errors import HfHubHTTPError

    # Offline, rate-limited (429) and without a local copy: OSErrors. Others come from its HTTP library,
    # which was requests, then httpx, then httpx2: HfHubHTTPError always derived from its error class.
    failures: tuple[type[BaseException], ...] = (OSError, *others, *HfHubHTTPError.__bases__)
    try:
        yield
    except failures as error:
        is_full = is_disk_full(error)
        if isinstance(error, UserError) or (is_full and isinstance(error, OSError)):
            raise
        if is_full:  # as hf_xet says it
            raise OSError(errno.ENOSPC, str(error)) from error
        reason = textwrap.shorten(str(error), 150, placeholder=" ...").rstrip(".")
        raise UserError(f"{failure} ({type(error).__name__}: {reason}); {advice}.") from error


def _reading(file: HubFile, *others: type[Exception]) -> AbstractContextManager[None]:
    return hub_errors(
        f"{file.path} of {file.repo} could not be read from the Hugging Face Hub",
        "check the network connection and try again, or use --preset offline",
        ValueError,  # also pyarrow's: it is cut off, or a network's sign-in page came instead
        KeyError,
        *others,
    )


@contextmanager
def open_file(file: HubFile) -> Iterator[IO[bytes]]:
    """Open a seekable stream over `file` that downloads only the bytes read.

    Raises, as `download` does, a UserError if the Hub is unreachable or refuses.
    """
    from huggingface_hub import HfFileSystem

    prefix = "datasets/" if file.kind == "dataset" else ""
    with _reading(file):
        # A shared instance would remember a failed look-up for the life of the process.
        system = HfFileSystem(skip_instance_cache=True)
        path = f"{prefix}{file.repo}@{file.revision}/{file.path}"
        with system.open(path, "rb", cache_type="none") as stream:
            yield stream


def download(file: HubFile) -> Path:
    """Download the whole file to the cache of huggingface_hub."""
    from huggingface_hub import hf_hub_download

    with _reading(file, RuntimeError):  # of hf_xet
        return Path(hf_hub_download(file.repo, file.path, repo_type=file.kind, revision=file.revision))


def package_file(package: str, path: str) -> Path:
    """Find a data file of a package without importing it; raises a UserError if it is missing."""
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / path if spec and spec.origin else None
    if file is None or not file.is_file():
        name = package.replace("_", "-")
        raise UserError(f"The package {name} is not installed or lacks {path}; run: pip install {name}")
    return file
