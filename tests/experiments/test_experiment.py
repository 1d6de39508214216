"""A run writes the promised files, resumes where it was stopped, and is never mistaken for another run."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import flip, lasting, lines_of, outcome, stop_at

from ctxkv_lib.errors import Interrupted, UserError
from ctxkv_lib.experiments import compare, prepare, run
from ctxkv_lib.files import read_json, read_tensors
from ctxkv_lib.method.scoring import mean_scores, perplexity
from ctxkv_lib.runs import contexts, device, training
from ctxkv_lib.runs.build import WEIGHTS
from ctxkv_lib.runs.folders import run_folder_of
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.views import figures

SAVE = figures.save
FILES = {f"figures/{name}.png" for name in ("memory", "phase1", "ppl_curves")}
FILES |= {f"steps/{name}.json" for name in ("settings", "phase2", "test", "results")}
FILES |= {"config.json", "metrics.jsonl", "report.ja.md", "report.md", "summary.json", "weights.safetensors"}


def test_a_run_writes_all_promised_files(tmp_path, tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(figures, "save", SAVE)  # undo `light_runs`: draw the figures
    folder = run(tiny_config, tmp_path / "run").path
    epochs = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "Phase 2" in line]
    assert epochs == [f"Phase 2, epoch {number} of at most 3" for number in (1, 2, 3)]  # as in a script
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == FILES | {".lock"}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in folder.glob("figures/*"))
    shown = re.findall(r"\((figures/.+?)\)", (folder / "report.md").read_text(encoding="utf-8"))
    assert {*shown} == {name for name in FILES if name.startswith("figures/")}
    summary = read_json(folder / "summary.json")
    assert summary["samples"] == 8
    assert summary["context_window"]["tokens"] == 12
    assert summary["context_window"]["theoretical_max"] == summary["train_tokens"] // 3 + 1
    assert [e["epoch"] for e in summary["phase2"]["epochs"]] == [1, 2, 3]
    contexts = sum(summary["caches_mib"][f"{split}_ctx"] for split in ("train", "val"))
    assert contexts <= summary["caches_dense_fp32_mib"]["total"]
    stages_seen = [entry["stage"] for entry in summary["memory"]]
    made = ["data loaded", "model built", "phase 1 done", "phase 2 prepared"]
    assert stages_seen == [*made, "epoch 1", "epoch 2", "epoch 3"]
    assert [(m["stage"], m.get("iteration") or m.get("epoch")) for m in outcome(folder)["metrics"]] == [
        *(("phase1", i) for i in range(2, 6)),
        *(("phase2", e) for e in (1, 2, 3)),
    ]


def test_a_finished_run_is_reused(finished_run):
    heard = []
    written = (finished_run.path / "summary.json").stat().st_mtime_ns
    again = run(finished_run.config, finished_run.path, heard.append)
    assert (again.summary, again.metrics) == (finished_run.summary, finished_run.metrics)
    assert heard == [{**line, "replayed": True} for line in again.metrics]
    assert (finished_run.path / "summary.json").stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["published", "exact", "tuned"])
def test_a_stopped_run_resumes_and_reaches_the_same_numbers(tiny_settings, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    config = build_config("ci", recipe, 6, tiny_settings)
    whole, out = run(config, tmp_path / "whole" / "run"), tmp_path / "stopped" / "run"
    for stopped_at in (("phase1", 3), ("phase2", 1), ("phase2", 2)):
        with pytest.raises(Interrupted, match=r"^Stopped\. Finished steps and saved epochs are kept"):
            run(config, out, stop_at(*stopped_at))
    heard = []
    run(config, out, heard.append)
    assert outcome(out) == outcome(whole.path)
    epochs = [metric["epoch"] for metric in heard if metric["stage"] == "phase2"]
    assert epochs == [e["epoch"] for e in whole.summary["phase2"]["epochs"]]
    run(config, out, lambda metric: heard.append(metric) if "replayed" not in metric else None)
    assert len(heard) == len(whole.metrics)  # nothing is trained again


def test_a_run_that_is_stopped_within_an_epoch_writes_every_metric_once(
    tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    config, heard = tiny_config.replace({"phase2.batch_size": 4}), []
    whole, out = run(config, tmp_path / "whole" / "run"), tmp_path / "stopped" / "run"

    def stop_within_epoch_3(metric):
        if metric["stage"] == "phase2" and (metric["epoch"], metric.get("step")) == (3, 50):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(Interrupted):
            run(config, out, stop_within_epoch_3)
    lines = [str(line) for line in lines_of(out)]
    assert len({*lines}) == len(lines)
    assert lines_of(out)[-1]["step"] == 50
    run(config, out, heard.append)
    assert outcome(out) == outcome(whole.path)
    trained = [(line["stage"], line["epoch"], line.get("step")) for line in heard if "replayed" not in line]
    steps = [line["step"] for line in lines_of(out) if line.get("epoch") == 3 and "step" in line]
    assert trained == [("phase2", 3, step) for step in [*steps, None]]
    said = [line for line in capsys.readouterr().err.splitlines() if "tokens:" not in line]
    assert said == 2 * ["Phase 2 continues after epoch 2."]


def test_a_run_that_is_stopped_after_its_best_epoch_keeps_that_epoch_and_ends_as_early(
    tiny_settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    far = {"phase2.learning_rate": 0.3, "phase2.max_epochs": 12, "phase2.patience": 2}
    config = build_config("ci", "exact", 8, tiny_settings | far | {"runtime.precision": "fp32"})

    def stop_where_it_gets_worse(metric):
        if not metric.get("improved", True):
            raise KeyboardInterrupt

    whole, out = run(config, tmp_path / "whole" / "run"), tmp_path / "stopped" / "run"
    with pytest.raises(Interrupted):
        run(config, out, stop_where_it_gets_worse)
    opened = open_run(run(config, out))
    assert outcome(out) == outcome(whole.path)
    assert whole.summary["phase2"]["stop_reason"] == "early_stopping"
    saved = perplexity(mean_scores(opened.model, opened.streams["val"])[0])
    epochs = opened.run.summary["phase2"]["epochs"]
    assert saved == pytest.approx(min(epoch["val_ppl"] for epoch in epochs), rel=1e-5)


def test_a_run_that_fails_leaves_the_users_own_folder(tiny_config, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / ".notes").write_text("my notes")
    untrained = tiny_config.replace({"phase1.max_iterations": 0})
    with pytest.raises(UserError, match=r"^Phase 1 trains nothing here"):
        run(untrained, own, loss=torch.std)
    assert (own / ".notes").read_text() == "my notes"


def test_a_run_whose_contexts_come_back_with_other_bytes_trains_from_the_first_epoch(
    tiny_config, tmp_path, monkeypatch, own_store, capsys
):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)
    with pytest.raises(Interrupted):
        run(tiny_config, tmp_path / "run", stop_at("phase2", 2))
    shutil.rmtree(own_store)
    compute = contexts.exact_contexts
    monkeypatch.setattr(contexts, "exact_contexts", lambda *arguments: 1.001 * compute(*arguments))
    found, expected = run(tiny_config, tmp_path / "run"), run(tiny_config, tmp_path / "other" / "run")
    assert lasting(found.summary) == lasting(expected.summary)
    said = capsys.readouterr().err
    assert "starts again from its first epoch, since its contexts are gone" in said


def test_a_run_keeps_its_precision_on_a_device_that_would_choose_another(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"amx_bf16"})
    prepare(tiny_config, tmp_path / "run")
    monkeypatch.setattr(device, "_cpu_flags", set)
    assert run(tiny_config, tmp_path / "run").summary["provenance"]["precision"] == "bf16"


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)  # as on a T4
    assert device.choose_precision("auto", torch.device("cuda")) == "fp32"


def test_a_run_leaves_the_settings_of_torch_as_they_were(finished_run, tiny_config, tmp_path, monkeypatch):
    def state():
        flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        return *flags, torch.get_num_threads(), torch.get_rng_state().tolist()

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(threads + 1)
    try:
        before = state()
        prepare(tiny_config.replace({"runtime.threads": "1"}), tmp_path / "run")
        open_run(finished_run)
        assert state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


def test_dense_and_gathered_embeddings_give_the_same_run(finished_run, tmp_path):
    dense = run(finished_run.config.replace({"runtime.embedding_cache": "dense"}), tmp_path / "dense")
    expected = finished_run.summary["phase2"]["val_ppl"]
    assert dense.summary["phase2"]["val_ppl"] == pytest.approx(expected, rel=1e-5)
    held, layout = dense.summary["caches_mib"], dense.summary["caches_dense_fp32_mib"]
    assert held["train_emb"] >= layout["train_emb"] > finished_run.summary["caches_mib"]["train_emb"]
    assert open_run(dense).streams["val"].embeddings.shape[1] == dense.config.model.hidden_size


def test_an_opened_run_has_the_trained_weights_and_damage_is_refused(trained, finished_run, tmp_path):
    weights = read_tensors(finished_run.path / WEIGHTS)
    assert {*trained.model.state_dict()} - {*weights} == {"wte.weight"}
    for name, weight in weights.items():
        assert torch.equal(trained.model.state_dict()[name], weight)
    assert not trained.model.training
    assert trained.tokenizer.decode(trained.streams["val"].ids[:40].tolist())
    copy = Path(shutil.copytree(finished_run.path, tmp_path / "run"))
    flip(copy / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged; repair it with .* --again"):
        open_run(copy)


@pytest.mark.slow
def test_a_comparison_resumes_and_refuses_the_folder_of_another_one(tiny_config, tmp_path):
    configs = [tiny_config.replace({"data.samples": count}) for count in (8, 4)]
    out, heard = tmp_path / "both", []
    with pytest.raises(Interrupted):
        compare(configs, tmp_path, out, stop_at("phase2", 1))
    runs = compare(configs, tmp_path, out, heard.append, workers=2)
    found = read_json(out / "comparison.json")
    assert [run["samples"] for run in found["runs"]] == [4, 8]
    assert found["folders"] == [run_folder_of(config).name for config in reversed(configs)]
    first, last = (run.summary["phase2"] for run in runs)
    expected = 100 * (1 - last["val_ppl"] / first["val_ppl"])
    assert found["improvement"]["val_ppl_percent"] == pytest.approx(expected)
    assert {metric["samples"] for metric in heard} == {4, 8}
    assert (out / "report.md").is_file()
    compare(configs, tmp_path, out)
    with pytest.raises(UserError, match="contains another comparison; choose another folder"):
        compare([*configs, tiny_config.replace({"data.samples": 5})], tmp_path, out)
    with pytest.raises(UserError, match="are asked for; ask for fewer"):
        compare([tiny_config, tiny_config.replace({"data.samples": 10**6})], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="is not empty and does not contain a comparison; choose another"):
        compare(configs, tmp_path, runs[0].path)
