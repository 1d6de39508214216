import pytest
import torch

from ctxkv_lib.method.config import ModelConfig
from ctxkv_lib.method.windows import Window

POSITIONS = (0, 1, 19, 20, 21, 50, 350, 619, 620, 621, 3500)


def window(interval=20, max_contexts=32, offsets=None):
    return Window(ModelConfig(interval=interval, max_contexts=max_contexts), offsets)


def every_interval_back(position, interval):
    return range(position, -1, -interval)


@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 5), (100, 64)])
def test_slots_and_rows_are_those_of_the_definition(interval, max_contexts):
    seen, positions = window(interval, max_contexts), torch.tensor(POSITIONS)
    for i, position in enumerate(POSITIONS):
        expected = [*every_interval_back(position, interval)][:max_contexts]
        padding = [0] * (max_contexts - len(expected))
        assert seen.rows(positions)[i].tolist() == [p + 1 for p in expected] + padding
        assert (seen.slots(positions)[i] >= 0).sum() == len(expected)


def test_an_attention_plug_in_may_space_its_slots_by_itself():
    own = window(offsets=[0, 1, 5])
    assert own.slots(torch.tensor([0, 4, 5])).tolist() == [[0, -1, -5], [4, 3, -1], [5, 4, 0]]


def test_slots_are_computed_on_the_device_of_the_positions():
    positions = torch.empty(9, dtype=torch.int64, device="meta")  # refuses tensors of other devices
    assert window().rows(positions).device.type == "meta"
