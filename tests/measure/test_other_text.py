"""Scores of other text: what counts as a word."""

import pytest

from ctxkv_lib.measure.other_text import word_count


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["How are you?\nFine, thank you."], 6),
        (["How are you?", "Fine."], 4),
        (["你好，你今天过得怎么样？\n我很好，谢谢。你在用 GPT 吗？我今天读了一本关于天气和大海的书。"], 0),
        (["こんにちは"], 0),
    ],
)
def test_text_without_spaces_has_no_words(texts, count):
    assert word_count(texts) == count
