from huggingface_hub import ModelCard
from sample_runs import sample_run

from ctxkv_lib.report.model_card import model_card
from ctxkv_lib.runs.run_folder import load_run


def finished(folder, **settings):
    run = load_run(sample_run(folder, settings=settings))
    run.summary["phase1"]["context_method"] = "exact"
    return run


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
