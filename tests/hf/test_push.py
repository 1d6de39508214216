"""A model folder on its way to the Hub: `ctxkv push`, and the fields of its card."""

from unittest.mock import Mock

import pytest
from conftest import tiny_model
from huggingface_hub import HfApi, ModelCard
from sample_runs import write_run

from ctxkv_lib.files import write_json
from ctxkv_lib.report.model_card import model_card
from ctxkv_lib.runs.run_folder import load_run


def finished(folder, **settings):
    run = load_run(write_run(folder, settings=settings))
    run.summary["phase1"]["context_method"] = "exact"
    return run


@pytest.fixture
def with_model(tmp_path):
    folder = write_run(tmp_path / "run")
    write_json(folder / "model" / "config.json", {"model_type": "context_kv"})
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("options", [[], ["--private"]])
def test_push_uploads_the_model_folder_and_nothing_else(hub, with_model, monkeypatch, printed_by, options):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    printed = printed_by("push", with_model, "me/mine", *options)
    assert printed.strip().endswith("/me/mine")
    model = with_model / "model"
    assert hub.uploaded == {f"me/mine/{file.name}": file.read_bytes() for file in model.iterdir()}
    (asked,) = hub.created  # which huggingface_hub 2 words differently
    assert (asked.get("private") or asked.get("visibility") == "private") == bool(options)


def test_a_model_that_is_uploaded_as_it_is_saved_has_its_code(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    (tmp_path / "mine.py").touch()
    tiny_model().save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine")
    names = {name.removeprefix("me/mine/") for name in hub.uploaded}
    assert {file.name for file in tmp_path.glob("*.py")} - names == {"mine.py"}
    assert {"config.json", "model.safetensors"} <= names


@pytest.mark.parametrize(
    ("status", "repo", "sentence"),
    [
        (401, "me/mine", "could not be uploaded to me/mine on the Hugging Face Hub"),
        (503, "me/mine", "log in with `hf auth login` (a token that may write), and check the name"),
        (None, "not a name", "not a name"),
    ],
)
def test_what_the_hub_refuses_is_said(hub, with_model, printed_by, status, repo, sentence):
    hub.status = status
    assert sentence in printed_by("push", with_model, repo, code=2)
    assert not hub.uploaded


def test_an_upload_that_hf_xet_gives_up_is_said(hub, with_model, printed_by, monkeypatch):
    lost = Mock(side_effect=RuntimeError("Data processing error: CAS service error"))
    monkeypatch.setattr(HfApi, "upload_folder", lost)
    said = printed_by("push", with_model, "me/mine", code=2)
    assert "could not be uploaded to me/mine on the Hugging Face Hub (RuntimeError: Data processing" in said


def test_a_run_without_a_model_is_not_pushed(tmp_path, printed_by):
    said = printed_by("push", write_run(tmp_path / "run"), "me/mine", code=2)
    assert "has no model for transformers, since one of its plug-ins cannot be saved; push another" in said


def test_the_card_has_the_runs_numbers_and_licence_language_and_datasets_in_the_hubs_fields(tmp_path):
    run = finished(tmp_path / "run")
    card, best = model_card(run), run.summary["phase2"]
    assert card.startswith("---\n")
    assert "{" not in card
    for number in (f"{best['val_ppl']:,.1f}", f"{run.summary['parameters']['total']:,}"):
        assert number in card
    fields = ModelCard(card).data
    assert (fields.license, fields.language, fields.library_name) == ("mit", "en", "transformers")
    assert fields.datasets == ["HuggingFaceH4/ultrachat_200k"]
    scores = {result.metric_type: result.metric_value for result in fields.eval_results}
    assert scores == {"perplexity": best["val_ppl"], "accuracy": best["val_acc"]}
    run.summary["test"] = {"ppl": 200.0, "acc": 0.2}
    assert {r.dataset_split for r in ModelCard(model_card(run)).data.eval_results} == {"validation", "test"}
    own = {"data.source": "file", "data.path": "mine.jsonl"}  # of which nothing is claimed
    fields = ModelCard(model_card(finished(tmp_path / "own", **own))).data
    assert (fields.license, fields.language, fields.datasets) == ("unknown", None, None)
