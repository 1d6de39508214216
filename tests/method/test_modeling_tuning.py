"""The model under adapters and trl's trainers: what is trained is what is saved, and the loss is its own."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TUNED, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from ctxkv_lib.method.losses import as_product
from ctxkv_lib.method.modeling import ContextKVForCausalLM

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


def test_a_block_is_in_training_as_far_as_it_is_trained():
    """An adapter drops out, and layers that pack their weights for inference must not do so."""
    model = tiny_model()
    block = model.model.context_block
    assert not model.train().model.context_block.training
    block.linear = Adapted(block.linear)
    assert all(part.training for part in model.train().modules())
    assert not any(part.training for part in model.eval().modules())


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


@pytest.mark.slow
def test_a_saved_adapter_loads_onto_a_frozen_base(saved_model, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(saved_model, trust_remote_code=True)
    assert trainable(base) == {
        f"model.{n}" for n in base.model.trained_weights() if n.startswith(("attention", "feed_forward"))
    }
    options = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, options)
    assert all("lora" in name for name in trainable(adapted))
    adapted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert not {name for name in trainable(loaded) if "lora" not in name}
    ids = tiny_ids(10)[None]
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(input_ids=ids).logits)


def test_quantised_weights_are_loaded_frozen_and_used(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = tiny_model(hidden_size=32, context_dim=32, num_heads=2, intermediate_size=32).eval()
    model.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_8bit=True)
    loaded = ContextKVForCausalLM.from_pretrained(tmp_path, quantization_config=options).eval()
    kinds = {type(layer).__name__ for layer in loaded.modules()}
    assert "Linear8bitLt" in kinds
    assert not any(weight.requires_grad for weight in loaded.parameters() if not weight.is_floating_point())
    ids = tiny_ids(10)[None]
    exact = model(ids).logits
    assert (loaded(ids).logits.float() - exact).abs().mean() < 0.05 * exact.std()


SFT_ROWS = [f"The number {i} comes before {i + 1}, as it always does." for i in range(6)]


@pytest.mark.slow
def test_the_sft_trainer_of_trl_has_the_models_own_loss(saved_model, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(saved_model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    options = trl.SFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    rows = Dataset.from_dict({"text": SFT_ROWS})
    trainer = trl.SFTTrainer(
        model, options, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model.train(), dict(batch))
    expected = ContextKVForCausalLM.forward(model, **batch).loss
    torch.testing.assert_close(loss, expected)
    assert isinstance(trainer.evaluate()["eval_loss"], float)


@pytest.mark.slow
def test_the_pages_examples_of_adapters_and_fine_tuning_run(saved_model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    code = re.findall(r"(?s)```python\n(.*?)```", page)
    code[0] = code[0].replace("runs/offline-tuned-50/model", saved_model.as_posix())
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(SFT_ROWS), encoding="utf-8")
    values = {}
    for block in code:
        short = '"max_steps": 2, "save_strategy": "no", "use_cpu": True'
        exec(block.replace('"max_steps": 100', short), values)
    assert not {name for name in trainable(values["adapted"]) if "lora" not in name}
    assert Path("runs/sft/model.safetensors").exists()
    assert not torch.is_autocast_enabled("cpu")  # in which trl trains by default
