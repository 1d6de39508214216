"""The conversations of the recall task: the same ones each time, each pair stated once and asked for once."""

import pytest
import torch

from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.data.recall import FILLERS, KEYS, OPENERS, VALUES, pairs_in, recall_conversation
from ctxkv_lib.data.settings import DataConfig
from ctxkv_lib.data.tokens import train_stream, validation_stream
from ctxkv_lib.errors import UserError

WINDOW = 160


def recall_data(table="random", **settings):
    return DataConfig(source="recall", recall_window=WINDOW, table=table, **settings)


def words_of(row):
    return " \n ".join(message["content"] for message in recall_conversation(row, WINDOW)).split(" ")


def test_every_word_is_one_token(tokenizer):
    inner, first = (*KEYS, *VALUES, *FILLERS), OPENERS
    assert len(set(inner)) == len(inner)
    for word in [*(f" {word}" for word in inner), *first, "\n"]:
        assert len(tokenizer.encode(word)) == 1, word


def places_of(words):
    """Where each key stands: first where it is stated, then where it asks."""
    keys = set(words) & set(KEYS)
    return {key: [place for place, word in enumerate(words) if word == key] for key in keys}


@pytest.mark.parametrize("row", [0, 1, 30_007])
def test_each_pair_is_stated_once_and_asked_for_once(row):
    words = words_of(row)
    assert len(words) == WINDOW + WINDOW // 4
    found = places_of(words)
    assert set(found) == set(KEYS[row % 2 :: 2][: pairs_in(WINDOW)])  # neighbours share no key
    for stated, asked in found.values():
        assert words[stated + 1] == words[asked + 1]
        assert words[stated + 1] in VALUES
        assert 1 <= asked - stated - 1 < WINDOW


def test_distances_are_spread_over_the_window_and_over_the_places_between_slots():
    found = [places for row in range(60) for places in places_of(words_of(row)).values()]
    distances = [asked - stated - 1 for stated, asked in found]
    counts = torch.histc(torch.tensor(distances).float(), bins=8, min=1, max=WINDOW)
    assert counts.min() > 0.5 * len(distances) / 8
    places = torch.bincount(torch.tensor(distances) % 20)
    assert places.min() > 0.5 * len(distances) / 20


def test_rows_are_the_same_each_time_and_those_of_splits_differ():
    first = load_conversations(recall_data(samples=3), "train")
    assert first == load_conversations(recall_data(samples=3), "train")
    assert first.ids == load_conversations(recall_data(samples=5), "train").ids[:3]
    splits = ("train", "validation", "test")
    ids = [name for split in splits for name in load_conversations(recall_data(samples=20), split).ids]
    assert len(set(ids)) == len(ids) == 60
    with pytest.raises(UserError, match="only 10000 conversations for validation"):
        load_conversations(recall_data(validation_samples=10_001), "validation")
    with pytest.raises(UserError, match="Allowed with it: random, gpt2"):
        load_conversations(recall_data(table="cooccurrence"), "train")


def test_a_text_has_as_many_tokens_as_words(tokenizer):
    rows = load_conversations(recall_data(samples=4, validation_samples=4), "train")
    assert len(train_stream(rows, tokenizer).ids) == 4 * (WINDOW + WINDOW // 4)
    joined = validation_stream(rows, tokenizer)
    assert len(joined.ids) == 4 * (WINDOW + WINDOW // 4) + 3 * 2  # two newlines between two texts
