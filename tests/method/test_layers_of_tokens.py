"""A layer that reads tokens gets the history it asks for at every position, whatever the row length."""

import pytest
import torch
from conftest import PreviousToken, tiny_ids, tiny_method

from ctxkv_lib.method import windows
from ctxkv_lib.method.streams import Stream


class TwoBefore(PreviousToken):
    """A layer that reads the previous token and, in evaluation, also the token before that."""

    evaluation_history = 2

    def forward(self, embeddings, start):
        hidden = super().forward(embeddings, 0)
        further = torch.nn.functional.pad(embeddings, (0, 0, 2, 0))[:, :-2]
        return (hidden if self.training else hidden + further)[:, start:]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", [0, 1, 7])
def test_rows_give_the_same_results_as_the_whole_stream(first, training, monkeypatch):
    monkeypatch.setattr(windows, "LONGEST_ROW", 4)
    model = tiny_method(None, TwoBefore).train(training)
    ids = tiny_ids(40).int()
    positions = torch.tensor([*range(first, first + 6), 20, *range(30, 39)])
    batch = model.batch(Stream(ids), positions)
    whole = model.layer(model.embed(ids[None]), 0)[0]
    torch.testing.assert_close(model.read(batch)[0], whole[positions])
    assert torch.equal(batch.tokens, ids[positions])
    assert torch.equal(batch.targets, ids[positions + 1].long())
