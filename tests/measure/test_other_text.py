"""Scores on other text: what counts as a word, and bits per byte."""

import math

import pytest

from ctxkv_lib.measure.other_text import evaluate_texts, word_count

CHINESE = "你好，你今天过得怎么样？\n我很好，谢谢。你在用 GPT 吗？我今天读了一本关于天气和大海的书。"


def test_text_without_spaces_has_no_words():
    assert word_count(["How are you?\nFine, thank you.", "Fine."]) == 7
    assert word_count([CHINESE]) == 0


def test_bits_are_counted_per_byte_and_not_per_character(finished_run):
    scores = evaluate_texts(finished_run, [CHINESE])
    bits = scores["tokens"] * math.log2(scores["ppl"])
    assert scores["bits_per_byte"] == pytest.approx(bits / len(CHINESE.encode()))
