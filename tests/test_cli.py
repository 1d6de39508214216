import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_conversations
from sample_runs import sample_run

from ctxkv_lib import files
from ctxkv_lib.cli import main
from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.errors import UserError
from ctxkv_lib.files import write_json
from ctxkv_lib.runs import contexts, inputs, stages
from ctxkv_lib.runs.config import PRESETS, build_config
from ctxkv_lib.runs.inference import evaluation_file


def settings_of(values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def refused(capsys, *arguments):
    """Exit code 2 and one line on standard error, which is returned."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_help_is_light():
    """No heavy import: what makes `ctxkv --help` answer at once."""
    code = "import sys; from ctxkv_lib.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "compare" in done.stdout
    assert not {"torch", "transformers", "datasets", "matplotlib", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("load", "own", "expected"),
    [(9.0, None, "PASSIVE"), (9.0, "ACTIVE", "ACTIVE"), (0.5, None, None), (0.5, "ACTIVE", "ACTIVE")],
)
def test_threads_beside_other_work_wait_without_spinning(monkeypatch, load, own, expected):
    """Two spinning threads beside other work took four times as long as one; alone, sleeping ones twice."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["info"]) == 0
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_info_prints_the_published_sizes(capsys):
    assert main(["info", "--train-tokens", "587970", "--val-tokens", "22723"]) == 0
    text = capsys.readouterr().out
    for number in (
        "45,163,264",
        "6,301,440 (13.95%)",
        "apart: 640 tokens",
        "29,399",
        "574",
        "1,723",
        "22",
        "67",
        "2,386",
    ):
        assert number in text, number


@pytest.mark.parametrize(
    ("anchor", "held"), [("current", "621 contexts, 621 KiB"), ("grid", "32 contexts, 32 KiB")]
)
def test_info_prints_what_inference_remembers(capsys, anchor, held):
    assert main(["info", "--set", f"model.anchor={anchor}"]) == 0
    assert held in capsys.readouterr().out


def test_info_counts_the_tokens_of_a_file(capsys, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"text": " ".join(["rain"] * 100)}) for _ in range(40)))
    split = ("--set", "data.validation_samples=2", "--set", "data.test_samples=1")
    assert main(["info", "--preset", "colab", "--data", str(file), *split, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["train_tokens"]) == (37, 3_700)
    assert facts["val_tokens"] == 2 * 100 + 2  # and the newlines between both


@pytest.mark.parametrize("preset", PRESETS)
def test_info_as_json(capsys, preset):
    assert main(["info", "--preset", preset, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    known = preset == "colab"
    assert (facts["train_tokens"] == 587_970) == known
    assert (facts["caches_dense_fp32_mib"] is not None) == known
    if preset in ("colab", "offline"):
        assert facts["parameters"] == {"total": 45_163_264, "trainable_phase2": 6_301_440}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--preset", "moon"], "preset is 'moon'; allowed: colab, offline, recall, ci."),
        (["run", "--recipe", "soup"], "recipe is 'soup'; allowed"),
        (["run", "--samples", "0"], "data.samples is 0; allowed: 1 or more."),
        (["run", "--samples", "-5"], "data.samples is -5; allowed: 1 or more."),
        (["compare", "--preset", "ci", "--samples", "5"], "at least two different sample counts"),
        (["run", "--set", "phase2.batch_size"], "has no '='"),
        (
            ["run", "--set", "phase2.batch_size=big"],
            "phase2.batch_size is 'big'; allowed: a value of type int.",
        ),
        (["run", "--set", "phase2.size=3"], "allowed: phase2. followed by one of"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["run", "--preset", "offline", "--samples", "999999"], "999999"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "--train-tokens", "-5"], "--train-tokens is -5; allowed: 1 or more."),
        (["info", "--val-tokens", "0"], "--val-tokens is 0; allowed: 1 or more."),
        (
            ["run", "--preset", "ci", "--set", f"runtime.seed={2**63}"],
            f"allowed: whole numbers up to {2**63 - 1}.",
        ),
        (["evaluate", "run\nfolder", "--data", "chats.jsonl"], r"chats.jsonl does not exist"),
        (["report", "two\nlines"], r"two\nlines is not a folder"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused_before_anything_is_computed(
    capsys, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_seed_trains(tmp_path, tiny_settings):
    settings = {**tiny_settings, "runtime.seed": 2**63 - 1, "phase2.max_epochs": 1}
    assert main(["run", "--preset", "ci", "--out", str(tmp_path / "run"), *settings_of(settings)]) == 0


def test_a_home_folder_is_found_in_a_path(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_conversations(tmp_path / "chats.jsonl", 3)
    data = build_config("ci", settings={"data.source": "jsonl", "data.path": "~/chats.jsonl"}).data
    with pytest.raises(UserError, match=r"chats\.jsonl has 3 conversations"):
        load_conversations(data, "train")
    assert str(tmp_path / "nowhere") in refused(capsys, "report", "~/nowhere")


def test_a_terminal_that_lacks_a_character_still_shows_the_report(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "ctxkv_lib", "report", str(sample_run(tmp_path / "run"))]
    done = subprocess.run([*command, "--lang", "ja"], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"175.7" in done.stdout


def test_a_reader_that_stops_reading_ends_the_command_quietly(tmp_path):
    command = [sys.executable, "-m", "ctxkv_lib", "report", str(sample_run(tmp_path / "run"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_into_a_full_disk_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "ctxkv_lib", "report", str(sample_run(tmp_path / "run"))]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "The disk is full" in done.stderr


OUT_OF_MEMORY = {
    "host": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


@pytest.mark.parametrize(
    ("kind", "module", "function", "said"),
    [
        ("host", inputs, "load_table", "Reading the data ran out of memory (main memory); use fewer"),
        (
            "host",
            stages,
            "place_caches",
            "Preparing the model and the caches ran out of memory (main",
        ),
        (
            "host",
            contexts,
            "train_context_block",
            "Phase 1 ran out of memory (main memory); lower phase1",
        ),
        ("torch", contexts, "train_context_block", "Phase 1 ran out of memory (main memory)"),
        ("cuda", stages, "train_attention", "Phase 2 ran out of memory (GPU); lower phase2.batch_size"),
    ],
)
def test_out_of_memory_names_the_work_and_what_to_change(
    capsys, tmp_path, tiny_settings, monkeypatch, kind, module, function, said
):
    def exhausted(*_, **__):
        raise OUT_OF_MEMORY[kind]

    monkeypatch.setattr(module, function, exhausted)
    out = str(tmp_path / "run")
    arguments = ["run", "--preset", "ci", "--samples", "8", "--out", out, *settings_of(tiny_settings)]
    assert said in refused(capsys, *arguments)


def test_other_errors_are_not_taken_for_memory(tmp_path, tiny_settings, monkeypatch):
    def faulty(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(inputs, "load_table", faulty)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["run", "--preset", "ci", "--out", str(tmp_path / "run"), *settings_of(tiny_settings)])


def test_a_wrong_type_is_refused_by_the_parser():
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--samples", "many"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing.jsonl"),
        (b'{"messages": [\n', ", line 1"),
        (b'{"words": "hi"}\n', ", line 1"),
        (b"\xff\xfe\n", ", line 1"),
        (b'{"messages": []}\n', ", line 1 is an empty conversation"),
    ],
)
def test_bad_files_are_one_sentence_and_exit_2(capsys, tmp_path, tiny_settings, content, said):
    path = tmp_path / "missing.jsonl"
    if content is not None:
        write_conversations(path, 20)
        path.write_bytes(content + path.read_bytes())
    options = settings_of({**tiny_settings, "data.path": path})
    assert said in refused(capsys, "run", "--preset", "ci", "--out", str(tmp_path / "run"), *options)


def test_run_then_report(capsys, tmp_path, tiny_settings):
    out = tmp_path / "run"
    assert (
        main(["run", "--preset", "ci", "--samples", "8", "--out", str(out), *settings_of(tiny_settings)]) == 0
    )
    printed = capsys.readouterr().out
    assert "Best epoch" in printed
    assert str(out / "report.md") in printed
    for language in ("en", "ja"):
        assert main(["report", str(out), "--lang", language]) == 0
        name = "report.md" if language == "en" else "report.ja.md"
        assert capsys.readouterr().out.strip() == (out / name).read_text(encoding="utf-8").strip()
    assert "allowed: en, ja" in refused(capsys, "report", str(out), "--lang", "xx")


@pytest.mark.slow
def test_a_run_is_quiet_when_not_on_a_terminal(tmp_path, tiny_settings):
    command = [sys.executable, "-m", "ctxkv_lib", "run", "--preset", "ci", "--samples", "8"]
    command += ["--out", str(tmp_path / "run"), *settings_of(tiny_settings)]
    own = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_trained_run_generates_and_is_evaluated(capsys, tmp_path, tiny_settings):
    out = tmp_path / "run"
    assert (
        main(["run", "--preset", "ci", "--samples", "8", "--out", str(out), *settings_of(tiny_settings)]) == 0
    )
    capsys.readouterr()
    cold = (["--temperature", "0"], ["--temperature", "1e-38"])
    for options in (*cold, ["--seed", f"{2**63 - 1}"], ["--seed", f"{2**63 - 1}"]):
        assert main(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "5", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("the cat") for line in printed if line)
    assert printed[-1] == printed[-2]
    assert printed[0] == printed[1]

    data = tmp_path / "other.jsonl"
    write_conversations(data, 3, seed=5)
    assert main(["evaluate", str(out), "--data", str(data), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["conversations"] == 3
    assert json.loads((out / "evaluation" / "other.json").read_text()) == scores
    assert (out / "evaluation" / "other.png").is_file()
    assert scores["file"] == "other.jsonl"
    assert main(["evaluate", str(out), "--data", str(data)]) == 0
    assert f"PPL {scores['ppl']:,.1f} a token" in capsys.readouterr().out

    assert "allowed: 0 to 2^63 - 1" in refused(
        capsys, "generate", str(out), "--prompt", "a", "--seed", str(2**63)
    )
    assert "--prompt is not UTF-8" in refused(capsys, "generate", str(out), "--prompt", "caf\udce9")
    assert "--prompt is empty" in refused(capsys, "generate", str(out), "--prompt", "")
    assert "allowed: 1 or more" in refused(capsys, "generate", str(out), "--prompt", "a", "--top-k", "0")
    assert "does not exist" in refused(capsys, "evaluate", str(out), "--data", str(tmp_path / "no.jsonl"))
    assert "is not a folder" in refused(capsys, "generate", str(tmp_path / "no"), "--prompt", "a")


def test_evaluations_of_different_texts_get_their_own_files(tmp_path):
    def written(name, fingerprint):
        path = evaluation_file(tmp_path, Path(name), fingerprint)
        write_json(path, {"fingerprint": fingerprint})
        return path.name

    assert written("chats.2024.jsonl", "a" * 16) == "chats.2024.json"
    assert written("chats.2025.jsonl.gz", "b" * 16) == "chats.2025.json"
    assert written("elsewhere/chats.2025.jsonl", "c" * 16) == "chats.2025-cccccc.json"
    assert written("chats.2025.jsonl", "b" * 16) == "chats.2025.json"


@pytest.mark.slow
def test_compare_prints_the_table(capsys, tmp_path, tiny_settings):
    options = settings_of(tiny_settings)
    assert (
        main(["compare", "--preset", "ci", "--samples", "2", "8", "--out", str(tmp_path / "c"), *options])
        == 0
    )
    printed = capsys.readouterr().out
    for row in ("Val PPL", "Val Acc", "Best Epoch", "Train/Val Gap", "8 samples"):
        assert row.lower() in printed.lower(), row


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(capsys, tmp_path, tiny_settings, monkeypatch):
    def full(source, target):
        if str(target).endswith("val_ctx.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        files.shutil.move(source, target)

    arguments = ["run", "--preset", "ci", "--samples", "8", "--out", str(tmp_path / "run")]
    arguments += settings_of(tiny_settings)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert "The disk is full" in refused(capsys, *arguments)
    assert not list((tmp_path / "run").rglob("*.part"))
    assert main(arguments) == 0


@pytest.mark.slow
def test_ctrl_c_stops_with_a_sentence(tmp_path, tiny_settings):
    """A real interrupt of a real process, which then goes on to the end."""
    settings = {**tiny_settings, "phase2.max_epochs": 60, "phase2.patience": 60}
    command = [sys.executable, "-m", "ctxkv_lib", "run", "--preset", "ci", "--samples", "8"]
    command += ["--out", str(tmp_path / "run"), *settings_of(settings)]
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
