"""Whole runs work on a GPU."""

import gc

import pytest
import torch

from ctxkv_lib.errors import Interrupted, UserError
from ctxkv_lib.method import phase2

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("recipe", ["published", "exact", "tuned"])
def test_a_recipe_reaches_about_the_same_perplexity_as_on_a_cpu(train_on, recipe):
    """A GPU draws different random numbers, so perplexity may differ by up to 10%."""
    found, expected = (train_on(device, recipe).summary for device in ("cuda", "cpu"))
    assert found["phase2"]["val_ppl"] == pytest.approx(expected["phase2"]["val_ppl"], rel=0.1)
    assert found["parameters"] == expected["parameters"]
    assert "on cuda" in found["provenance"]["caches"]
    assert all(stage["gpu_peak_gib"] >= stage["gpu_gib"] >= 0 for stage in found["memory"])


@pytest.mark.parametrize("raised", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_that_is_kept_holds_no_gpu_memory(train_on, monkeypatch, raised):
    """IPython keeps the last error in `sys.last_value`."""

    def fails(*_):
        raise raised("CUDA out of memory.")

    gc.collect()
    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(phase2, "batch_gradients", fails)
    with pytest.raises((Interrupted, UserError)) as kept:
        train_on()
    assert kept.value.__traceback__ is not None
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**16


def test_fp32_is_not_tf32_in_a_run_and_the_users_settings_are_restored(train_on, monkeypatch):
    def settings():
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return (*tf32, torch.get_float32_matmul_precision())

    in_training, train_epoch = [], phase2.train_epoch

    def observed(*arguments):
        in_training.append(settings())
        return train_epoch(*arguments)

    for library in (torch.backends.cuda.matmul, torch.backends.cudnn):
        library.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(phase2, "train_epoch", observed)
    train_on(settings={"phase2.max_epochs": 1})
    assert in_training == [(False, False, "highest")]
    assert settings() == (True, True, "high")


class EndsInProduct(torch.nn.Module):
    """A layer whose hidden states are bf16 in training."""

    def __init__(self, config):
        super().__init__()
        self.inner = torch.nn.Linear(config.context_dim, config.hidden_size)

    def forward(self, embeddings, window, present):
        return self.inner(window.mean(dim=1))


def test_losses_are_fp32_whatever_attention_returns(train_on, monkeypatch):
    original, kinds = phase2.batch_gradients, set()

    def noted(*args):
        loss = original(*args)
        kinds.add(loss.dtype)
        return loss

    monkeypatch.setattr(phase2, "batch_gradients", noted)
    train_on(settings={"runtime.precision": "bf16"}, layer=EndsInProduct)
    assert kinds == {torch.float32}
