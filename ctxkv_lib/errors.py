"""Errors that the user reads as one sentence: what was wrong, what is allowed, what to do."""

import errno
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

# Texts of torch's out-of-memory errors: its CPU allocator, mps, CUDA's driver, cuBLAS.
NO_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # how cuDNN 9 ends the names of such errors
)
LONGEST_MESSAGE = 1000  # characters; a value that was typed can be of any length


class OneLine:
    """An exception that a notebook shows as its message alone."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows instead of a traceback."""
        return [str(self)]


class UserError(OneLine, ValueError):
    """Bad input or an unreachable resource; the command line shows its message and exits with code 2."""


class DamagedFile(UserError):
    """A file is damaged: it is rebuilt where possible, else the user reads this."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be used: {reason}; run what made it again.")
        self.path, self.reason = path, reason


class Diverged(UserError):
    """Loss or weights of a training are no longer finite; the same settings would end there again."""


class Stopped(OneLine, KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button: a script sees a KeyboardInterrupt."""

    def __init__(self, kept: str = "Finished stages are") -> None:
        super().__init__(f"Stopped. {kept} kept; run the cell again.")


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Let a first Ctrl-C wait for the end of the block; a second one stops at once."""
    default, pressed = signal.default_int_handler, []
    is_main = threading.current_thread() is threading.main_thread()  # which alone may set handlers

    def note(number: int, _: object) -> None:
        pressed.append(number)
        signal.signal(number, default)

    if not is_main or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def values_of_user() -> Iterator[None]:
    """Turn every ValueError inside into a UserError, since the values come from the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


@contextmanager
def memory_advice(work: str, advice: str) -> Iterator[None]:
    """Turn out-of-memory errors inside, or in a decorated function, into a UserError.

    Args:
        work: the beginning of the sentence ("Phase 2").
        advice: how to use less memory ("lower phase2.batch_size").
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        where = "GPU" if "CUDA" in str(error) or "MPS" in str(error) else "main memory"
        raise UserError(
            f"{work} ran out of memory ({where}); {advice}, and run again: what is finished is kept."
        ) from error


@contextmanager
def ended_calmly() -> Iterator[None]:
    """Turn an interrupt of the decorated function into a message, and let no error of it keep tensors.

    IPython holds the last error, and all its frames. Of what a sentence was made from, nothing is shown: its
    traceback goes, and what its closures hold.
    """
    try:
        try:
            yield
        except Stopped:
            raise
        except KeyboardInterrupt:
            raise Stopped from None
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        origin = error.__cause__ or error.__context__
        while origin is not None:
            traceback.clear_frames(origin.__traceback__)
            if isinstance(error, UserError | Stopped):
                origin.__traceback__ = None
            origin = origin.__cause__ or origin.__context__
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory of the host or of a GPU is exhausted; torch need not be imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def is_disk_full(error: BaseException) -> bool:
    """Return whether a disk is full, which some libraries say by the text alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def describe(error: OSError) -> str:
    """Describe an error of the system in a sentence."""
    if is_disk_full(error):
        return f"The disk is full ({error}); free some space and run again: finished stages are kept."
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question with the name spelled most like `word`; empty if none is close."""
    found = get_close_matches(word, known, n=1)
    return f" Did you mean {found[0]}?" if found else ""


def one_line(message: str) -> str:
    """Return `message` as one line of bounded length, whatever characters a path or value in it has."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def is_utf8(text: str) -> bool:
    """Return whether text can be written as UTF-8; bytes of a command line that are not become surrogates."""
    return text == text.encode(errors="ignore").decode()
