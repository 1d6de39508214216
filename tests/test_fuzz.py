"""Whatever is typed, and whatever a file holds: it works, or one sentence says why not. Never a traceback.

The suite tries a share; `pytest -m torture` the numbers that the project promises.
"""

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sample_runs import sample_run

from ctxkv_lib import cli
from ctxkv_lib.cli import main
from ctxkv_lib.config import CONCERNS, ExperimentConfig
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import experiment

SHARE, COMMANDS, FILES = 0.1, 200, 500


def trying(examples):
    """A share of `examples` in the suite; all of them in the long form."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, suppress_health_check=quiet, derandomize=True)


# Command lines

KEYS = [f"{c}.{name}" for c in CONCERNS for name in CONCERNS[c].__dataclass_fields__]
NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, 1e-9, 1e9, 2**31, 2**63 - 1, 2**63, 10**30, 1e300]
ODD = [
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "None",
    "true",
    "1_000",
    "٣",
    "0x10",
    "a\0b",
    "a\nb",
    "\x1b[31m",
    "\udcff",
]
ODD += ["é" * 40, "9" * 5000, "../..", "~", "~nobody/x", "$x$", "<script>", "%s {0}"]
values = st.one_of(st.sampled_from([*map(str, NUMBERS), *ODD]), st.integers().map(str), st.text(max_size=30))
known = [
    "auto",
    "cpu",
    "cuda",
    "fp32",
    "bf16",
    "exact",
    "passes",
    "grid",
    "variable",
    "random",
    "jsonl",
    "gather",
]
set_options = st.tuples(st.sampled_from(KEYS), st.one_of(values, st.sampled_from(known))).map(
    lambda pair: ["--set", f"{pair[0]}={pair[1]}"]
)
odd_sets = values.map(lambda value: ["--set", value])
presets = st.sampled_from([[], ["--preset", "ci"], ["--preset", "offline"], ["--recipe", "exact"]])
flags = ("--samples", "--preset", "--recipe", "--out", "--train-tokens", "--val-tokens", "--lang", "--seed")
flags += ("--prompt", "--data", "--max-new-tokens", "--temperature", "--top-k", "--rounds")
odd_options = st.one_of(
    st.tuples(st.sampled_from(flags), values).map(list),
    st.sampled_from([["--json"], ["--help"], ["--version"], ["--unknown"], ["--"]]),
    values.map(lambda value: [value]),
)
names = st.sampled_from(["info", "run", "compare", "report", "generate", "evaluate", "bench", "", "no-such"])
command_lines = st.tuples(
    names, presets, st.lists(st.one_of(set_options, odd_sets, odd_options), max_size=4)
).map(lambda parts: [parts[0], *parts[1], *(word for option in parts[2] for word in option)])


@pytest.fixture
def nothing_is_computed(monkeypatch, tmp_path):
    """Whole runs end where they would begin: a configuration has been built, and no work is done."""

    def begin(config, *_):
        assert isinstance(config[0] if isinstance(config, list) else config, ExperimentConfig)
        raise UserError("Nothing is computed here.")

    monkeypatch.setattr(experiment, "run", begin)
    monkeypatch.setattr(experiment, "compare", begin)
    monkeypatch.setattr("ctxkv_lib.bench.bench", begin)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    sample_run(tmp_path / "a run")


def answers(capsys, arguments):
    """Exit code 0, or 2 with one sentence; argparse puts its usage before it."""
    with suppress(AttributeError):
        capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
        assert code in (0, 2)
        err = capsys.readouterr().err
        assert (code == 0) or err.splitlines()[-1].startswith("ctxkv") or ": error: " in err
        return
    err = capsys.readouterr().err
    assert code in (0, 2), err
    if code == 2:
        assert err.startswith("ctxkv: ")
        assert err.count("\n") == 1
        assert len(err) < cli.LONGEST_MESSAGE + 100
    else:
        assert err == ""


@example(["info", "--set", "model.hidden_size=1000000000000000000000000000000"])
@example(["info", "--set", "model.vocab_size=9223372036854775807"])
@example(
    ["info", "--set", "model.interval=9223372036854775807", "--set", "model.max_contexts=9223372036854775807"]
)
@example(["info", "--train-tokens", "1" + "0" * 30, "--val-tokens", "1" + "0" * 30])
@example(["info", "--set", "phase1.noise_std=nan"])
@example(["run", "--set", "data.source=jsonl", "--set", "data.path=a\0b"])
@example(["run", "--set", "data.source=jsonl", "--set", "data.path=\udcff"])
@example(["report", "a run", "--lang", "ja"])
@example(["report", "\udcff"])
@trying(int(SHARE * COMMANDS))
@given(command_lines)
def test_every_command_line_works_or_is_refused_in_a_sentence(nothing_is_computed, capsys, arguments):
    answers(capsys, arguments)


@pytest.mark.torture
@trying(COMMANDS)
@given(command_lines)
def test_200_command_lines(nothing_is_computed, capsys, arguments):
    answers(capsys, arguments)
