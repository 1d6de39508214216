"""Trained runs in use: what is loaded is tensors and JSON, whatever lies in the folder."""

import pickle

import numpy
import pytest
import torch
from conftest import write_conversations

from ctxkv_lib.cli import main
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.runs.trained import load_trained
from ctxkv_lib.views.explore import open_run


def test_no_pickle_is_loaded_from_a_run(tmp_path, tiny_config, monkeypatch, capsys):
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (numpy, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle was loaded"))
    model = run(tiny_config, tmp_path / "run").path / "model"
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (model / name).write_bytes(b"a pickle")
    again = run(tiny_config, tmp_path / "run")
    open_run(again.path)
    write_conversations(tmp_path / "other.jsonl", 2)
    assert main(["evaluate", str(again.path), "--data", str(tmp_path / "other.jsonl")]) == 0
    assert main(["generate", str(again.path), "--prompt", "the cat", "--max-new-tokens", "2"]) == 0
    assert main(["report", str(again.path)]) == 0
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is missing; make it again"):
        load_trained(again.path, torch.device("cpu"))
