"""The test split and the yardsticks of a run: their values, and that each is measured once."""

import math

import pytest
import torch

from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.data.tokens import load_tokenizer, validation_stream
from ctxkv_lib.experiments import run
from ctxkv_lib.files import read_sealed_json, write_sealed_json
from ctxkv_lib.hf.modeling import ContextKVForCausalLM
from ctxkv_lib.report.measured import over_conversations
from ctxkv_lib.research import measure
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.records import FILE, MEASURES
from ctxkv_lib.runs.run_folder import RunFolder


@pytest.fixture
def finished(tiny_config, tmp_path):
    return run(tiny_config, tmp_path / "run")


def test_the_test_split_is_measured_with_the_kept_weights(finished, tiny_config):
    tokenizer = load_tokenizer(tiny_config.data.tokenizer)
    ids = validation_stream(load_conversations(tiny_config.data, "test"), tokenizer).ids.long()[None]
    model = ContextKVForCausalLM.from_pretrained(finished.path / "model").eval()
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    test = finished.summary["test"]
    came = list(zip(ids[0, :-1].tolist(), ids[0, 1:].tolist(), strict=True))
    again = torch.tensor([pair in came[max(0, i - 639) : i] for i, pair in enumerate(came)])
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert 0 < test["repeated_tokens"] == again.sum()
    assert test["repeated_ppl"] == pytest.approx(losses[again].mean().exp().item(), rel=1e-4)
    assert test["tokens"] == ids.shape[1]
    assert test["ppl"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item(), rel=1e-4
    )
    assert test["acc"] == pytest.approx((logits.argmax(-1) == ids[0, 1:]).float().mean().item())


def test_each_conversation_of_the_test_has_its_loss():
    losses = torch.tensor([1.0, 2, 3, 4, 5, 6])  # of the tokens from the second on
    parts = measure._parts(losses, torch.tensor([0, 3, 4]))
    assert [part.tolist() for part in parts] == [[1, 2], [3], [4, 5, 6]]
    assert [part.tolist() for part in measure._parts(losses, torch.tensor([0, 1]))] == [[1, 2, 3, 4, 5, 6]]


def test_their_mean_is_the_perplexity(finished):
    test = finished.summary["test"]
    tokens, losses = zip(*test["conversations"], strict=True)
    assert len(tokens) > 1
    assert sum(tokens) == test["tokens"] - 1
    mean, _ = over_conversations(tokens, losses)
    assert test["ppl"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_each_is_measured_once(finished, tiny_config, monkeypatch):
    for name in ("probe", "ablate", "_generation", "_test", "_yardsticks"):
        monkeypatch.setattr(measure, name, None)
    assert run(tiny_config, finished.path).summary == finished.summary
    monkeypatch.setattr(measure, "_test", lambda *_: {"ppl": 1.0, "acc": 1.0, "tokens": 2})
    monkeypatch.setitem(measure.CODE, "test", "new code")
    again = run(tiny_config, finished.path).summary
    assert again["test"]["ppl"] == 1.0
    assert again["yardsticks"] == finished.summary["yardsticks"]


def test_a_run_can_go_without_the_test(tiny_settings, tmp_path):
    config = build_config("ci", samples=8, settings={**tiny_settings, "data.test_samples": 0})
    summary = run(config, tmp_path / "run").summary
    assert "test" not in summary
    assert not any("test_ppl" in found for found in summary["yardsticks"].values())


@pytest.mark.parametrize("own", [False, True])
def test_a_yardstick_counts_what_the_table_is_made_from(tiny_config, tmp_path, monkeypatch, own):
    """The training text of a file of one's own is in its table already, and is counted once."""
    streams = {"train": torch.tensor([1, 2]), "val": torch.tensor([3, 4])}
    monkeypatch.setattr(measure, "load_ids", lambda _, split: streams[split])
    monkeypatch.setattr(measure, "corpus_counts", lambda *_: None)
    monkeypatch.setattr(measure, "corpus_ids", lambda _: torch.tensor([5, 1, 2]))
    monkeypatch.setattr(measure, "yardsticks", lambda train, *_: {"kneser_ney_cache": train.tolist()})
    data = {"data.table": "cooccurrence"}
    if own:
        data |= {"data.source": "file", "data.path": "chats.jsonl", "data.corpus": "chitchat+own"}
    found = measure._yardsticks(tiny_config.replace(data), RunFolder(tmp_path), {})
    counted = [5, 1, 2] if own else [5, 1, 2, 1, 2]
    assert found == {"kneser_ney_cache": [1, 2], "kneser_ney_table_cache": counted}
    said: list[str] = []
    monkeypatch.setattr(measure, "say", said.append)
    monkeypatch.setattr(measure, "MOST_COUNTED", 4)
    found = measure._yardsticks(tiny_config.replace(data), RunFolder(tmp_path), {})
    assert found == {"kneser_ney_cache": [1, 2]}
    assert said == ["No n-grams of the table's text: 3 tokens are too many (4)."]


def test_a_run_from_before_the_test_split_is_taken_up(finished, tiny_config):
    """Its configuration lacks the setting, which stands for the preset's own."""
    records = read_sealed_json(finished.path / FILE)
    del records["config"]["data"]["test_samples"]
    for name in (*MEASURES, "results"):
        records["stages"].pop(name, None)
    write_sealed_json(finished.path / FILE, records)
    assert run(tiny_config, finished.path).summary == finished.summary
