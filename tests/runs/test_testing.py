"""The test split of a run: scored with the kept weights, once."""

import pytest
import torch

from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.data.tokens import validation_stream
from ctxkv_lib.experiments import run
from ctxkv_lib.hf.modeling import ContextKVForCausalLM
from ctxkv_lib.runs import testing
from ctxkv_lib.runs.config import build_config


def test_the_test_split_is_scored_with_the_kept_weights(finished_run, tokenizer):
    stream = validation_stream(load_conversations(finished_run.config.data, "test"), tokenizer)
    ids = stream.ids.long()[None]
    model = ContextKVForCausalLM.from_pretrained(finished_run.path / "model").eval()
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    test = finished_run.summary["test"]
    assert test["tokens"] == ids.shape[1]
    assert test["ppl"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    assert test["acc"] == pytest.approx((logits.argmax(-1) == ids[0, 1:]).float().mean().item())
    first, second = losses.split([int(stream.starts[1]) - 1, len(losses) + 1 - int(stream.starts[1])])
    for (tokens, mean), expected in zip(test["conversations"], (first, second), strict=True):
        assert (tokens, mean) == (len(expected), pytest.approx(expected.mean().item(), rel=1e-4))


def test_it_is_scored_once_and_anew_when_its_text_changes(tiny_config, tmp_path, monkeypatch):
    finished = run(tiny_config, tmp_path / "run")
    monkeypatch.setattr(testing, "_score", None)
    assert run(tiny_config, finished.path).summary == finished.summary
    monkeypatch.setattr(testing, "_score", lambda *_: {"ppl": 1.0, "acc": 1.0, "tokens": 2})
    other = load_conversations(tiny_config.data, "validation")
    monkeypatch.setattr(testing, "load_conversations", lambda *_: other)
    assert run(tiny_config, finished.path).summary["test"]["ppl"] == 1.0


def test_a_run_can_go_without_the_test(tiny_settings, tmp_path):
    config = build_config("ci", samples=8, settings={**tiny_settings, "data.test_samples": 0})
    assert "test" not in run(config, tmp_path / "run").summary
    (tmp_path / "short.jsonl").write_text('{"text": "the"}\n' * 3)  # of which no token can be predicted
    sizes = {"data.path": str(tmp_path / "short.jsonl"), "data.validation_samples": 1, "data.test_samples": 1}
    assert testing.test_stream(build_config("ci", samples=1, settings={**tiny_settings, **sizes})) is None
