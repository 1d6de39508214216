"""What the model would otherwise ignore or misread is one sentence; what transformers passes is taken."""

import pytest
import torch
from conftest import TINY, tiny_ids, tiny_model
from ctxkv_lib.hf.modeling import CACHE_NAME
from transformers import BatchEncoding, DataCollatorWithFlattening, DynamicCache

IDS = tiny_ids(12).view(2, 6)
ONE = IDS[:1]
ROWS = TINY["vocab_size"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


def packed():
    texts = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    return DataCollatorWithFlattening(return_tensors="pt")(texts)


def filled():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2), 0)
    return cache


def read(model, ids=ONE, **options):
    return {CACHE_NAME: model(ids, use_cache=True, **options)[CACHE_NAME]}


def hidden(*columns):
    """A mask of ten columns, all kept but these."""
    return torch.ones(1, 10).index_fill(1, torch.tensor(columns).long(), 0)


REFUSED = {
    "packed": (lambda m: m(**packed()), "a position id is .*packed texts must be separate rows"),
    "skipped": (lambda m: m(ONE, position_ids=torch.arange(6)[None] + 1), "a position id is"),
    "short": (
        lambda m: m(ONE, position_ids=torch.arange(5)[None]),
        r"position_ids.shape is \(1, 5\); allowed",
    ),
    "again": (lambda m: m(ONE, position_ids=torch.arange(6)[None], **read(m)), "a position id is"),
    "generate_at": (lambda m: m.generate(ONE, position_ids=torch.arange(6)[None] + 1, **GREEDY), "position"),
    "typo": (lambda m: m(ONE, attentoin_mask=torch.ones(1, 6)), "argument of forward is 'attentoin_mask'"),
    "segments": (lambda m: m(ONE, token_type_ids=torch.ones_like(ONE)), "token_type_ids is .*: 0 everywhere"),
    "not_unpacked": (
        lambda m: m(BatchEncoding({"input_ids": ONE})),
        r"input_ids is 'BatchEncoding'; allowed: a tensor; unpack a tokenizer's result with \*\*",
    ),
    "flat": (lambda m: m(ONE[0]), r"input_ids\.shape is \(6,\); allowed: .* as \[batch, length\]"),
    "empty": (lambda m: m(ONE[:, :0]), r"input_ids\.shape is \(1, 0\); allowed: one row and one token or"),
    "short_mask": (lambda m: m(ONE, torch.ones(1, 5)), r"attention_mask\.shape is .* \(1, 6 or more\)"),
    "additive_mask": (
        lambda m: m(ONE, (1 - hidden(2)) * -1e9),
        "attention_mask is 'additive'; allowed: 1 where",
    ),
    "other_mask": (lambda m: m(ONE, torch.ones(2, 6)), r"attention_mask\.shape is .* \(1, 6 or more\)"),
    "square_mask": (lambda m: m(ONE, torch.ones(1, 1, 6, 6)), r"mask\.shape is .* \(1, 6 or more\)"),
    "hides": (
        lambda m: m(ONE[:, :4], hidden(2), **read(m)),
        r"attention_mask keeps is \[5\]; allowed: \[6\]",
    ),
    "unread": (lambda m: m(ONE[:, :4], hidden()), r"attention_mask keeps is \[6\]; allowed: \[0\]"),
    "generate_hides": (
        lambda m: m.generate(tiny_ids(10)[None], attention_mask=hidden(2), **read(m), **GREEDY),
        r"attention_mask keeps is \[5\]; allowed: \[6\]",
    ),
    "large_label": (
        lambda m: m(ONE, labels=ONE * 0 + ROWS),
        rf"label is \[{ROWS}\]; allowed: 0 to {ROWS - 1}",
    ),
    "negative_label": (lambda m: m(ONE, labels=ONE * 0 - 1), r"a label is \[-1\]; allowed: .* or -100"),
    "few_labels": (lambda m: m(ONE, labels=ONE[:, :5]), r"labels\.shape is \(1, 5\); allowed: \(1, 6\)"),
    "shifted_labels": (lambda m: m(ONE, labels=ONE, shift_labels=ONE[0]), r"labels\.shape is \(6,\)"),
    "all_read": (
        lambda m: m.generate(ONE, **read(m), **GREEDY),
        "input_ids is 6; allowed: 7 or more: the 6 that",
    ),
    "other_batch": (lambda m: m(IDS, **read(m)), f"{CACHE_NAME}'s batch is 1; allowed: 2, as of input_ids"),
    "other_cache": (lambda m: m(ONE, **{CACHE_NAME: filled()}), "is 'DynamicCache'; allowed: .*ContextCache"),
    "tuple": (lambda m: m(ONE, **{CACHE_NAME: ((ONE, ONE),)}), "is 'tuple'; allowed: .*ContextCache"),
    "resized": (lambda m: m.resize_token_embeddings(ROWS + 1), f"allowed: {ROWS}, since the token table is"),
    "padded": (lambda m: m.resize_token_embeddings(pad_to_multiple_of=64), "asked for is 256; allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_contradicts_itself_is_refused(name):
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        call(tiny_model().eval())


@torch.no_grad()
def test_what_says_nothing_new_is_accepted():
    model, plain = tiny_model().eval(), tiny_model().eval()(IDS).logits
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)
    positions = mask.cumsum(1) - 1
    for options in (
        {"position_ids": torch.arange(6)[None], "cache_position": torch.arange(6)},
        {"token_type_ids": IDS * 0, "inputs_embeds": None, "output_hidden_states": False},
        {CACHE_NAME: DynamicCache()},
    ):
        assert torch.equal(model(IDS, **options).logits, plain)
    cached = read(model, attention_mask=mask, position_ids=positions.masked_fill(mask == 0, 1), ids=IDS)
    both = torch.cat([mask, mask], dim=1)
    first = model(IDS, attention_mask=both, position_ids=both.cumsum(1) - 1, **cached).logits
    cached = read(model, attention_mask=mask, ids=IDS)
    assert torch.equal(model(IDS, attention_mask=mask, **cached).logits, first)
    assert model.resize_token_embeddings() is model.resize_token_embeddings(ROWS) is model.wte


@torch.no_grad()
def test_turns_of_a_padded_conversation_read_on():
    model, mask = tiny_model().eval(), torch.ones_like(IDS)
    mask[0, :2] = 0
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # which transformers 4 refuses by itself
    positions = positions if CACHE_NAME == "cache" else {}
    for beams in (2, 1):
        said = model.generate(IDS, attention_mask=mask, num_beams=beams, **positions, **GREEDY)
    ids = torch.cat([said.sequences, IDS], dim=1)
    mask = torch.cat([mask, torch.ones_like(ids[:, 6:])], dim=1)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    found = model.generate(ids, attention_mask=mask, **{CACHE_NAME: said[CACHE_NAME]}, **GREEDY)
    assert torch.equal(found.sequences, again.sequences)


@torch.no_grad()
def test_hidden_states_are_of_all_columns():
    model = tiny_model().eval()
    found = model(IDS, output_hidden_states=True, logits_to_keep=1)
    embeddings, last = found.hidden_states
    assert torch.equal(embeddings, model.embed(IDS))
    torch.testing.assert_close(model.logits(last, IDS), model(IDS).logits)
    assert model(IDS).hidden_states is None
    made = model.generate(IDS, output_hidden_states=True, **GREEDY)
    assert [len(step) for step in made.hidden_states] == [2] * 5
