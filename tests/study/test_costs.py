"""The computed costs agree with real tensors and with torch's count of operations."""

import pytest
import torch
from alternatives import CHOSEN
from costs import costs
from small_models import GPT, LSTM
from torch.utils.flop_counter import FlopCounterMode

from ctxkv_lib import ContextKV, ModelConfig
from ctxkv_lib.baselines import GRU, LastTokens
from ctxkv_lib.method.modeling import ContextCache
from ctxkv_lib.method.tuned import SlotLayer


@pytest.fixture(scope="module")
def embeddings():
    return torch.zeros(1, 700, 768)


def kept(name, tokens=700):
    return costs()[name].kept_bytes(tokens)


def test_contexts_are_those_that_generation_keeps():
    with torch.device("meta"):
        for name, options in {
            "exact": {},
            "contexts": {"layer": lambda sizes: SlotLayer(sizes, SlotLayer.Settings())},
        }.items():
            assert ContextCache(ContextKV(ModelConfig(), **options), 1).contexts.nbytes == kept(name)
        present = ContextKV(ModelConfig(max_contexts=1))
        assert ContextCache(present, 1).contexts.nbytes == kept("exact, one slot")


def test_states_of_recurrent_networks_are_kept_alone(embeddings):
    gru = GRU(ModelConfig(), GRU.Settings()).network
    assert gru(embeddings[:, :3])[1].nbytes == kept("GRU")
    lstm = LSTM(768, CHOSEN["LSTM"]["layers"], 0.0).eval()
    assert sum(part.nbytes for part in lstm(embeddings[:, :3])[1]) == kept("LSTM")


def test_keys_and_values_are_kept_of_the_window(embeddings):
    attention = LastTokens(ModelConfig(), LastTokens.Settings(history=640))
    window = embeddings[:, -attention.window :]
    assert attention.k(window).nbytes + attention.v(window).nbytes == kept("all 640 tokens")
    assert attention.k(embeddings).nbytes + attention.v(embeddings).nbytes == kept("all tokens")
    gpt = GPT(768, CHOSEN["GPT"]["layers"], 0.0)
    hidden = gpt.read(embeddings[:, -len(gpt.positions) :])
    weights = [layer.self_attn.in_proj_weight for layer in gpt.layers.layers]
    assert sum((hidden @ weight[gpt.positions.shape[1] :].T).nbytes for weight in weights) == kept("GPT")


def test_tokens_are_kept_as_ids():
    ids = torch.zeros(700, dtype=torch.uint16)
    assert ids[-32:].nbytes == kept("last 32 tokens")
    assert ids[-640:].nbytes == kept("kneser_ney_caches")
    assert kept("kneser_ney_caches", 5) == ids[:5].nbytes


def test_the_last_token_takes_the_multiplications_that_torch_counts(embeddings):
    """Count the operations of the layer of `exact` and its block for one position."""
    model = ContextKV(ModelConfig(), vocab_size=10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.layer(embeddings[0, :1], torch.zeros(1, 32, 256), torch.ones(1, 32, dtype=torch.bool))
        block = model.context_block
        block(torch.zeros(1, 256), block.project_inputs(embeddings[0, :1]))
    assert counter.get_total_flops() == 2 * costs()["exact"].multiplications
