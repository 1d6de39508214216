"""Scores of other text: what counts as a word."""

from ctxkv_lib.measure.other_text import word_count

CHINESE = "你好，你今天过得怎么样？\n我很好，谢谢。你在用 GPT 吗？我今天读了一本关于天气和大海的书。"


def test_text_without_spaces_has_no_words():
    assert word_count(["How are you?\nFine, thank you.", "Fine."]) == 7
    assert word_count([CHINESE]) == 0
