"""Ablations of models whose use of contexts is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_ids, tiny_method

from ctxkv_lib.method.caches import StreamCache
from ctxkv_lib.method.model import Parts
from ctxkv_lib.research import ablations as module
from ctxkv_lib.research.ablations import ablations, shuffled

WINDOW = TINY["interval"] * TINY["max_contexts"]
COPIED = 2  # the slot that a hand-made model copies from
IDS = tiny_ids(300)
for _again, _back in ((8, 4), (60, 6), (61, 6), (62, 6), (90, WINDOW)):  # and one by chance
    IDS[_again : _again + 2] = IDS[_again - _back : _again - _back + 2]


class Copying(torch.nn.Module):
    """Predicts the token that the context of one slot names; with contexts of no token, all alike."""

    def __init__(self, slot):
        super().__init__()
        self.slot = slot

    def forward(self, embeddings, window, present):
        return window[:, self.slot] if self.slot is not None else torch.zeros_like(embeddings)


def measured(slot):
    """Ablate `Copying` on contexts that name the token `COPIED` intervals later."""
    ids, size = IDS, TINY["vocab_size"]
    parts = Parts(attention=lambda _: Copying(slot))
    model = tiny_method(parts, hidden_size=size, context_dim=size, num_heads=1).eval()
    model.load_table(30 * torch.eye(size))
    later = torch.arange(300) + COPIED * TINY["interval"]  # of row p: after position p - 1
    named = F.one_hot(ids[later.clamp(max=299)], size).float()
    named[0] = 0
    starts, counts = torch.tensor([0, 100, 200]), torch.bincount(ids[:50], minlength=size)
    return ablations(model, StreamCache(ids.int(), named), WINDOW, starts, counts)


def test_a_model_that_ignores_contexts_loses_nothing_and_kinds_of_positions_are_all(monkeypatch):
    found = measured(None)
    for name, rows in {"percent": found["changed"].values(), "percent_vs_elsewhere": found["slots"]}.items():
        for changed in rows:
            assert changed[name] == changed["error"] == 0
            assert changed["ppl"] == pytest.approx(TINY["vocab_size"], rel=1e-4)
    assert found["positions"] == 299 - WINDOW
    new = int((~torch.isin(IDS[WINDOW + 1 :], IDS[:50])).sum())  # of the next tokens
    for group, first, second in (
        ("history", 64 * 3 - WINDOW, 64),
        ("frequency", new, 1),
        ("repetition", 283, 1),
    ):
        rows = [(row["from"], row["tokens"]) for row in found[f"by_{group}"]]
        assert rows == [(0, first), (second, found["positions"] - first)]
    monkeypatch.setattr(module, "POSITIONS", 40)
    assert measured(None)["positions"] == 40


def test_the_standard_error_is_that_of_the_percentage_beside_it():
    torch.manual_seed(0)
    base = torch.randn(1024) + 5
    losses = base + torch.randn(1024) + math.log(6)
    change = (losses - base).double()
    drawn = change[torch.randint(1024, (2000, 1024))].mean(dim=1).expm1() * 100
    found = module._increase(base, losses, "percent")
    assert found["percent"] == pytest.approx(100 * change.mean().expm1().item())
    assert found["error"] == pytest.approx(drawn.std().item(), rel=0.1)


def test_a_model_that_copies_from_a_slot_loses_all_without_it():
    found = measured(COPIED)
    changed = found["changed"]
    assert changed["intact"]["ppl"] == pytest.approx(1, abs=1e-3)
    assert changed["zero"]["ppl"] == pytest.approx(TINY["vocab_size"], rel=1e-4)
    for name in ("shuffled", "elsewhere", "slot_0"):
        assert changed[name]["ppl"] > 1000
    for slot in found["slots"]:
        assert (slot["ppl"] < 1.1) == (slot["slot"] == COPIED)
        assert slot["back"] == slot["slot"] * TINY["interval"]
        assert (slot["percent_vs_elsewhere"] < -90) == (slot["slot"] == COPIED)
    for group in ("by_history", "by_frequency", "by_repetition"):
        assert all(row["ppl"] < 1.1 and row["other_ppl"] > 100 for row in found[group])


@pytest.mark.parametrize("count", [90, 20, 10])
def test_other_windows_are_those_of_positions_half_the_stream_away(count):
    """Against windows changed by hand; of the shorter streams no pair of tokens comes again."""
    model, ids, first = tiny_method().eval(), torch.arange(count) * 2, min(WINDOW, count - 2)
    cache = StreamCache(ids.int(), torch.randn(count, TINY["context_dim"]))
    found = ablations(model, cache, WINDOW, torch.tensor([0]), torch.ones(TINY["vocab_size"]).long())
    positions = torch.arange(first, count - 1)
    half = (count - 1 - first) // 2
    own, far = (cache.gather(each, model.window).window for each in (positions, positions.roll(-half)))
    mixed = far.clone()
    mixed[:, 0] = own[:, 0]
    for name, window in {"intact": own, "zero": own * 0, "elsewhere": far, "slot_0": mixed}.items():
        hidden, _ = model.attend(model.embed(ids[positions]), window, torch.ones(window.shape[:2]).bool())
        expected = F.cross_entropy(model.logits(hidden, ids[positions]), ids[positions + 1]).exp()
        assert found["changed"][name]["ppl"] == pytest.approx(expected.item(), rel=1e-5)
    assert [row["from"] for row in found["by_repetition"]] == [0]


def test_shuffling_keeps_the_contexts_of_each_slot_and_parts_those_of_a_window():
    window = torch.arange(50.0)[:, None, None].expand(50, 4, 3)
    orders = shuffled(window)[..., 0].T
    for order in orders:
        assert order.sort().values.tolist() == list(range(50))
        assert (order == torch.arange(50)).float().mean() < 0.2
    assert len({tuple(order.tolist()) for order in orders}) == 4
