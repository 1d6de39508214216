import pytest
import torch
from conftest import cloned, tiny_method, tiny_stream

from ctxkv_lib.method import reference, scoring
from ctxkv_lib.method.scoring import effective_rank, mean_scores


def test_scores_equal_the_reference_and_use_no_dropout(monkeypatch):
    monkeypatch.setattr(scoring, "EVALUATION_ROWS", 32)
    stream, model = tiny_stream(120), tiny_method(attention_dropout=0.5).train()
    found, p = mean_scores(model, stream), cloned(model)
    ids, contexts = stream.ids.long(), stream.contexts[1:]
    expected = reference.evaluate(p, p["wte.weight"], ids, contexts, 50, model.config)
    assert found == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("max_rows", [50, 1000])
def test_effective_rank_equals_the_reference(max_rows):
    contexts = torch.randn(200, 16)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = reference.effective_rank(contexts, max_rows, generators[0])
    assert effective_rank(contexts, generators[1], max_rows) == pytest.approx(expected, abs=1e-5)
    assert effective_rank(torch.eye(16), generators[1]) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(2, 16), generators[1]) == 0.0
    assert effective_rank(torch.ones(99, 16), generators[1]) == pytest.approx(1 / 16, abs=1e-3)
