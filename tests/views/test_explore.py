"""The numbers behind the notebooks' figures and tables."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_ids, tiny_model

from ctxkv_lib.errors import UserError
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.views import explore


def test_passes_come_closer_to_the_exact_contexts_and_untrained_ones_leave_the_random_numbers_alone(trained):
    cache, before = trained.caches["val"], torch.manual_seed(1).get_state()
    errors = explore.pass_errors(trained.model, cache, trained.run.config.phase1, len(cache))
    assert errors[0] > errors[20] > errors[60]
    assert errors[-1] < 1e-9  # pass k has read k tokens, so that the last one has read them all
    contexts = explore.untrained_contexts(trained.model, cache, trained.run.config.model, passes=2)
    assert (contexts - cache.contexts[1:]).abs().max() > 0.1  # which are those of the trained block
    explore.open_run(trained.run)
    assert torch.equal(torch.get_rng_state(), before)
    in_bf16 = replace(cache, contexts=cache.contexts.bfloat16())  # as those of training may be
    same = explore.untrained_contexts(trained.model, in_bf16, trained.run.config.model, passes=2)
    assert torch.equal(same, contexts)


def test_attention_by_slot_averages_full_windows_only_and_needs_one(trained):
    weights = explore.attention_by_slot(trained, most=10**6)
    positions = torch.arange(9, len(trained.caches["val"]))
    with torch.no_grad():
        expected = trained.caches["val"].attend(trained.model, positions)[1].mean(dim=0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    model = tiny_model(max_contexts=64)
    short = StreamCache(tiny_ids(190).int(), torch.zeros(190, 16))  # the farthest slot is 189 back
    lacking = explore.Trained(trained.run, model, trained.tokenizer, {"val": short})
    with pytest.raises(UserError, match="No position has a full window"):
        explore.attention_by_slot(lacking)
    with pytest.raises(UserError, match="most is 0; allowed: 1 or more"):
        explore.attention_by_slot(trained, most=0)


def test_corpus_lengths_add_up(trained):
    corpus = explore.load_corpus(trained.run.config)
    assert int(corpus.lengths("train").sum()) == trained.run.summary["train_tokens"]
    assert len(corpus.lengths("val")) == 2
    pieces = corpus.pieces("train", 1, most=10**6)
    assert "".join(pieces) == corpus.conversations["train"].texts[1]
    for number in (-1, 8):
        with pytest.raises(UserError, match=f"conversation is {number}; allowed in train: 0 to 7"):
            corpus.pieces("train", number, most=10)
    with pytest.raises(UserError, match="split is 'test'; allowed: val, train"):
        corpus.pieces("test", 0, most=10)
    rows = explore.count_rows(trained.run.config, corpus)
    train, val = (trained.run.summary[f"{split}_tokens"] for split in ("train", "val"))
    assert [row[1] for row in rows[:4]] == ["8", f"{train:,}", f"{val:,}", f"{train // 8:,}"]
    assert rows[1][2] == "587,970"


def test_trace_says_what_each_epoch_meant(two_runs):
    notes = [row[-1] for row in explore.epoch_rows(load_run(two_runs[1]))]
    assert notes[2] == "better: weights kept"
    assert notes[-1] == "patience of 3 is used up: stop"


def test_predictions_are_the_models_own(trained):
    (row,) = explore.prediction_rows(trained, [30])
    cache = trained.caches["val"]
    with torch.no_grad():
        hidden, _ = cache.attend(trained.model, torch.tensor([30]))
        best = int(trained.model.logits(hidden, cache.ids[30:31]).argmax())
    assert row[2].startswith(repr(trained.tokenizer.decode([best])))
    assert row[3] == ("yes" if best == int(cache.ids[31]) else "no")


def test_a_guess_that_only_looks_like_the_next_token_is_wrong(trained, monkeypatch):
    monkeypatch.setattr(trained.tokenizer, "decode", lambda *_, **__: "\ufffd")  # as parts of a character
    rows = explore.prediction_rows(trained, range(30, 60))
    assert {row[1] for row in rows} == {repr("\ufffd")}
    assert "no" in [row[3] for row in rows]


def test_a_line_break_in_a_table_of_predictions_is_an_arrow(trained, monkeypatch):
    monkeypatch.setattr(trained.tokenizer, "decode", lambda *_, **__: "\n")
    (row,) = explore.prediction_rows(trained, [30])
    assert row[1] == "'↵'"
    assert "\\" not in "".join(row)


def test_a_run_whose_folder_has_gone_and_a_position_that_is_none_are_refused(trained, tmp_path):
    gone = replace(trained.run, path=tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone is not a folder; .* make it with `ctxkv run --out .*gone`\.$"):
        explore.open_run(gone)
    for position in (-1, 3.5, "5", len(trained.caches["val"])):
        with pytest.raises(
            UserError, match=f"position is {position!r}; allowed in this val .* whole number, 0"
        ):
            explore.attended_window(trained, "val", position)
