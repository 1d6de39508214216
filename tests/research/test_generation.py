"""How repetition is counted, and that the samples are the model's own."""

import pytest
import torch
from conftest import tiny_ids, tiny_model

from ctxkv_lib.research.generation import GENERATED, PROMPT, generation, repetition


class Words:
    eos_token_id = 210

    def decode(self, ids):
        return " ".join(str(int(token)) for token in ids)


def test_runs_and_repeats_are_counted_within_a_sample():
    found = repetition([[1, 2, 3, 1], [4, 4, 4, 5], [5]])
    assert found == {"longest_run": 3, "repeated": pytest.approx(3 / 9)}
    assert repetition([[]]) == {"longest_run": 0, "repeated": 0.0}


@torch.no_grad()
def test_samples_take_the_likeliest_token_each_time():
    model, ids = tiny_model().eval(), tiny_ids(200)
    found = generation(model, Words(), ids)
    read = ids[:PROMPT].tolist()
    while len(read) < PROMPT + GENERATED and (not read[PROMPT:] or read[-1] != Words.eos_token_id):
        read.append(model(torch.tensor([read])).logits[0, -1].argmax().item())
    assert found["sample"] == {
        "prompt": Words().decode(ids[:PROMPT]),
        "generated": Words().decode(read[PROMPT:]),
    }
    assert found["longest_run"] >= repetition([read[PROMPT:]])["longest_run"]


def test_the_text_that_goes_on_there_stands_beside():
    ids = torch.arange(300) % 200
    found = generation(tiny_model(), Words(), ids)
    assert found["text"] == {"longest_run": 1, "repeated": 0.0}
    assert generation(tiny_model(), Words(), ids[: PROMPT + GENERATED - 1]) == {}
