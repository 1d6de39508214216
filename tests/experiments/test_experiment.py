import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import NearestTwo, stop_at, write_conversations
from disturbed_runs import outcome

from ctxkv_lib import experiments as experiment
from ctxkv_lib.data.counts import unigram_floor
from ctxkv_lib.data.embeddings import TokenTable, corpus_counts
from ctxkv_lib.errors import Stopped, UserError
from ctxkv_lib.experiments import compare, prepare, run
from ctxkv_lib.hf.copying_streams import as_served
from ctxkv_lib.hf.modeling import CACHE_NAME
from ctxkv_lib.method import oacd as phase1
from ctxkv_lib.method.evaluation import evaluate, perplexity
from ctxkv_lib.report.info import gathered_mib
from ctxkv_lib.research import measure as measuring
from ctxkv_lib.runs import contexts, trained, work
from ctxkv_lib.runs.caches import load_cache
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.differences import run_folders
from ctxkv_lib.runs.listing import list_runs
from ctxkv_lib.runs.records import Records
from ctxkv_lib.runs.run_folder import RunFolder, comparison_folder, load_run, run_folder_of
from ctxkv_lib.runs.trained import load_trained, open_run
from ctxkv_lib.runs.work import Work, read_texts
from ctxkv_lib.views import figures

FILES = {f"caches/{split}_{part}.safetensors" for split in ("train", "val") for part in ("ctx", "emb")}
FILES |= {f"checkpoint/{name}.safetensors" for name in ("attention", "context_block")}
FILES |= {f"figures/{name}.png" for name in ("memory", "phase1", "ppl_curves")}
FILES |= {"checkpoint/stages.json", "model/README.md", "model/config.json", "model/model.safetensors"}
FILES |= {"config.json", "metrics.jsonl", "report.ja.md", "report.md", "summary.json"}


