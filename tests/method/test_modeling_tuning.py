"""The model under adapters and trl's trainers: what is trained is what is saved, and the loss is its own."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TUNED, tiny_ids, tiny_model

from ctxkv_lib.method.losses import as_product

SHAPES = {"published": {}, "tuned": TUNED}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def autocast_as_before():
    """Some trainers of trl leave autocast on."""
    with torch.autocast("cpu", enabled=False):
        yield


def model_with_biases(**shape):
    model = tiny_model(attention_dropout=0.0, **shape)
    if model.model.log_unigram is not None:
        model.model.log_unigram.normal_()
    return model


class Adapted(torch.nn.Module):
    """A layer with a low-rank adapter, as peft's: not a Linear, but with the attributes of one."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.in_features = layer.in_features
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, inputs):
        return self.layer(inputs) + self.up(self.down(inputs))

    def merge(self):
        self.layer.weight.data += self.up.weight.data @ self.down.weight.data
        return self.layer


@each_shape
def test_an_adapter_of_any_linear_computes_and_trains_as_one_merged_into_the_weights(shape):
    model, ids = model_with_biases(**shape), tiny_ids(24).view(2, 12)
    linears = [
        (layer, name)
        for layer in model.modules()
        for name, part in layer.named_children()
        if type(part) is torch.nn.Linear
    ]
    model.requires_grad_(False)
    for layer, name in linears:
        setattr(layer, name, Adapted(getattr(layer, name)))
    model.train()(ids, labels=ids).loss.backward()
    for layer, name in linears:
        adapter = getattr(layer, name)
        for weight in (adapter.up.weight, adapter.down.weight):
            assert weight.grad is not None, name
            assert weight.grad.any(), name
    adapted = model.eval()(ids).logits
    for layer, name in linears:
        setattr(layer, name, getattr(layer, name).merge())
    torch.testing.assert_close(model(ids).logits, adapted, atol=1e-4, rtol=1e-4)


@each_shape
def test_states_and_table_for_code_that_multiplies_give_the_logits_of_training(shape):
    """As trl computes the loss from 1.16 on."""
    model, ids = model_with_biases(**shape).train(), tiny_ids(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for _ in range(2):  # the table belongs to the states
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        product = F.linear(states, head.weight, head.bias)
        torch.testing.assert_close(product, model(ids, attention_mask=mask).logits)
        assert model.get_output_embeddings() is None
        ids = ids.flip(1)
    hidden, table, tokens = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([2, 8, 2, 0])
    expected = hidden @ table.T + 3.0 * F.one_hot(tokens, 9)
    wide, wide_table = as_product(hidden, table, tokens, 3.0)
    torch.testing.assert_close(wide @ wide_table.T, expected)


def test_logits_in_training_survive_what_mixed_precision_does_to_outputs():
    """The copy that accelerate makes of an output, and reading them after autocast has ended."""
    model, ids = model_with_biases(**TUNED).train(), tiny_ids(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    copied = type(output)(dict(output.items()))
    torch.testing.assert_close(copied.logits, model(ids).logits, atol=0.3, rtol=0.05)


def trainable(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


SFT_ROWS = [f"The number {i} comes before {i + 1}, as it always does." for i in range(6)]


@pytest.mark.slow
def test_the_pages_examples_of_adapters_and_fine_tuning_run(saved_model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^( *)```python\n(.*?)^ *```", page)
    code = [re.sub(rf"(?m)^{indent}", "", block) for indent, block in blocks]
    code[0] = code[0].replace("runs/offline-tuned-50/model", saved_model.as_posix())
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(SFT_ROWS), encoding="utf-8")
    values = {}
    for block in code:
        exec(block.replace("max_steps=100", 'max_steps=2, save_strategy="no", use_cpu=True'), values)
    assert not {name for name in trainable(values["adapted"]) if "lora" not in name}
    trainer = values["trainer"]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    assert Path("runs/sft/model.safetensors").exists()
