"""Real runs that are disturbed end with the numbers of an undisturbed one, or are refused in a sentence.

`make torture` disturbs them at every file operation, with and without a token table from text. The suite
disturbs one of them at some operations. `tests/runs/test_steps.py` does the same with a toy, and more.
"""

import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import lasting, local_experiment, outcome, tiny_run, write_conversations
from disturbances import DAMAGES, in_child

from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs import training
from ctxkv_lib.runs.generation import generate_text
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.steps import finished
from ctxkv_lib.runs.summary import load_run
from ctxkv_lib.store import store


class Laboratory:
    """A tiny experiment, and what an undisturbed run of it leaves.

    Its folders are `run`, which is disturbed, and copies: `whole` is a finished run with its store, `begun` a
    run that was stopped in Phase 2, and `other` a finished run with another seed.
    """

    def __init__(self, root: Path, recipe: str, table: str) -> None:
        self.root, self.path = root, root / "run"
        settings = local_experiment(root) | {"data.table": table, "data.corpus_samples": 4}
        write_conversations(root / "conversations.jsonl", 18)
        self.config = build_config("ci", recipe, 8, settings)
        other = self.config.replace({"runtime.seed": 7})
        run(other, self.path, _ignore)
        self.save("other")
        run(self.config, self.path, _ignore)
        self.expected, self.text = outcome(self.path), self.generate()
        self.save("whole")
        with pytest.raises(KeyboardInterrupt):
            run(self.config, self.path, _stop_after_second_epoch)
        self.save("begun")

    def save(self, name: str) -> None:
        shutil.copytree(self.path, self.root / name / "run")
        shutil.copytree(store(), self.root / name / "store")
        self.empty()

    def empty(self) -> None:
        """Begin anew, without a run and without a store."""
        for folder in (self.path, store()):
            shutil.rmtree(folder, ignore_errors=True)

    def begin_with(self, name: str) -> None:
        self.empty()
        shutil.copytree(self.root / name / "run", self.path)
        shutil.copytree(self.root / name / "store", store())

    def load(self):
        return lasting(load_run(self.path).summary)

    def generate(self) -> str:
        return generate_text(self.path, "the cat", max_new_tokens=9, temperature=0.0)

    def run(self, kind: str = "", at: int | None = None, again: bool = False):
        """Run the experiment in a child that is disturbed. Its value is the number of trained epochs."""

        def act() -> int:
            heard = []
            run(self.config, self.path, heard.append, again)
            return len([line for line in heard if "val_ppl" in line and "replayed" not in line])

        return in_child(act, kind, at)

    def check_shown(self) -> None:
        """Check that what is shown of the run is right, and that the rest is refused."""
        for read, right in ((self.load, self.expected["summary"]), (self.generate, self.text)):
            with suppress(UserError):
                assert read() == right

    def finish(self, may_refuse: bool = False) -> str:
        """Run to the end, with `again` only if the run is refused without it; return how it ended."""
        was_trained = self.is_trained()
        ended = self.run()
        if ended.how == "refused":
            assert may_refuse, ended
            assert "--again" in ended.value
            ended = self.run(again=True)
            how = "refused"
        else:
            assert not (was_trained and ended.value), "a trained model was replaced unasked"
            how = "repaired" if ended.value or "computed again" in ended.said else "harmless"
        assert ended.how == "done", ended
        assert outcome(self.path) == self.expected
        assert self.generate() == self.text
        return how

    def is_trained(self) -> bool:
        try:
            return bool(finished(self.path, "phase2"))
        except (UserError, OSError):
            return False


def _ignore(_) -> None:
    pass


def _stop_after_second_epoch(metric) -> None:
    if metric.get("epoch") == 2 and "val_ppl" in metric:
        raise KeyboardInterrupt


