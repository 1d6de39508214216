import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import write_conversations
from sample_runs import sample_run

import ctxkv_lib
from ctxkv_lib import files
from ctxkv_lib.cli import _loading, main
from ctxkv_lib.errors import UserError
from ctxkv_lib.files import write_json
from ctxkv_lib.hf.inference import evaluation_file
from ctxkv_lib.runs import contexts, stages, work
from ctxkv_lib.runs.config import build_config


def settings_of(values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def tiny_run(folder, settings):
    """Arguments of a run of a second or two, into `folder`."""
    return ["run", "--preset", "ci", "--samples", "8", "--out", str(folder), *settings_of(settings)]


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch, own, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    importlib.reload(ctxkv_lib)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_info_prints_the_published_sizes_and_knows_the_tokens_of_the_published_data_alone(printed_by):
    text = printed_by("info", "--train-tokens", 587970, "--val-tokens", 22723)
    sizes = ("29,399", "574", "1,723", "22", "67", "2,386")
    held = ("621 contexts, 621 KiB", "Phase 1 0.56 GiB, Phase 2 0.56 GiB")
    for number in ("45,163,264", "6,301,440 (13.95%)", "apart: 640 tokens", *held, *sizes):
        assert number in text, number
    info = ("info", "--samples", 500, "--json", "--preset")
    known, other = (printed_by(*info, preset) for preset in ("colab", "offline"))
    assert known["train_tokens"] == 587_970
    assert (other["train_tokens"], other["caches_dense_fp32_mib"]) == (None, None)
    assert known["val_tokens"] == 22_723
    more = printed_by(*info, "colab", "--set", "data.validation_samples=100")
    assert (more["train_tokens"], more["val_tokens"]) == (587_970, None)


def test_info_counts_the_tokens_of_a_file(printed_by, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"text": " ".join(["rain"] * 100)}) for _ in range(40)))
    split = ("--set", "data.validation_samples=2", "--set", "data.test_samples=1")
    for named in (("--data", file), ("--set", f"data.path={file}")):
        found = printed_by("info", "--preset", "colab", *named, *split, "--json")
        assert (found["samples"], found["train_tokens"]) == (37, 3_700)
        assert found["val_tokens"] == 2 * 100 + 2  # and the newlines between both


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --preset moon", "preset is 'moon'; allowed: colab, offline, ci."),
        ("run --data a.jsonl --set data.path=b.jsonl", "data.path and --data are both given; give one of"),
        (
            "run --data a.jsonl --set data.source=chitchat",
            "data.source is 'chitchat' and data.path is 'a.jsonl'",
        ),
        ("run --preset offline --samples 999999", "999999"),
        ("compare --preset ci --samples 5", "at least two different sample counts"),
        ("run --set phase2.batch_size", "has no '='"),
        ("info --train-tokens -5", "--train-tokens is -5; allowed: 1 or more."),
        ("info --val-tokens 0", "--val-tokens is 0; allowed: 1 or more."),
        ("evaluate run\nfolder --data chats.jsonl", "chats.jsonl does not exist"),
        ("run --preset ci --data missing.jsonl", "/missing.jsonl does not exist"),
        ("run --preset ci --data ", "data.path is ''; allowed: a path"),
        ("report two\nlines", r"two\nlines is not a folder"),
        ("generate nowhere --prompt a", "nowhere is not a folder; name one of `ctxkv list`, or"),
        ("list", "runs is not a folder; name the one that holds your run folders."),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_computed(
    printed_by, tmp_path, monkeypatch, line, said
):
    monkeypatch.chdir(tmp_path)
    assert said in printed_by(*line.split(" "), code=2)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_plug_ins_again_and_measure_are_passed_on(monkeypatch, tmp_path, capsys):
    """Settings by name, an option of the run, and a call for each finished run."""
    done = SimpleNamespace(summary={"phase2": {"best_epoch": 1, "val_ppl": 2e3, "val_acc": 0.5}})
    configure, run, measure = Mock(return_value=build_config("ci")), Mock(return_value=done), Mock()
    monkeypatch.setattr("ctxkv_lib.runs.configure.configure", configure)
    monkeypatch.setattr("ctxkv_lib.experiments.run", run)
    monkeypatch.setattr("ctxkv_lib.measure.measure.measure", measure)
    plain = ["run", "--preset", "ci", "--out", str(tmp_path / "run")]
    plug_ins = {name: f"package.module:{name.title()}" for name in ("block", "loss", "attention", "mixer")}
    words = [word for name, value in plug_ins.items() for word in (f"--{name}", value)]
    assert main(plain) == 0
    assert [call.args[3] for call in (*configure.call_args_list, *run.call_args_list)] == [{}, False]
    measure.assert_not_called()
    assert "Best epoch 1: val PPL 2,000.0, val acc 50.0%" in capsys.readouterr().out
    assert main([*plain, *words, "--again", "--measure", "--set", "phase2.patience=2"]) == 0
    assert configure.call_args.args[3] == {**plug_ins, "phase2.patience": "2"}
    assert run.call_args.args[3] is True
    measure.assert_called_once_with(done)


