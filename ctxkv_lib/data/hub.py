"""Find files in installed packages, and download files from the Hugging Face Hub into the Hub's own cache."""

import errno
import importlib.util
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ..errors import UserError, is_disk_full

# Repositories, each pinned to a commit so that its content never changes.
# The owner is part of each name, since huggingface_hub 2 refuses "gpt2" without its owner.
GPT2 = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")
ULTRACHAT = ("HuggingFaceH4/ultrachat_200k", "8049631c405ae6576f93f445c6b8166f76f5505a")

# Maximum number of characters that an error quotes from a library's message.
LONGEST_REASON = 200


@contextmanager
def hub_errors(failure: str, advice: str) -> Iterator[None]:
    """Turn an error from the Hub's libraries into a UserError with the text `failure (error); advice.`"""
    from huggingface_hub import constants

    try:
        yield
    except UserError:
        raise
    # Catch all exceptions, since the class of an error depends on the versions of four libraries.
    except Exception as error:
        # hf_xet raises a general error if the disk is full, and mentions the disk only in the message.
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        reason = _first_sentences(str(error))
        advice = f"unset HF_HUB_OFFLINE, {advice}" if constants.HF_HUB_OFFLINE else advice
        raise UserError(f"{failure} ({type(error).__name__}: {reason}); {advice}.") from error


def _first_sentences(text: str) -> str:
    """Cut `text` after the last sentence that fits into `LONGEST_REASON`, and drop the final period."""
    text = " ".join(text.split())
    end = text.rfind(". ", 0, LONGEST_REASON)
    if len(text) > LONGEST_REASON and end > 0:
        text = text[:end]
    return textwrap.shorten(text, LONGEST_REASON, placeholder=" …").rstrip(".")


def download(repository: tuple[str, str], path: str, kind: str = "model") -> Path:
    """Return the path of a file from a pinned repository. The file is downloaded if it is not in the cache.

    `kind` is "model" or "dataset". Raises a UserError if the Hub cannot be reached or refuses the request.
    """
    repo, revision = repository
    failure = f"{path} of {repo} could not be read from the Hugging Face Hub"
    with hub_errors(failure, "check the network connection and try again, or use --preset offline"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, path, repo_type=kind, revision=revision))


@cache
def dataset_files(name: str, split: str | None) -> list[Path]:
    """Download the files of one split of a data set on the Hub, and return their paths.

    If `split` is None, the data set's only split is used, or train if there are several splits. If the data
    set has several configurations, write `name` as "owner/name:configuration". Raises a UserError if there is
    no such data set or split, or if the Hub cannot be reached.
    """
    failure = f"{name} is not a file or folder, and could not be opened as a data set on the Hugging Face Hub"
    with hub_errors(failure, "check the name and the network connection, or name a file"):
        from datasets import DownloadManager, disable_progress_bars, load_dataset_builder

        disable_progress_bars()  # huggingface_hub shows its own bar
        repo, _, configuration = name.partition(":")
        config = load_dataset_builder(repo, configuration or None).config
        splits = {str(key): [*urls] for key, urls in config.data_files.items()}
        chosen = split or ("train" if len(splits) > 1 else next(iter(splits)))
        if chosen not in splits:
            raise UserError(f"{name} has no split {chosen}; allowed for data.split: {', '.join(splits)}.")
        return [Path(file) for file in DownloadManager().download(splits[chosen])]


def package_file(package: str, path: str) -> Path:
    """Return the path of a data file in an installed package, without importing the package.

    Raises a UserError if the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / path if spec and spec.origin else None
    if file is None or not file.is_file():
        name = package.replace("_", "-")
        raise UserError(f"The package {name} is not installed or lacks {path}; run: pip install {name}")
    return file
