from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.windows import real_contexts, slot_offsets, slot_positions, theoretical_max, window_rows


def shape(interval=20, max_contexts=32, **others):
    return ModelConfig(interval=interval, max_contexts=max_contexts, **others)


@pytest.mark.parametrize("position", [0, 19, 20, 50, 350, 619, 620, 3500])
@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 5), (100, 64)])
def test_rows_are_every_interval_back(position, interval, max_contexts):
    seen = [position - interval * k for k in range(max_contexts) if position - interval * k >= 0]
    rows = window_rows(torch.tensor([position]), shape(interval, max_contexts))[0].tolist()
    assert rows == [p + 1 for p in seen] + [0] * (max_contexts - len(seen))
    assert real_contexts(torch.tensor(position), shape(interval, max_contexts)) == len(seen)


@pytest.mark.parametrize("position", [0, 1, 19, 20, 21, 50, 350, 619, 620, 621, 3500])
@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 5), (100, 64)])
def test_grid_slots_are_the_position_and_multiples_before_it(position, interval, max_contexts):
    multiples = [p for p in range(position) if p % interval == 0]
    seen = [position, *multiples[::-1]][:max_contexts]
    grid = shape(interval, max_contexts, anchor="grid")
    slots = slot_positions(torch.tensor(position), grid).tolist()
    assert [slot for slot in slots if slot >= 0] == seen
    assert all(slot < 0 for slot in slots[len(seen) :])
    assert real_contexts(torch.tensor(position), grid) == len(seen)


def test_published_examples():
    assert real_contexts(torch.tensor([50, 350, 3500]), shape()).tolist() == [3, 18, 32]
    assert window_rows(torch.tensor([3500]), shape())[0, -1].item() - 1 == 2880
    assert theoretical_max(587_970, 20) == 29_399


@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 2), (7, 3), (1, 32), (3, 4)])
def test_geometric_slots_rise_without_a_gap_to_the_reach_of_uniform_ones(interval, max_contexts):
    offsets = slot_offsets(shape(interval, max_contexts, slots="geometric"))
    steps = [further - nearer for nearer, further in pairwise(offsets)]
    assert len(offsets) == max_contexts
    assert (offsets[0], offsets[-1]) == (0, interval * (max_contexts - 1))
    assert all(step >= 1 for step in steps)
    assert max_contexts < 3 or steps[0] == 1


def test_geometric_slots_are_counted_back_from_the_position():
    geometric = shape(slots="geometric")
    offsets = slot_offsets(geometric)
    assert offsets[:16] == [*range(14), 16, 20]
    for position in (0, 1, 13, 15, 619, 620, 3500):
        seen = [position - offset for offset in offsets if offset <= position]
        slots = slot_positions(torch.tensor(position), geometric).tolist()
        assert slots[: len(seen)] == seen
        assert all(slot < 0 for slot in slots[len(seen) :])
        assert real_contexts(torch.tensor(position), geometric) == len(seen)


@pytest.mark.parametrize("settings", [{}, {"slots": "geometric"}, {"anchor": "grid"}])
def test_slots_are_counted_on_the_device_of_the_positions(settings):
    with FakeTensorMode():  # tensors that hold nothing and refuse to meet those of another device
        positions = torch.empty(9, dtype=torch.int64, device="cuda")
        assert real_contexts(positions, shape(**settings)).device.type == "cuda"
