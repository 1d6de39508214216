"""Plug-ins as a user would write them, for tests of several files."""

from dataclasses import dataclass

from torch import nn


class GRUMixer(nn.Module):
    """A mixer whose hidden states are those of a GRU that reads each row from its beginning."""

    history = 8

    @dataclass(frozen=True)
    class Settings:
        input_dropout: float = 0.0

    def __init__(self, config, settings):
        super().__init__()
        self.dropout = nn.Dropout(settings.input_dropout)
        self.gru = nn.GRU(config.hidden_size, config.context_dim, batch_first=True)
        self.out = nn.Linear(config.context_dim, config.hidden_size)

    def forward(self, embeddings, start):
        return self.out(self.gru(self.dropout(embeddings))[0][:, start:])
