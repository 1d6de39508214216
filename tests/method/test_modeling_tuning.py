"""Adapters and trl's trainers work with the model, and they train with the model's own loss."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TUNED, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from ctxkv_lib.method.modeling import ContextKVForCausalLM

SHAPES = {"published": {}, "tuned": TUNED}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def autocast_as_before():
    """Switch autocast off, since some trainers of trl leave it on."""
    with torch.autocast("cpu", enabled=False):
        yield


def model_with_biases(**shape):
    model = tiny_model(attention_dropout=0.0, **shape)
    if model.model.log_unigram is not None:
        model.model.log_unigram.normal_()
    return model


@each_shape
def test_adapters_on_all_linear_layers_train_and_equal_the_merged_weights(shape):
    """A frozen block is in training mode only if it has an adapter, which may use dropout."""
    peft = pytest.importorskip("peft")
    model, ids = model_with_biases(**shape).train(), tiny_ids(24).view(2, 12)
    linears = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    assert not model.model.context_block.training
    options = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, options).train()
    assert all(part.training for part in model.modules())
    model(ids, labels=ids).loss.backward()
    gradients = [weight.grad for weight in adapted.parameters() if weight.requires_grad]
    assert len(gradients) == 2 * len(linears)
    assert all(gradient.any() for gradient in gradients)
    logits = adapted.eval()(input_ids=ids).logits
    assert not any(part.training for part in model.modules())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_logits_in_training_survive_what_mixed_precision_does_to_outputs():
    """Accelerate copies the output."""
    model, ids = model_with_biases(**TUNED).train(), tiny_ids(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    copied = type(output)(dict(output.items()))
    torch.testing.assert_close(copied.logits.float(), model(ids).logits, atol=0.3, rtol=0.05)


def test_quantized_weights_are_loaded_frozen_and_used(tmp_path):
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
def test_the_pages_examples_run_and_trl_has_the_models_own_loss(saved_model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    code = re.findall(r"(?s)```python\n(.*?)```", page)
    code[0] = re.sub('(?m)^folder = ".*"$', f'folder = "{saved_model.as_posix()}"', code[0])
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(SFT_ROWS), encoding="utf-8")
    values = {}
    for block in code:
        short = '"max_steps": 2, "save_strategy": "no", "use_cpu": True'
        exec(block.replace('"max_steps": 100', short), values)
    trained = [name for name, weight in values["adapted"].named_parameters() if weight.requires_grad]
    assert all("lora" in name for name in trained)
    ids = tiny_ids(10)[None]
    torch.testing.assert_close(values["adapted"](ids).logits, values["base"].eval()(ids).logits)
    assert Path("runs/sft/model.safetensors").exists()
    assert not torch.is_autocast_enabled("cpu")  # trl trains under autocast by default
    model = AutoModelForCausalLM.from_pretrained(saved_model, trust_remote_code=True).train()
    options = values["SFTConfig"]("runs/fp32", bf16=False, gradient_checkpointing=False, **values["settings"])
    datasets = {"train_dataset": values["lines"], "eval_dataset": values["lines"]}
    trainer = values["SupervisedTrainer"](model, options, processing_class=values["tokenizer"], **datasets)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, ContextKVForCausalLM.forward(model, **batch).loss)
    assert isinstance(trainer.evaluate()["eval_loss"], float)
