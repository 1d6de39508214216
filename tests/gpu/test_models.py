"""What is done with a trained model on a GPU."""

import pytest
import torch
from conftest import tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from ctxkv_lib.hf.modeling import CACHE_NAME
from ctxkv_lib.method.copying import Copying
from ctxkv_lib.views import explore

CUDA = torch.device("cuda")


def test_a_saved_model_computes_and_generates_as_on_a_cpu(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(place) for place in ("cuda", "cpu")]
    ids = tiny_ids(40).view(2, 20)
    found, expected = (model(ids.to(model.device), labels=ids.to(model.device)) for model in models)
    assert found.logits.is_cuda
    torch.testing.assert_close(found.logits.cpu(), expected.logits)
    torch.testing.assert_close(found.loss.cpu(), expected.loss)
    first = ids[:, :9]
    found, expected = (
        model.generate(first.to(model.device), max_new_tokens=8, do_sample=False) for model in models
    )
    assert torch.equal(found.cpu(), expected)


def test_a_pickled_model_may_come_back_by_way_of_a_cpu(tmp_path):
    model, ids = tiny_model().eval().to("cuda"), tiny_ids(40).view(2, 20).to("cuda")
    expected = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", map_location="cpu", weights_only=False)
    torch.testing.assert_close(loaded.to("cuda")(ids).logits, expected)


@pytest.mark.parametrize("texts", [1, 3])
def test_texts_that_copy_are_read_on_without_a_wait(card, texts):
    model = tiny_model().eval().to("cuda")
    model.attention.copying = Copying(0.3, 4.0)
    ids = tiny_ids(20 * texts).view(texts, 20).to("cuda")
    with torch.inference_mode():
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True)[CACHE_NAME]
        before = card.waits.total()
        found = model(ids[:, -1:], use_cache=True, **{CACHE_NAME: cache}).logits[:, -1]
        assert card.waits.total() == before
    torch.testing.assert_close(found.cpu(), whole.cpu())


def test_explorers_open_a_run_of_a_gpu(train_on):
    trained = explore.open_run(train_on())
    torch.testing.assert_close(explore.attention_by_slot(trained).sum(dim=1), torch.ones(3))
    assert len(explore.attended_window(trained, "val", 30).slots) == 4
    assert explore.prediction_rows(trained, [30])
