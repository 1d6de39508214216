"""The forward pass as transformers calls it."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.hf.configuration import ContextKVConfig
from ctxkv_lib.hf.modeling import CACHE_NAME, LONG, ContextKVForCausalLM

from ctxkv_lib.runs.models import parameter_counts


def test_the_published_shapes_are_the_defaults_and_the_inner_width_follows_the_hidden_size():
    with torch.device("meta"):
        model = ContextKVForCausalLM(ContextKVConfig())
    assert parameter_counts(model) == {"total": 45_163_264, "trainable_phase2": 6_301_440}
    assert ContextKVConfig(hidden_size=96).intermediate_size == 384
    config = ContextKVConfig(hidden_size=96, intermediate_size=40, use_cache=False)
    assert (config.intermediate_size, config.num_hidden_layers, config.use_cache) == (40, 1, False)


@pytest.mark.parametrize("field", ["interval", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [24.0, True])
def test_a_count_is_a_whole_number_also_where_loading_replaces_it(field, value, tmp_path):
    sentence = rf"model\.{field} is {value}; allowed: a whole number, 1 or more\."
    with pytest.raises(ValueError, match=sentence):
        ContextKVConfig(**{"num_heads": 1, field: value})
    tiny_model(num_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        ContextKVForCausalLM.from_pretrained(tmp_path, **{field: value})


@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(1000, 768), (211, 24)])
def test_a_fresh_model_guesses(vocab_size, hidden_size):
    model, ids = tiny_model(vocab_size=vocab_size, hidden_size=hidden_size), tiny_ids(200)[None]
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(vocab_size), abs=0.5)


def test_a_part_of_the_user_keeps_the_init_of_its_constructor(own_module):
    name = own_module(
        "my_embedding",
        "import torch\nfrom ctxkv_lib.method.model import ContextBlock\n\n"
        "class Own(ContextBlock):\n"
        "    def __init__(self, context_dim, hidden_size):\n"
        "        super().__init__(context_dim, hidden_size)\n"
        "        self.places = torch.nn.Embedding(3, 2)\n"
        "        torch.nn.init.zeros_(self.places.weight)\n",
    )
    model = tiny_model(plugins={"block": {"plugin": f"{name}:Own", "settings": {}}})
    assert not model.context_block.places.weight.any()
    assert model.wte.weight.any()


@pytest.mark.parametrize(("phase", "trained"), [(1, {"context_block"}), (2, {"attention", "feed_forward"})])
def test_only_the_phase_gets_gradients(phase, trained):
    model = tiny_model()
    model.set_phase(phase)
    ids = tiny_ids(20)[None]
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in gradients} == trained
    assert all(gradient is not None for gradient in gradients.values())  # else a distributed wrapper stops
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    assert zero == ({"attention.k.bias"} if phase == 2 else set())  # it cannot change the softmax
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_frozen_block_makes_the_same_contexts_in_training():
    model, ids = tiny_model(attention_dropout=0.0), tiny_ids(20)[None]
    model.context_block.register_forward_hook(lambda block, _, made: F.dropout(made, 0.5, block.training))
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.set_phase(1)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_refused_call_reads_nothing():
    model, ids = tiny_model().eval(), tiny_ids(20)[None]
    cache = model(ids, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="a label is"):
        model(ids, labels=ids * 0 - 1, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 20


def test_attentions_are_of_all_columns_and_come_if_asked_as_a_tuple_does():
    model, ids = tiny_model(kv_method="variable").eval(), tiny_ids(12).view(2, 6)
    out = model(ids, output_attentions=True, logits_to_keep=1)
    (weights,) = out.attentions
    assert weights.shape == (2, TINY["num_heads"], 6, TINY["max_contexts"])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, TINY["num_heads"], 6))
    assert weights[:, :, 0, 1:].eq(0).all()  # position 0 has one context
    assert out.logits.shape == (2, 1, TINY["vocab_size"])
    assert model(ids).attentions is None
    named = model(ids, labels=ids, output_attentions=True)
    loss, logits, (weights,) = model(ids, labels=ids, output_attentions=True, return_dict=False)
    for found, expected in ((loss, named.loss), (logits, named.logits), (weights, named.attentions[0])):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [20, LONG + 1])
def test_autocast_rounds_what_is_computed_from_contexts_and_not_the_contexts(length):
    """As a trainer in bf16 has it; rounded on and on, contexts would drift, and long texts never agree."""
    model, ids = tiny_model().eval(), tiny_ids(length)[None]
    states = []
    with torch.no_grad():
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found = model(ids, use_cache=True)
            states.append(found[CACHE_NAME].state)
    assert torch.equal(*states)
    assert found.logits.dtype == torch.bfloat16


def test_a_model_may_be_exported_before_it_is_called():
    model, ids = tiny_model().eval(), tiny_ids(20)[None]
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    torch.testing.assert_close(exported(ids, use_cache=False).logits, model(ids).logits)
