"""The command line prints the right lines, refuses bad input in one sentence, and shows no traceback."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import settings_of, tiny_run, write_conversations
from sample_runs import EPOCHS, epoch_lines

import ctxkv_lib
from ctxkv_lib import __main__, experiments, progress
from ctxkv_lib.cli import main
from ctxkv_lib.data.texts import read_texts
from ctxkv_lib.errors import UserError
from ctxkv_lib.measure import measurements
from ctxkv_lib.method.config import Phase2Config
from ctxkv_lib.runs import plan

COMMAND = [sys.executable, "-m", "ctxkv_lib"]
NGRAMS = {"kneser_ney": {"val_ppl": 3.0, "test_ppl": 3.0}}


def test_info_prints_the_published_sizes_and_knows_only_the_tokens_of_the_published_data(printed_by):
    text = printed_by("info", "--train-tokens", 587970, "--val-tokens", 22723)
    for number in ("45,163,264", "6,301,440 (13.95%)", "621 contexts, 626 KiB", "574", "1,722", "2,38"):
        assert number in text, number
    assert re.search(r"(?m)^Context window \(tokens\) +640$", text)
    assert text == printed_by("info")
    info = ("info", "--samples", 500, "--json", "--preset")
    known, other = (printed_by(*info, preset) for preset in ("colab", "offline"))
    fewer = printed_by(*info, "colab", "--set", "data.validation_samples=10")
    assert (known["train_tokens"], known["val_tokens"]) == (587_970, 22_723)
    assert known["context_window"]["theoretical_max"] == 29_399
    sizes = known["caches_dense_fp32_mib"]
    parts = ("train_ctx", "train_emb", "val_ctx", "val_emb", "total")
    assert [round(sizes[part]) for part in parts] == [574, 1723, 22, 67, 2386]
    assert other["train_tokens"] is fewer["val_tokens"] is None


def test_info_counts_the_tokens_of_your_own_conversations(printed_by, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"text": " ".join(["rain"] * 100)}) for _ in range(40)))
    split = ("--set", "data.validation_samples=2", "--set", "data.test_samples=1")
    found = printed_by("info", "--preset", "offline", "--data", file, *split, "--json")
    assert (found["samples"], found["train_tokens"]) == (37, 3_700)
    assert found["val_tokens"] == 2 * 100 + 2  # two texts and two newlines between them


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --data a.jsonl --set data.path=b.jsonl", "data.path is given by --set and by its own option"),
        ("run --preset offline --samples 999999 --out new/run", "999999"),
        ("compare --preset ci --samples 5", "at least two different sample counts"),
        ("run --set phase2.batch_size", "has no '='"),
        ("info --preset colab --set model.hidden_size=512", "model.hidden_size is 512"),
        ("info --train-tokens -5", "--train-tokens is -5; allowed: 1 or more."),
        ("run --preset ci --data missing.jsonl", "missing.jsonl"),
        ("report two\nlines", r"two\nlines does not contain a run"),
        ("generate nowhere --prompt a", "nowhere does not contain a run; find runs with `ctxkv list`"),
        ("list", "runs is not a folder; choose the folder that contains your run folders."),
        ("info --preset ofline", "Did you mean offline?"),
        ("info --set phse2.patience=3", "Did you mean phase2.patience?"),
        ("info --set learning_rate=3", "Did you mean phase2.learning_rate or phase1.learning_rate?"),
        ("info --set phase2.lr=3", "Did you mean phase2.learning_rate?"),
        ("info --set phase2.seed=3", "Did you mean runtime.seed?"),
        ("info --recipe tuned --set layer_dropout=0", "Did you mean layer.layer_dropout?"),
        (
            "info --set qqqqqq.x=3",
            "with group one of data, model, phase1, phase2, runtime.\n",
        ),  # no name is similar
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_computed(
    printed_by, tmp_path, monkeypatch, line, said
):
    monkeypatch.chdir(tmp_path)
    assert said in printed_by(*line.split(" "), code=2)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --out ", "argument --out: a path must be UTF-8, not empty"),
        ("rnu", "Did you mean run?"),
        ("run --smaples 3", "Did you mean --samples?"),
        ("compare --batch-size=64", "Did you mean --set phase2.batch_size or --set phase1.batch_size?"),
    ],
)
def test_a_wrong_word_is_refused_by_the_parser(line, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split(" "))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_reader_that_stops_reading_ends_the_command_quietly(finished_run):
    process = subprocess.Popen(
        [*COMMAND, "report", str(finished_run.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_to_a_full_disk_fails_with_one_sentence(finished_run):
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, "report", str(finished_run.path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "The disk is full" in done.stderr
        assert subprocess.run([*COMMAND, "list", "nowhere"], stderr=full).returncode == 2


def test_a_run_says_early_how_long_an_epoch_takes(tmp_path, tiny_settings, monkeypatch, capsys):
    monkeypatch.setattr(progress, "ESTIMATE_SECONDS", 0)
    settings = tiny_settings | {"phase2.batch_size": 32, "phase2.max_epochs": 5, "phase2.learning_rate": 1e-9}
    assert main(tiny_run(tmp_path / "run", settings)) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"\d+ tokens: about [\d.]+ s per epoch, 4 to 5 epochs\.\n", err)
    ends = [line.partition("; ends in ")[2] for line in out.splitlines() if "epoch 1 of" in line]
    assert re.fullmatch(r"[\d.]+ s at the latest", *ends)


def test_the_estimate_leaves_out_the_first_step_which_warms_up(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for step in progress.estimated(range(10), 10, told.append):
        now[0] += 2 if step else 100
    assert told == [20]


def test_the_line_of_an_epoch_says_when_training_ends(capsys):
    show = progress.epoch_printer(Phase2Config(max_epochs=6, patience=2))
    for line in epoch_lines(EPOCHS[500]):  # 12.5 s per epoch; the third is best
        show(line)
    ends = [line.rpartition("; ends in ")[2] for line in capsys.readouterr().out.splitlines()]
    assert ends[:4] == [f"{left} at the latest" for left in ("62 s", "50 s", "38 s", "25 s")]
    assert "latest" not in ends[4] + ends[5]


def test_a_notebook_without_a_listener_prints_no_epochs(capsys, monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    progress.epoch_printer(Phase2Config())(epoch_lines(EPOCHS[500])[0])
    assert capsys.readouterr() == ("", "")


def test_a_duration_has_two_significant_digits():
    shown = [progress.duration(seconds) for seconds in (0.0123, 0.34, 4.26, 89, 90, 5000, 5400, 900_000)]
    assert shown == ["0.012 s", "0.34 s", "4.3 s", "89 s", "1.5 min", "83 min", "1.5 h", "250 h"]


@pytest.mark.slow
def test_a_run_in_a_pipe_prints_a_line_per_epoch_and_no_progress_bar(printed_by, tmp_path, tiny_settings):
    out = tmp_path / "run"
    settings = {
        **tiny_settings,
        "runtime.seed": 2**63 - 1,
        "phase1.max_iterations": 10,
        "phase1.stop_rate": 1,
    }
    done = subprocess.run([*COMMAND, *tiny_run(out, settings)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, best, report = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert lines == ["Phase 1, iteration 10", *(f"Phase 2, epoch {n} of at most 3" for n in (1, 2, 3))]
    assert best.startswith("Best epoch")
    assert report == "Report"
    for language, name in (("en", "report.md"), ("ja", "report.ja.md")):
        printed = printed_by("report", out, "--lang", language)
        assert printed.strip() == (out / name).read_text(encoding="utf-8").strip()


def test_a_finished_run_says_so_and_prints_no_epoch_again(finished_run, capsys):
    assert main(["run", "--out", str(finished_run.path)]) == 0
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == [out[:12], "Report"]
    assert err.splitlines() == [f"{finished_run.path} is finished; its results are reused."]


def test_options_are_checked_against_the_folders_run(printed_by, finished_run, tiny_settings, monkeypatch):
    asked = tiny_run(finished_run.path, {**tiny_settings, "phase2.patience": 7})
    assert "another experiment: phase2.patience 3 → 7;" in printed_by(*asked, code=2)
    monkeypatch.setattr(experiments, "run", started := Mock(side_effect=UserError("asked")))
    for option in ("--preset=colab", "--recipe=exact", "--samples=8", "--block=plugins:GatedBlock"):
        assert "asked" in printed_by("run", "--out", finished_run.path, option, code=2)
        assert started.call_args.args[0].preset == "colab", option  # not the folder's preset


@pytest.mark.slow
def test_a_trained_run_generates(printed_by, finished_run):
    generate = ["generate", finished_run.path, "--prompt", "the cat", "--max-new-tokens", 5]
    options = [["--temperature", 0], ["--temperature", "1e-38"], ["--seed", 2**63 - 1], ["--seed", 2**63 - 1]]
    before = torch.get_rng_state()
    options += [["--temperature", 9], ["--temperature", 9, "--seed", 1], ["--temperature", 9, "--top-k", 1]]
    coldest, cold, seeded, again, hot, other, likeliest = (printed_by(*generate, *each) for each in options)
    assert torch.equal(torch.get_rng_state(), before)
    assert coldest == cold == likeliest
    assert again == seeded
    assert len({coldest, hot, other}) == 3
    assert coldest.startswith("the cat")
    for run in (finished_run, ctxkv_lib.open_run(finished_run)):
        assert coldest == f"{ctxkv_lib.generate_text(run, 'the cat', max_new_tokens=5, temperature=0)}\n"
    for options, said in (
        (["--seed", 2**63], "allowed: 0 to 2^63 - 1"),
        (["--prompt", "caf\udce9"], "The prompt is empty or not UTF-8"),
        (["--prompt", ""], "The prompt is empty"),
    ):
        assert said in printed_by(*generate, *options, code=2)
    with pytest.raises(UserError, match="'max_tokens'; allowed: max_new_tokens, temperature, top_k, seed"):
        ctxkv_lib.generate_text(finished_run, "the cat", max_tokens=5)


@pytest.mark.slow
def test_a_trained_run_is_evaluated_on_other_conversations(printed_by, tmp_path, finished_run):
    data = tmp_path / "other.jsonl"
    write_conversations(data, 3, seed=5)
    evaluate = ["evaluate", finished_run.path, "--data", data]
    scores = printed_by(*evaluate, "--json")
    assert (scores["conversations"], scores["file"]) == (3, "other.jsonl")
    assert scores == ctxkv_lib.evaluate_texts(finished_run, data)
    texts = read_texts(data)
    assert ctxkv_lib.evaluate_texts(finished_run, texts) == {**scores, "file": None}
    for nothing in ([], ["the cat", ""], [data]):
        with pytest.raises(UserError, match="allowed: a list of texts that are not empty, or a file"):
            ctxkv_lib.evaluate_texts(finished_run, nothing)
    assert f"{scores['ppl']:,.1f}" in printed_by(*evaluate)
    assert "data.split is 'test'; allowed: None, unless" in printed_by(*evaluate, "--split", "test", code=2)


@pytest.mark.slow
def test_compare_prints_the_table(printed_by, tmp_path, tiny_settings, monkeypatch):
    monkeypatch.setattr(measurements.ngrams, "ngrams_of_run", lambda _: NGRAMS)
    settings = settings_of(tiny_settings | {"phase2.max_epochs": 1})
    arguments = ["compare", "--preset", "ci", "--samples", 2, 8, 2, "--out", tmp_path / "c", *settings]
    printed = printed_by(*arguments, "--measure")
    for row in ("Val PPL", "Val Acc", "Best epoch", "Val/Train Ratio", "8 samples", "Val PPL of n-grams"):
        assert row.lower() in printed.lower(), row
    assert "Val PPL of n-grams" in (tmp_path / "c" / "report.md").read_text()
    monkeypatch.setitem(plan.VERSIONS, "phase2", 2)
    said = "a trained model, but results version of phase2 1 → 2; replace it with --again"
    assert said in printed_by(*arguments, code=2)
    (folder,) = (tmp_path / "c").glob("ci-exact-8-*")
    single = ["run", "--preset", "ci", "--samples", 8, "--out", folder, *settings]
    assert said in printed_by(*single, code=2)
    printed = printed_by(*single, "--again", "--measure")
    assert "Best epoch 1: " in printed
    assert re.search(r"(?m)^Val PPL of n-grams +3\.0$", printed)
    assert "Val PPL" in printed_by(*arguments, "--again")


@pytest.mark.slow
def test_ctrl_c_stops_with_a_sentence(tmp_path, tiny_settings):
    """The test sends a real interrupt to a real process."""
    settings = {**tiny_settings, "phase2.max_epochs": 600, "phase2.patience": 600}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore Ctrl-C
    command = [*COMMAND, *tiny_run(tmp_path / "run", settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or "phase2" not in metrics.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "Finished steps and saved epochs are kept" in err


def test_ctrl_c_while_modules_load_prints_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "ctxkv_lib.cli")
    monkeypatch.setattr(sys, "meta_path", [Mock(find_spec=Mock(side_effect=KeyboardInterrupt))])
    assert __main__.main() == 130
    assert capsys.readouterr().err == "ctxkv: Stopped.\n"


def test_progress_bars_are_shown_only_on_a_terminal(capsys, monkeypatch):
    with progress.status_line("Making the token table"):
        progress.print_on_terminal("a line")
        assert list(progress.progress_bar(range(3), "Steps")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.status_line("Making the token table"):
        list(progress.progress_bar(range(3), "Steps"))
    shown = capsys.readouterr().err
    assert "Making the token table" in shown
    assert re.search(r"Steps: .*0/3 \[\d\d:\d\d<", shown)  # elapsed and remaining time
