"""Errors that the user sees as one sentence: what was wrong, what is allowed, and what to do."""

import errno
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

# Texts that identify out-of-memory errors from torch's CPU allocator, mps, the CUDA driver, cuBLAS and cuDNN.
NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
# Maximum length of a message in characters. A longer message, e.g. about a long value, is cut in the middle.
LONGEST_MESSAGE = 1000
# Folders that do not contain the user's code: this package and Python's standard library.
LIBRARIES = (Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")))


class OneLine:
    """An exception that a notebook shows without a traceback, as one line of text."""

    def _render_traceback_(self) -> list[str]:
        """Return the message, which IPython shows instead of a traceback."""
        return [str(self)]


class UserError(OneLine, ValueError):
    """Bad input or an unreachable resource. The command line prints the message and exits with code 2."""


class DamagedFile(UserError):
    """A file is damaged: its content is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be used: {reason}; to restore it, rerun the command that made it.")
        self.path, self.reason = path, reason


class Interrupted(OneLine, KeyboardInterrupt):
    """Raised after Ctrl-C or a notebook's stop button. Scripts can catch it as a KeyboardInterrupt."""

    def __init__(self) -> None:
        super().__init__("Stopped. Finished steps and saved epochs are kept; run again to continue.")


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn interrupts, out-of-memory errors and diverged training into errors with one-sentence messages.

    The frames of these errors are cleared, because a notebook keeps its last error, and thereby all
    tensors in those frames. All other errors keep their frames, so that `%debug` can inspect the user's own
    code. An OSError from the user's own code gets a note with the file's name; otherwise, it would look like
    an error in this package.
    """
    from .method.callback import Diverged

    sentence: BaseException
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            sentence = Interrupted()
        elif isinstance(error, Diverged):
            sentence = UserError(str(error))
        elif is_out_of_memory(error):
            where = "The GPU's memory" if "CUDA" in str(error) or "MPS" in str(error) else "Memory"
            sentence = UserError(
                f"{where} is full; lower phase2.batch_size (in Phase 1: phase1.batch_size) or use fewer "
                "conversations, and run again: finished steps are kept."
            )
        else:
            if isinstance(error, OSError) and (file := user_file(error)):
                error.add_note(f"This error comes from your own code in {file}.")
            raise
        traceback.clear_frames(error.__traceback__)
        raise sentence from None


def user_file(error: BaseException) -> str | None:
    """Return the last file of the user's own code in an error's traceback, or None if there is none."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((file for file in reversed(files) if is_of_user(Path(file))), None)


def is_of_user(file: Path) -> bool:
    """Return whether a file is the user's own code, i.e. not part of Python or of an installed package."""
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    is_library = is_installed or any(file.is_relative_to(folder) for folder in LIBRARIES)
    return not is_library and not file.name.startswith("<")  # e.g. <frozen importlib._bootstrap>


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn a ValueError from the block into a UserError, since the values in the block come from the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the host's or a GPU's memory is full. This does not import torch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_of_torch = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return is_of_torch or isinstance(error, MemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that a disk is full. Some libraries report this only in the text."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def in_a_sentence(error: OSError) -> str:
    """Describe an error from the operating system in one sentence."""
    if is_disk_full(error):
        return f"The disk is full ({error}); free some space and run again: finished steps are kept."
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that proposes the known names closest to `word`, or an empty string.

    `word` may also be the last part of a name, or the initials of that part: both `learning_rate` and `lr`
    match `phase2.learning_rate`.
    """
    names = [*known]
    group, dot, last = word.lstrip("-").replace("-", "_").rpartition(".")
    parts = {name: name.rpartition(".")[2] for name in names if "." in name}
    close = [name for name, part in parts.items() if part == last]
    if not close and len(last) > 1:
        close = [name for name, part in parts.items() if "".join(re.findall(r"(?:^|_)(.)", part)) == last]
    close = [name for name in close if name.startswith(group + dot)] or close
    close = close or get_close_matches(word, names, n=1)
    return f" Did you mean {' or '.join(sorted(close, reverse=True))}?" if close else ""


def one_line(message: str) -> str:
    """Return `message` as one line of bounded length, with unprintable characters escaped."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def is_utf8(text: str) -> bool:
    """Return whether text can be encoded as UTF-8. It cannot if a command line contained invalid bytes."""
    return text == text.encode(errors="ignore").decode()
