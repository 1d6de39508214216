import pytest
import torch

from ctxkv_lib.model.windows import real_contexts, slot_positions, theoretical_max, window_rows


@pytest.mark.parametrize("position", [0, 19, 20, 50, 350, 619, 620, 3500])
@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 5), (100, 64)])
def test_rows_are_every_interval_back(position, interval, max_contexts):
    seen = [position - interval * k for k in range(max_contexts) if position - interval * k >= 0]
    rows = window_rows(torch.tensor([position]), interval, max_contexts, "current")[0].tolist()
    assert rows == [p + 1 for p in seen] + [0] * (max_contexts - len(seen))
    assert real_contexts(position, interval, max_contexts) == len(seen)


@pytest.mark.parametrize("position", [0, 1, 19, 20, 21, 50, 350, 619, 620, 621, 3500])
@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 5), (100, 64)])
def test_grid_slots_are_the_position_and_multiples_before_it(position, interval, max_contexts):
    multiples = [p for p in range(position) if p % interval == 0]
    seen = [position, *multiples[::-1]][:max_contexts]
    slots = slot_positions(torch.tensor(position), interval, max_contexts, "grid").tolist()
    assert [slot for slot in slots if slot >= 0] == seen
    assert all(slot < 0 for slot in slots[len(seen) :])
    assert real_contexts(position, interval, max_contexts, "grid") == len(seen)


def test_published_examples():
    counts = [real_contexts(position, 20, 32) for position in (50, 350, 3500)]
    assert counts == [3, 18, 32]
    assert window_rows(torch.tensor([3500]), 20, 32, "current")[0, -1].item() - 1 == 2880
    assert theoretical_max(587_970, 20) == 29_399
