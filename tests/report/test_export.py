"""An exported model computes the same as the run's model, wherever its folder is copied."""

import shutil

import pytest
import torch
from conftest import GatedBlock, PreviousToken, tiny_ids
from hub_standin import MAIN
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxkv_lib import export
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs.opened import open_run

FILES = ("README.md", "config.json", "generation_config.json", "modeling.py", "tokenizer.json")


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    return export(finished_run, tmp_path_factory.mktemp("exported") / "model")


def logits(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids[None]).logits[0]


def test_an_export_has_the_logits_of_the_run_with_tokenizer_card_and_code(exported, trained):
    stream = trained.stream("val")
    expected = stream.logits(range(60))
    torch.testing.assert_close(logits(exported, stream.ids[:60].long()), expected, atol=1e-3, rtol=1e-3)
    assert {*FILES} <= {file.name for file in exported.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("the cat")["input_ids"] == trained.tokenizer("the cat")["input_ids"]
    assert "pipeline_tag: text-generation" in (exported / "README.md").read_text()


def test_an_export_works_from_a_copy_from_the_hub_and_as_it_was_saved_again(exported, tmp_path, hub):
    ids = tiny_ids(5)
    copy = shutil.copytree(exported, tmp_path / "elsewhere" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    hub.files |= {("me/model", MAIN, file.name): file.read_bytes() for file in copy.iterdir()}
    for place in (copy, tmp_path / "again", "me/model"):
        torch.testing.assert_close(logits(place, ids), loaded(ids[None]).logits[0])


def test_the_command_writes_beside_the_run_and_replaces_only_an_earlier_export(
    printed_by, finished_run, exported, tmp_path
):
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    assert printed_by("export", copy) == f"Exported to {copy}-model\n"
    (tmp_path / "run-model" / "old.txt").write_text("of an earlier export")
    printed_by("export", copy, tmp_path / "run-model")
    assert sorted(file.name for file in (tmp_path / "run-model").iterdir()) == sorted(
        file.name for file in exported.iterdir()
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    said = printed_by("export", copy, tmp_path / "thesis", code=2)
    assert "contains something other than an exported model; choose another folder" in said
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(finished_run, tmp_path, monkeypatch):
    to = export(finished_run, tmp_path / "model")
    monkeypatch.setattr("ctxkv_lib.report.export.model_card", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(finished_run, to)
    assert (to / "README.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_own_block_is_exported_with_its_code(tiny_config, tmp_path):
    made = run(tiny_config.replace({"phase2.max_epochs": 1}), tmp_path / "run", block=GatedBlock)
    folder = export(made)
    assert folder == tmp_path / "run-model"
    ids = open_run(made).stream("val").ids[:40]
    expected = open_run(made).stream("val").logits(range(40))
    torch.testing.assert_close(logits(folder, ids.long()), expected, atol=1e-3, rtol=1e-3)
    assert "class GatedBlock" in "".join(file.read_text() for file in folder.glob("*.py"))


def test_a_layer_of_tokens_is_refused(tiny_config, tmp_path):
    made = run(tiny_config.replace({"phase2.max_epochs": 1}), tmp_path / "run", layer=PreviousToken)
    with pytest.raises(UserError, match="reads rows of tokens, so it cannot continue a text token by token"):
        export(made)
    assert not (tmp_path / "run-model").exists()
