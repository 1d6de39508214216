"""The recall task on models whose answers are known, and on a run."""

import pytest
import torch
from conftest import SHAPES, tiny_model

from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.data.recall import KEYS, VALUES
from ctxkv_lib.data.tokens import load_tokenizer, validation_stream
from ctxkv_lib.experiments import run
from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.report.document import write_report
from ctxkv_lib.research import recall_task as module
from ctxkv_lib.research.measure import measure
from ctxkv_lib.research.recall_task import answers, read_since, recall_task
from ctxkv_lib.runs.config import build_config

SMALL = {
    "data.recall_window": 16,
    "data.validation_samples": 3,
    "data.test_samples": 2,
    **{f"model.{name}": size for name, size in SHAPES.items()},
    "model.interval": 4,
    "phase1.max_iterations": 3,
    "phase1.context_method": "passes",
    "phase2.max_epochs": 1,
}


@pytest.fixture(scope="module")
def stream():
    config = build_config("recall", settings={"data.validation_samples": 6})
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = validation_stream(load_conversations(config.data, "validation"), tokenizer).ids
    keys = torch.tensor([tokenizer.encode(f" {key}")[0] for key in KEYS])
    values = torch.tensor([tokenizer.encode(f" {value}")[0] for value in VALUES])
    return ids, keys, values


def test_answers_are_where_a_key_comes_again(stream):
    ids, keys, values = stream
    positions, distances = answers(ids, keys, 160)
    assert len(positions) == 6 * 25
    ids = ids.long()
    assert torch.isin(ids[positions], keys).all()
    assert torch.equal(ids[positions + 1], ids[positions - distances])
    assert torch.isin(ids[positions + 1], values).all()
    assert torch.equal(ids[positions - distances - 1], ids[positions])


@pytest.mark.parametrize("anchor", ["current", "grid"])
def test_the_place_is_what_the_nearest_slot_has_read_since(anchor):
    model = tiny_model(interval=7, max_contexts=5, anchor=anchor)
    positions, distances = torch.arange(60, 90), torch.arange(30) % 13
    found = read_since(positions, distances, model)
    if anchor == "current":
        assert found.tolist() == [distance % 7 for distance in distances.tolist()]
    for position, distance, place in zip(positions.tolist(), distances.tolist(), found.tolist(), strict=True):
        stated = position - distance
        multiples = [slot for slot in range(stated, position) if slot % 7 == 0]
        slots = [position, *multiples] if anchor == "grid" else range(position, stated - 1, -7)
        assert place == min(slot - stated for slot in slots)


def test_accuracy_is_that_of_the_answers_by_where_they_were_stated(stream, monkeypatch):
    """A model that remembers what was stated up to 30 tokens ago."""
    ids, keys, _ = stream
    positions, distances = answers(ids, keys, 160)
    near = dict(zip(positions.tolist(), (distances <= 30).tolist(), strict=True))

    def scores(model, cache, asked, loop):
        right = torch.tensor([near[position] for position in asked.tolist()])
        return torch.where(right, 0.0, 5.0), right

    monkeypatch.setattr(module, "token_scores", scores)
    model = tiny_model(interval=10, max_contexts=16)
    found = recall_task(model, StreamCache(ids.int(), torch.zeros(len(ids), 1)), keys, 160)
    assert found["accuracy"] == pytest.approx((distances <= 30).float().mean().item())
    rows = found["by_distance"]
    assert [(row["from"], row["to"]) for row in rows] == [(1, 9), (10, 19), (20, 39), (40, 79), (80, 159)]
    assert [row["accuracy"] for row in (*rows[:2], *rows[3:])] == [1, 1, 0, 0]
    assert sum(row["tokens"] for row in found["by_place"]) == found["answers"] == len(positions)
    assert [row["from"] for row in found["by_place"]] == list(range(10))


def test_a_run_on_the_task_shows_it_and_another_run_does_not(tmp_path, tiny_config):
    config = build_config("recall", samples=20, settings=SMALL)
    finished = measure(run(config, tmp_path / "run"), ["recall_task"])
    assert finished.summary["recall_task"]["answers"] == 3 * 2
    assert (finished.path / "figures" / "recall_task.png").is_file()
    for language in ("en", "ja"):
        assert "recall_task.png" in write_report([finished], language)
    assert "recall_task" not in write_report([run(tiny_config, tmp_path / "other")])