def without_memory(metric):
    return {name: value for name, value in metric.items() if name != "memory"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("copy_weight", [0.0, 0.2])
def test_a_tuned_run_is_served_as_it_was_trained(tiny_settings, tmp_path, copy_weight):
    """Slots, slot bias, output, averaged weights, log-frequencies and so on all go into the saved model."""
    corpus = {"data.corpus_samples": 2, "data.validation_samples": 2, "phase2.max_epochs": 3}
    own = {**tiny_settings, **corpus, "attention.copy_weight": copy_weight}
    config = build_config("ci", "tuned", 6, own)
    made = run(config, tmp_path / "run")
    model, _ = load_trained(made.path, torch.device("cpu"))
    counts = corpus_counts(config.data).weight.numpy()
    expected = torch.from_numpy(unigram_floor(counts)).log().float()
    torch.testing.assert_close(model.log_unigram, expected)
    assert model.current_token_bias == -5
    assert_served(made)


def assert_served(made):
    """The saved model has the validation perplexity that training ended with, read in one go or in parts."""
    model, _ = load_trained(made.path, torch.device("cpu"))
    held_out, cache, logits = load_cache(made.path / "caches", "val"), None, []
    ids = held_out.ids[None].long()
    loss, _ = evaluate(model, as_served(model, held_out))
    assert perplexity(loss) == pytest.approx(made.summary["phase2"]["val_ppl"], rel=1e-5)
    with torch.no_grad():
        for part in ids[:, :-1].split(29, dim=1):
            out = model(part, use_cache=True, **{CACHE_NAME: cache})
            cache = out[CACHE_NAME]
            logits.append(out.logits[0])
        whole = model(ids[:, :-1]).logits[0]
    for found in (torch.cat(logits), whole):
        served = torch.nn.functional.cross_entropy(found, ids[0, 1:]).exp().item()
        assert served == pytest.approx(perplexity(loss), rel=1e-4)


def test_a_run_with_look_ups_is_served_as_it_was_trained(tiny_settings, tmp_path):
    shapes = {"block.last_tokens": 4, "model.num_heads": 3, "model.context_dim": 24}
    config = build_config("ci", "look_up", 6, {**tiny_settings, **shapes})
    made = run(config, tmp_path / "run")
    attention = load_trained(made.path, torch.device("cpu"))[0].attention.attention
    assert attention.sink.mean() > 9  # it began at 10,
    assert attention.k.weight.abs().median() < 0.02  # and most of what heads compare at 0
    assert_served(made)


def test_a_run_leaves_what_the_contract_names(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(experiment, "save", figures.save)  # not `light_runs`
    torch.set_num_threads(2)
    folder = run(tiny_config.replace({"runtime.threads": "1"}), tmp_path / "run").path
    assert torch.get_num_threads() == 2  # as before
    torch.set_num_threads(1)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found >= FILES
    assert not [name for name in found if ".part" in name or ("phase" in name and "safetensors" in name)]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in folder.glob("figures/*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples"] == 8
    assert summary["context_window"]["tokens"] == 12
    assert summary["context_window"]["theoretical_max"] == summary["train_tokens"] // 3 + 1
    assert summary["phase1"]["contexts_max_error"] <= tiny_config.phase1.tolerance
    assert [e["epoch"] for e in summary["phase2"]["epochs"]] == [1, 2, 3]
    made = summary["provenance"]["precision"], summary["train_tokens"], summary["val_tokens"]
    expected = gathered_mib(made[1], made[2], tiny_config.model, made[0])
    assert summary["caches_mib"] == expected
    stages_seen = [entry["stage"] for entry in summary["memory"]]
    made = ["data loaded", "model built", "phase 1 done", "phase 2 prepared"]
    assert stages_seen == [*made, "epoch 1", "epoch 2", "epoch 3"]
    assert [(m["stage"], m.get("iteration") or m.get("epoch")) for m in lines_of(folder)] == [
        *(("phase1", i) for i in range(2, 6)),
        *(("phase2", e) for e in (1, 2, 3)),
    ]


@pytest.mark.parametrize("recipe", ["published", "exact"])
def test_both_recipes_run_on_a_grid_too(tiny_settings, tmp_path, recipe):
    settings = {**tiny_settings, "model.anchor": "grid"}
    grid = run(build_config("ci", recipe, 8, settings), tmp_path / "grid")
    assert grid.config.recipe == recipe
    assert (grid.summary["phase1"]["contexts_max_error"] is None) == (recipe == "published")
    assert "on multiples of 3" in (tmp_path / "grid" / "report.md").read_text(encoding="utf-8")


def test_preparing_makes_what_a_run_needs_and_a_finished_run_is_left_and_reused(
    tiny_config, tmp_path, monkeypatch
):
    before = torch.get_rng_state()
    prepared = prepare(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(contexts, "_train_block", None)  # done: not to be made again
    prepare(tiny_config.replace({"phase2.patience": 1}), tmp_path / "other")
    assert lines_of(tmp_path / "other") == lines_of(tmp_path / "run")
    finished = run(tiny_config, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)  # the user's own random numbers
    for part in ("phase1", "parameters"):
        assert finished.summary[part] == prepared.record[part]
    prepare(tiny_config, tmp_path / "run")
    assert load_run(tmp_path / "run").metrics == finished.metrics
    monkeypatch.setattr(Work, "model", None)  # not to be called
    heard = []
    again = run(tiny_config, tmp_path / "run", heard.append)
    assert again.summary == finished.summary
    assert [without_memory(metric) for metric in heard] == lines_of(tmp_path / "run")
    file, moved = Path(tiny_config.data.path), tmp_path / "moved.jsonl"
    file.rename(moved)
    config = tiny_config.replace({"data.path": str(moved)})
    with RunFolder(tmp_path / "run").claimed(config):
        pass
    assert load_run(tmp_path / "run").config == tiny_config
    assert run(config, tmp_path / "run").summary == finished.summary
    assert load_run(tmp_path / "run").config == config


def test_a_comparison_stopped_between_its_runs_says_what_is_kept(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "run", Mock(side_effect=KeyboardInterrupt))
    configs = [tiny_config.replace({"data.samples": samples}) for samples in (4, 8)]
    with pytest.raises(Stopped) as stopped:
        compare(configs, tmp_path, tmp_path / "both")
    assert str(stopped.value) == "Stopped. Finished stages are kept; run the cell again."


def test_a_stop_before_and_after_training_is_calm(tiny_config, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "read_texts", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(trained, "load_trained", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(measuring, "measurement_key", Mock(side_effect=KeyboardInterrupt))
    text = tmp_path / "text.jsonl"
    write_conversations(text, 2)
    for start in (
        partial(run, tiny_config, tmp_path / "run"),
        partial(experiment.prepare, tiny_config, tmp_path / "run"),
        partial(measuring.measure, finished_run),
        partial(trained.generate_text, finished_run, "a"),
        partial(trained.evaluate_texts, finished_run, text),
    ):
        with pytest.raises(Stopped, match=r"^Stopped\. Finished stages are kept; run the cell again\.$"):
            start()


@pytest.mark.parametrize("line", ["5", "[]", "{}", "half"])
def test_a_stop_beside_damaged_metrics_is_calm(finished_run, tmp_path, monkeypatch, line):
    out = shutil.copytree(finished_run.path, tmp_path / "run")
    (out / "metrics.jsonl").write_text(f"{line}\n", encoding="utf-8")
    monkeypatch.setattr(experiment, "run_stages", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(Stopped, match="Finished stages are kept"):
        run(finished_run.config, out)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [("phase1", 3), ("phase2", 1), ("phase2", 2)])
def test_an_interrupted_run_goes_on(finished_run, tmp_path, stopped_at, monkeypatch, saved_at_every_step):
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(finished_run.config, out, stop_at(*stopped_at))
    said = {"phase1": "Finished stages are", "phase2": f"Epochs 1 to {stopped_at[1]} are"}[stopped_at[0]]
    said = "Epoch 1 is" if stopped_at == ("phase2", 1) else said
    assert stopped.value._render_traceback_() == [f"Stopped. {said} kept; run the cell again."]
    if stopped_at[0] == "phase2":
        monkeypatch.setattr(contexts, "_train_block", None)  # finished: not to be made again
        monkeypatch.setattr(contexts, "_make_caches", None)
    else:
        assert (out / "checkpoint" / "phase1.safetensors").is_file()
        monkeypatch.setattr(phase1, "draw_contexts", None)  # no new beginning
    run(finished_run.config, out)
    assert outcome(out) == outcome(finished_run.path)


def test_a_stage_has_another_key_where_what_it_depends_on_is_another(finished_run, monkeypatch):
    """Runs share stages by their keys: one that lacks something would be taken from a run of other inputs."""
    folder, config = RunFolder(finished_run.path), finished_run.config
    folder.records = Records.read(folder.path)  # as if it were claimed
    made, phase1 = Work(config, read_texts(config), folder, print), folder.records.stages["phase1"]
    train, val = made.texts.values()
    table, shared = TokenTable(made.table.weight, "another"), ["caches", "phase2"]

    def keys(record=phase1):
        found = made.phase1_key(), made.caches_key(record), made.phase2_key(record)
        return dict(zip(["phase1", *shared], found, strict=True))

    before = keys()
    for where, name, value, changed in (
        (made, "config", {"model.context_dim": 8}, ["phase1", "phase2"]),
        (made, "config", {"model.interval": 4}, ["phase2"]),
        (made, "config", {"phase1.learning_rate": 0.5}, ["phase1"]),
        (made, "config", {"phase2.learning_rate": 0.5}, ["phase2"]),
        (made, "config", {"runtime.seed": 1}, ["phase1"]),
        (made, "config", {"runtime.embedding_cache": "dense"}, shared),
        (made, "config", {"runtime.context_cache": "streamed"}, shared),
        (made, "config", {"data.tokenizer": "gpt2"}, ["phase1"]),
        (made, "config", {"loss": "ctxkv_lib.method.oacd:oacd_loss"}, ["phase1"]),
        (made, "config", {"attention": NearestTwo}, ["phase2"]),
        (made, "texts", {"train": val, "val": val}, ["phase1"]),
        (made, "texts", {"train": train, "val": train}, shared),
        (made, "table", table, ["phase1"]),
        (made, "counts", table, ["phase2"]),
        (made, "precision", "another", shared),
        (work, "STREAMING", (128, *work.STREAMING[1:]), shared),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, config.replace(value) if name == "config" else value)
            assert [stage for stage, key in keys().items() if key != before[stage]] == changed, value
    for record in (replace(phase1, key="another"), replace(phase1, files={})):
        assert [stage for stage, key in keys(record).items() if key != before[stage]] == shared


def test_dense_and_gathered_embeddings_give_the_same_run(finished_run, tmp_path):
    gathered, config = finished_run.summary, finished_run.config
    dense = run(config.replace({"runtime.embedding_cache": "dense"}), tmp_path / "dense").summary
    assert dense["phase2"]["val_ppl"] == pytest.approx(gathered["phase2"]["val_ppl"], rel=1e-5)
    held, layout = dense["caches_mib"], dense["caches_dense_fp32_mib"]
    assert held["train_emb"] >= layout["train_emb"] > gathered["caches_mib"]["train_emb"]


def test_a_folder_of_another_run_or_of_none_is_refused(finished_run, tmp_path):
    other = finished_run.config.replace({"phase2.patience": 1})
    before = (finished_run.path / "summary.json").read_bytes()
    with pytest.raises(UserError, match=r"phase2\.patience 3 \(asked: 1\); name another folder"):
        run(other, finished_run.path)
    assert (finished_run.path / "summary.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        run(other, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        run(other, tmp_path / "full" / "thesis.tex")
    (tmp_path / "web").mkdir()
    none = "has a config.json without a configuration; name another folder"
    for content, said in {
        '{"port": 80}': "another version of ctxkv_lib",
        **dict.fromkeys(["{}", "[]", '{"preset": "ci", "recipe": "exact", "data": 3}'], none),
    }.items():
        (tmp_path / "web" / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            run(other, tmp_path / "web")
        assert (tmp_path / "web" / "config.json").read_text() == content


def test_a_folder_that_another_process_began_meanwhile_is_left_to_it(tiny_config, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def taken(*_):
        folder.path.mkdir()
        folder.config.touch()
        raise UserError("in use")

    monkeypatch.setattr(folder, "_taken", taken)
    with pytest.raises(UserError, match="in use"), folder.claimed(tiny_config):
        pass
    assert folder.config.is_file()


def test_a_home_folder_is_expanded(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(tiny_config, "~/run").path == load_run("~/run").path == tmp_path / "run"
    assert (
        run_folder_of(tiny_config, "~").parent == comparison_folder([tiny_config] * 2, "~").parent == tmp_path
    )
    assert [listed.path for listed in list_runs("~")] == run_folders("~") == [tmp_path / "run"]
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} holds a run"):
        compare([tiny_config, tiny_config.replace({"data.samples": 4})], out="~/run")


def test_a_run_whose_token_table_cannot_be_made_again_is_refused(tiny_config, tmp_path):
    table = {"data.table": "cooccurrence", "data.corpus": "chitchat+own", "data.corpus_samples": 5}
    config = tiny_config.replace(table)
    made = run(config, tmp_path / "run")
    with Path(config.data.path).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more conversation, which only the table reads"}) + "\n")
    with pytest.raises(UserError, match=r"The text of the token table has changed since .*run was trained"):
        open_run(made)


def test_streams_shorter_than_a_window_are_refused(tiny_config, tmp_path):
    long = tiny_config.replace({"model.max_contexts": 500})
    said = (
        r"The train stream has \d+ tokens, no more than one context window .* set model.max_contexts to (\d+)"
    )
    with pytest.raises(UserError, match=said) as refused:
        run(long, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    cure = int(re.search(said, str(refused.value)).group(1))
    prepare(tiny_config.replace({"model.max_contexts": cure}), tmp_path / "run")


def test_runs_have_their_own_default_folders():
    plain, more = build_config("offline"), build_config("offline", samples=100)
    changed = build_config("offline", settings={"phase2.patience": 2})
    names = [run_folder_of(c).as_posix() for c in (plain, more)]
    assert names == ["runs/offline-exact-50", "runs/offline-exact-100"]
    assert run_folder_of(changed).name.startswith("offline-exact-50-")
    assert comparison_folder([more, plain]).name == "offline-exact-100-vs-50"


def test_the_folder_of_a_run_follows_the_content_of_its_file_and_not_its_name(tmp_path, monkeypatch):
    def folder(path):
        return run_folder_of(build_config("ci", settings={"data.source": "file", "data.path": path}))

    for name, count in (("a.jsonl", 12), ("b.jsonl", 12), ("inside/a.jsonl", 13)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_conversations(tmp_path / name, count)
    monkeypatch.chdir(tmp_path)
    first = folder("a.jsonl")
    assert first == folder("b.jsonl") == folder(str(tmp_path / "a.jsonl"))
    monkeypatch.chdir("inside")
    assert folder("a.jsonl") != first
    assert folder("none.jsonl") != folder("nothing.jsonl")


def test_compare_reuses_runs_and_says_what_was_gained(tiny_settings, tmp_path):
    configs = [build_config("ci", samples=n, settings=tiny_settings) for n in (8, 2)]
    first = run(configs[0], str(run_folder_of(configs[0], str(tmp_path))))
    heard = []
    out = comparison_folder(configs, tmp_path)
    left = [out / ".report.md.1.part", out / "figures" / ".memory.png.1.part"]
    for part in left:  # by a process that was killed
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    runs = compare(configs, str(tmp_path), listener=heard.append)
    assert not any(part.exists() for part in left)
    assert [r.summary["samples"] for r in runs] == [2, 8]
    assert {m["samples"] for m in heard} == {2, 8}
    assert runs[1].summary == first.summary
    written = json.loads((out / "comparison.json").read_text())
    assert written["runs"] == [r.summary for r in runs]
    with pytest.raises(UserError, match="holds another comparison"):  # of as many conversations
        compare([each.replace({"phase2.max_epochs": 1}) for each in configs], tmp_path, out)
    small, large = (r.summary["phase2"] for r in runs)
    assert written["improvement"] == {
        "val_ppl_percent": pytest.approx(100 * (small["val_ppl"] - large["val_ppl"]) / small["val_ppl"]),
        "val_acc_points": pytest.approx(100 * (large["val_acc"] - small["val_acc"])),
    }
    found = {p.name for p in out.rglob("*") if p.is_file()}
    assert found >= {"report.md", "report.ja.md", "ppl_curves.png", "phase1.png", "memory.png"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("", "", "is a file"),
        ("config.json", "{}", "holds a run"),
        ("checkpoint/stages.json", "{}", "holds a run"),
        ("comparison.json", '{"runs": [{"samples": 2}, {"samples": 9}]}', "holds another comparison"),
        ("comparison.json", "[3]", "holds another comparison"),
        ("report.md", "mine", "is not empty and holds no comparison"),
        ("figures/memory.png", "mine", "is not empty and holds no comparison"),
    ],
)
def test_a_comparison_overwrites_nothing_else(tiny_config, tmp_path, monkeypatch, name, content, said):
    monkeypatch.setattr(experiment, "run", None)
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    configs = [tiny_config.replace({"data.samples": samples}) for samples in (2, 8)]
    with pytest.raises(UserError, match=f"out {said}; name another folder with --out"):
        compare(configs, tmp_path, tmp_path / "out")
    assert file.read_text() == content


def test_compare_checks_the_largest_before_it_computes(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "run", None)
    configs = (build_config("ci", samples=n, settings=tiny_settings) for n in (2, 800))  # any iterable
    with pytest.raises(UserError, match="800"):
        compare(configs, tmp_path, tmp_path / "out")