@pytest.fixture(scope="module", params=[("exact", "cooccurrence")], ids=str)
def laboratory(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("laboratory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXKV_CACHE", str(root / "store"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setattr(training, "EVERY_SECONDS", 0)
        yield Laboratory(root, *request.param)


def often(name: str, few: int, many: int = 1):
    """Give a test the argument `name`: `few` in the suite, and `many` in `make torture`, which tries more."""
    kinds = [("exact", "cooccurrence"), ("exact", "random"), ("published", "cooccurrence")]
    tortured = [pytest.param(kind, many, marks=pytest.mark.nightly) for kind in kinds]
    values = [(kinds[0], few), *tortured]
    return pytest.mark.parametrize(
        ("laboratory", name), values, indirect=["laboratory"], scope="module", ids=str
    )


@pytest.mark.parametrize("kind", ["kill", "full", "wipe"])
@often("stride", 120)
def test_a_run_that_is_disturbed_at_any_file_operation_ends_right(laboratory, kind, stride):
    laboratory.empty()
    total = laboratory.run().operations
    assert total > 100
    disturbed = 0
    for at in range(stride // 2, total, stride):
        laboratory.empty()
        ended = laboratory.run(kind, at)
        if kind == "full":
            assert ended.how in ("refused", "failed"), ended
        laboratory.check_shown()
        laboratory.finish()
        disturbed += 1
    print(f"\n{kind}: {disturbed} of {total} operations")


@often("stride", 60)
def test_a_run_that_continues_is_disturbed_at_any_file_operation_and_ends_right(laboratory, stride):
    laboratory.begin_with("begun")
    total = laboratory.run().operations
    for kind in ("kill", "full", "wipe"):
        for at in range(stride // 2, total, stride):
            laboratory.begin_with("begun")
            laboratory.run(kind, at)
            laboratory.finish()


def exchanged(laboratory, file: Path) -> bool:
    """Replace a file with that of another run. Return whether there is another one."""
    other = laboratory.root / "other" / file.relative_to(laboratory.root)
    if not other.is_file() or other.read_bytes() == file.read_bytes():
        return False
    shutil.copyfile(other, file)
    return True


@often("stride", 9)
def test_a_damaged_or_exchanged_file_is_repaired_refused_or_harmless(laboratory, stride):
    ended = []
    for begun in ("whole", "begun"):
        laboratory.begin_with(begun)
        files = [file for root in (laboratory.path, store()) for file in root.rglob("*") if file.is_file()]
        files = [file for file in sorted(files) if file.suffix != ".lock" and file.name != ".lock"]
        cases = [(file, damage) for file in files for damage in [*DAMAGES, "exchange"]]
        for file, damage in cases[stride // 2 :: stride]:
            laboratory.begin_with(begun)
            if damage != "exchange":
                DAMAGES[damage](file)
            elif not exchanged(laboratory, file):
                continue
            if file.name not in ("summary.json", "metrics.jsonl"):  # the package reads the records instead
                laboratory.check_shown()
            if damage == "exchange" and file.name in ("settings.json",):
                assert "contains another experiment" in laboratory.run().value
                continue
            may_refuse = file.name in ("weights.safetensors", "phase2.json", "token_vectors.safetensors")
            ended.append(laboratory.finish(may_refuse=may_refuse or damage == "exchange"))
    print(f"\n{ {how: ended.count(how) for how in sorted({*ended})} }")


@often("rounds", 2, 67)
def test_random_sequences_of_disturbances_end_right(laboratory, rounds):
    draw = random.Random(3)
    for _ in range(rounds):
        laboratory.empty()
        for _ in range(draw.randrange(1, 4)):
            laboratory.run(draw.choice(["kill", "full", "wipe"]), draw.randrange(250))
            laboratory.check_shown()
            if draw.random() < 0.2:
                shutil.rmtree(store(), ignore_errors=True)
            if draw.random() < 0.2 and (files := [*laboratory.path.glob("*.safetensors")]):
                DAMAGES[draw.choice([*DAMAGES])](draw.choice(files))
        laboratory.finish(may_refuse=True)


def test_after_deleting_the_store_a_finished_run_is_used_as_before(laboratory):
    laboratory.begin_with("whole")
    before = open_run(laboratory.path)
    expected = {split: before.stream(split).token_losses().tolist() for split in ("train", "val", "test")}
    shutil.rmtree(store())
    opened = open_run(laboratory.path)
    assert {
        split: opened.stream(split).token_losses().tolist() for split in ("train", "val", "test")
    } == expected
    assert laboratory.finish() == "harmless"


@pytest.fixture
def disk(tmp_path):
    """Mount a small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.nightly
def test_a_full_or_read_only_disk_is_reported_in_one_sentence(disk, tmp_path, own_store):
    settings = local_experiment(tmp_path)

    def command(out):
        words = [sys.executable, "-m", "ctxkv_lib", *tiny_run(out, settings)]
        return subprocess.run(words, capture_output=True, text=True)

    full = command(disk / "run")
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert "disk is full" in full.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert command(disk / "run").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for folder in (disk / "run", disk / "new"):
        refused = command(folder)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "Read-only" in refused.stderr
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