def test_a_home_folder_is_found_in_a_path(printed_by, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path / 'nowhere'} is not a folder" in printed_by("report", "~/nowhere", code=2)


@pytest.fixture
def report_command(tmp_path):
    return [sys.executable, "-m", "ctxkv_lib", "report", str(sample_run(tmp_path / "run"))]


def test_a_terminal_that_lacks_a_character_still_shows_the_report(report_command):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([*report_command, "--lang", "ja"], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"175.7" in done.stdout


def test_a_reader_that_stops_reading_ends_the_command_quietly(report_command):
    process = subprocess.Popen(report_command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_into_a_full_disk_is_one_sentence(report_command):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(report_command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "The disk is full" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_errors_into_a_full_disk_change_no_exit_code():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "ctxkv_lib", "report", "nowhere"], stderr=full)
    assert done.returncode == 2


OUT_OF_MEMORY = {
    "host": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


@pytest.mark.parametrize(
    ("kind", "module", "function", "said"),
    [
        ("host", work, "load_frozen", "Reading the data ran out of memory (main memory); use fewer"),
        ("host", stages, "place_caches", "Preparing the model and the caches ran out of memory (main"),
        ("torch", contexts, "train_context_block", "Phase 1 ran out of memory (main memory); lower phase1"),
        ("cuda", stages, "train_attention", "Phase 2 ran out of memory (GPU); lower phase2.batch_size"),
    ],
)
def test_out_of_memory_names_the_work_and_what_to_change_and_no_other_error_is_taken_for_it(
    printed_by, tmp_path, tiny_settings, monkeypatch, kind, module, function, said
):
    monkeypatch.setattr(module, function, Mock(side_effect=OUT_OF_MEMORY[kind]))
    assert said in printed_by(*tiny_run(tmp_path / "run", tiny_settings), code=2)
    monkeypatch.setattr(module, function, Mock(side_effect=RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(tiny_run(tmp_path / "run", tiny_settings))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --samples many", "argument --samples: invalid int value: 'many'"),
        ("run --out ", "argument --out: a path must be UTF-8, not empty"),
        ("run --out o\udcffut", "argument --out: a path must be UTF-8"),
        ("report run --lang xx", "argument --lang: invalid choice: 'xx'"),
    ],
)
def test_a_wrong_value_is_refused_by_the_parser(line, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split(" "))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_the_largest_seed_prints_its_result_and_no_progress_in_a_pipe(
    printed_by, tmp_path, tiny_settings
):
    out = tmp_path / "run"
    settings = {**tiny_settings, "runtime.seed": 2**63 - 1}
    command = [sys.executable, "-m", "ctxkv_lib", *tiny_run(out, settings)]
    own = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Best epoch" in done.stdout
    assert str(out / "report.md") in done.stdout
    for language, name in (("en", "report.md"), ("ja", "report.ja.md")):
        report = printed_by("report", out, "--lang", language)
        assert report.strip() == (out / name).read_text(encoding="utf-8").strip()


@pytest.mark.slow
def test_a_trained_run_generates(printed_by, trained):
    generate = ["generate", trained.run.path, "--prompt", "the cat", "--max-new-tokens", 5]
    options = [["--temperature", 0], ["--temperature", "1e-38"], ["--seed", 2**63 - 1], ["--seed", 2**63 - 1]]
    before = torch.get_rng_state()
    coldest, cold, seeded, again = (printed_by(*generate, *each) for each in options)
    assert torch.equal(torch.get_rng_state(), before)
    assert coldest.startswith("the cat")
    assert seeded.startswith("the cat")
    assert cold == coldest
    assert again == seeded
    assert coldest == f"{ctxkv_lib.generate_text(trained.run, 'the cat', max_new_tokens=5, temperature=0)}\n"
    for options, said in (
        (["--seed", 2**63], "allowed: 0 to 2^63 - 1"),
        (["--top-k", 0], "allowed: a whole number, 1 or more"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8"),
        (["--prompt", ""], "--prompt is empty"),
    ):
        assert said in printed_by(*generate, *options, code=2)
    with pytest.raises(UserError, match="'max_tokens'; allowed: max_new_tokens, temperature, top_k, seed"):
        ctxkv_lib.generate_text(trained.run, "the cat", max_tokens=5)


@pytest.mark.slow
def test_a_trained_run_is_evaluated_on_a_file(printed_by, tmp_path, trained):
    run, data = shutil.copytree(trained.run.path, tmp_path / "run"), tmp_path / "other.jsonl"
    write_conversations(data, 3, seed=5)
    evaluate = ["evaluate", run, "--data", data]
    scores = printed_by(*evaluate, "--json")
    assert (scores["conversations"], scores["file"]) == (3, "other.jsonl")
    assert json.loads((run / "evaluation" / "other.json").read_text()) == scores
    assert (run / "evaluation" / "other.png").is_file()
    assert ctxkv_lib.evaluate_texts(run, data) == scores
    assert f"PPL {scores['ppl']:,.1f} a token" in printed_by(*evaluate)


def test_evaluations_of_different_texts_get_their_own_files(tmp_path):
    def written(name, fingerprint):
        path = evaluation_file(tmp_path, Path(name), fingerprint)
        write_json(path, {"fingerprint": fingerprint})
        return path.name

    assert written("chats.2024.jsonl", "a" * 16) == "chats.2024.json"
    assert written("chats.2025.jsonl.gz", "b" * 16) == "chats.2025.json"
    assert written("elsewhere/chats.2025.jsonl", "c" * 16) == "chats.2025-cccccc.json"
    assert written("chats.2025.jsonl", "b" * 16) == "chats.2025.json"
    for damaged in ("[]", "{"):
        (tmp_path / "evaluation" / "chats.2024.json").write_text(damaged)
        assert written("chats.2024.jsonl", "d" * 16) == "chats.2024.json"


@pytest.mark.slow
def test_compare_prints_the_table(printed_by, tmp_path, tiny_settings):
    arguments = ["compare", "--preset", "ci", "--samples", 2, 8, 2, "--out", tmp_path / "c"]
    for _ in range(2):
        printed = printed_by(*arguments, *settings_of(tiny_settings))
        for row in ("Val PPL", "Val Acc", "Best Epoch", "Val/Train Ratio", "8 samples"):
            assert row.lower() in printed.lower(), row
        assert len(json.loads((tmp_path / "c" / "comparison.json").read_text())["runs"]) == 2
        (tmp_path / "c" / "comparison.json").write_text("{")  # damaged, so that it is written anew


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(printed_by, tmp_path, tiny_settings, monkeypatch):
    def full(source, target):
        if str(target).endswith("val_ctx.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        files.shutil.move(source, target)

    arguments = tiny_run(tmp_path / "run", tiny_settings)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert "The disk is full" in printed_by(*arguments, code=2)
    assert not list((tmp_path / "run").rglob("*.part"))
    assert main(arguments) == 0


def test_ctrl_c_while_torch_loads_stops_after_it_and_a_second_one_at_once(interrupts):
    done = []
    for presses in (1, 2):
        with pytest.raises(KeyboardInterrupt), _loading():  # noqa: PT012
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            done.append(presses)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == [1]


@pytest.mark.parametrize(("line", "code"), [("settings", 0), ("report nowhere", 2)])
def test_closed_output_changes_no_exit_code(monkeypatch, line, code):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(line.split()) == code
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.slow
def test_ctrl_c_stops_with_a_sentence(tmp_path, tiny_settings):
    """A real interrupt of a real process."""
    settings = {**tiny_settings, "phase2.max_epochs": 60, "phase2.patience": 60}
    command = [sys.executable, "-m", "ctxkv_lib", *tiny_run(tmp_path / "run", settings)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored by jobs in the background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    checkpoint = tmp_path / "run" / "checkpoint" / "phase2.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "the same command goes on from there" in err
    assert checkpoint.exists()
