"""Both phases and saved models give the same numbers on a GPU as on a CPU, and the CPU seldom waits."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_method, tiny_model, tiny_stream
from transformers import AutoModelForCausalLM

from ctxkv_lib.method.callback import Callback
from ctxkv_lib.method.config import Phase1Config, Phase2Config
from ctxkv_lib.method.contexts import distinct_rows, exact_contexts
from ctxkv_lib.method.modeling import CACHE_NAME
from ctxkv_lib.method.oacd import train_context_block
from ctxkv_lib.method.optimizer import Stepper
from ctxkv_lib.method.phase2 import train_layer, train_step
from ctxkv_lib.method.streams import Stream

pytestmark = pytest.mark.usefixtures("gpu")
PLACES = (torch.device("cuda"), torch.device("cpu"))
WIDTH = TINY["context_dim"]
COPIES = {"layer": {"name": "SlotLayer", "settings": {"copy_weight": 0.3}}}


def test_phase_1_and_exact_contexts_equal_those_of_a_cpu():
    """There is no noise and no random start, since a GPU draws different random numbers."""
    found = []
    for device in PLACES:
        model = tiny_method().to(device)
        model.set_phase(1)
        embeddings, tokens = distinct_rows(model, tiny_ids(700))
        config = Phase1Config(max_iterations=6, batch_size=100, noise_std=0.0, initial_std=0.0)
        generator = torch.Generator(device).manual_seed(0)
        block = model.context_block
        result, contexts = train_context_block(block, embeddings, tokens, WIDTH, config, generator)
        before = torch.zeros(WIDTH, device=device)
        exact = exact_contexts(block, block.project_inputs(embeddings), tokens, before, 1e-6)
        found.append((torch.tensor(result.convergence_rate), contexts.cpu(), exact.cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


class Waits(Callback):
    """A callback that records how often the CPU has waited by the end of each iteration."""

    def __init__(self, waits):
        self.waits, self.found = waits, [0]

    def after_round(self, state, metric):
        self.found.append(self.waits())


def test_an_iteration_of_phase_1_waits_at_most_twice_for_any_number_of_batches(waits):
    model, callback = tiny_method().to("cuda"), Waits(waits)
    model.set_phase(1)
    rows, generator = distinct_rows(model, tiny_ids(700)), torch.Generator("cuda").manual_seed(0)
    config = Phase1Config(batch_size=50)
    train_context_block(model.context_block, *rows, WIDTH, config, generator, callback=callback)
    counts = [after - before for before, after in zip(callback.found[1:], callback.found[2:], strict=False)]
    assert counts
    assert max(counts) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phase_2_reaches_the_same_perplexity_as_on_a_cpu(dtype):
    stream, losses = tiny_stream(299), []
    for device in PLACES:
        model = tiny_method(attention_dropout=0.0).to(device)
        train = Stream(stream.ids, stream.contexts.to(dtype)).map(lambda tensor: tensor.to(device))  # noqa: B023
        config = Phase2Config(max_epochs=2, batch_size=64)
        losses.append([epoch["val_ppl"] for epoch in train_layer(model, train, stream, config, 3).epochs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 0.02)


def test_a_step_of_phase_2_never_waits_for_the_gpu(waits):
    model = tiny_method().to("cuda").train()
    stepper = Stepper(model.trained_weights(), Phase2Config(), 128)
    cache = tiny_stream(128).map(lambda tensor: tensor.to("cuda"))
    table, total = model.wte.weight.detach(), torch.zeros((), device="cuda")
    order = torch.arange(128, device="cuda")
    model.window.rows(order)  # the first call moves the offsets to the GPU
    before = waits()
    for batch in model.batches(cache, order, 32):
        total += train_step(model, table, stepper, batch)
    assert waits() == before


def test_a_batch_is_copied_back_to_the_cpu_completely():
    """If `to` did not wait for the copy, the batch would be read before it has arrived completely."""
    batch = tiny_method().batch(tiny_stream(64), torch.arange(8))
    copied = batch.to(PLACES[0]).to(PLACES[1])
    for value, expected in zip(copied.inputs, batch.inputs, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("parts", [{}, COPIES])
def test_a_saved_model_computes_and_generates_as_on_a_cpu(tmp_path, parts):
    tiny_model(parts=parts).save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained
    models = [load(tmp_path, trust_remote_code=True).eval().to(place) for place in PLACES]
    ids = tiny_ids(40).view(2, 20)
    found, expected = (model(ids.to(model.device), labels=ids.to(model.device)) for model in models)
    assert found.logits.is_cuda
    torch.testing.assert_close(found.logits.cpu(), expected.logits)
    torch.testing.assert_close(found.loss.cpu(), expected.loss)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found, expected = (model.generate(ids[:, :9].to(model.device), **options) for model in models)
    assert torch.equal(found.cpu(), expected)


def test_a_pickled_model_may_be_loaded_on_a_cpu_first(tmp_path):
    model, ids = tiny_model().eval().to("cuda"), tiny_ids(40).view(2, 20).to("cuda")
    expected = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", map_location="cpu", weights_only=False)
    torch.testing.assert_close(loaded.to("cuda")(ids).logits, expected)


@pytest.mark.parametrize("parts", [{}, COPIES])
@pytest.mark.parametrize("texts", [1, 3])
def test_a_token_is_generated_without_a_wait(waits, texts, parts):
    model = tiny_model(parts=parts).eval().to("cuda")
    ids = tiny_ids(20 * texts).view(texts, 20).to("cuda")
    with torch.inference_mode():
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True)[CACHE_NAME]
        before = waits()
        found = model(ids[:, -1:], attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}).logits[:, -1]
        assert waits() == before
    torch.testing.assert_close(found.cpu(), whole.cpu())
    assert whole.shape == (texts, TINY["vocab_size"])
