import pytest
import torch
from conftest import tiny_method

POSITIONS = (0, 1, 19, 20, 21, 50, 350, 619, 620, 621, 3500)


@pytest.mark.parametrize(("interval", "max_contexts"), [(20, 32), (1, 1), (7, 5), (100, 64)])
def test_slots_and_rows_equal_their_definition(interval, max_contexts):
    seen = tiny_method(interval=interval, max_contexts=max_contexts).window
    positions = torch.tensor(POSITIONS)
    for i, position in enumerate(POSITIONS):
        expected = [*range(position, -1, -interval)][:max_contexts]
        padding = [0] * (max_contexts - len(expected))
        assert seen.rows(positions)[i].tolist() == [p + 1 for p in expected] + padding
        assert (seen.slots(positions)[i] >= 0).sum() == len(expected)


def test_slots_are_computed_on_the_device_of_the_positions():
    positions = torch.empty(9, dtype=torch.int64, device="meta")  # cannot be mixed with other devices
    assert tiny_method().window.rows(positions).device.type == "meta"
