"""Train ordinary language models, a small GPT and an LSTM, on the texts of the study.

`python notebooks/study/alternatives.py MODEL SAMPLES SEED...` trains a model with SAMPLES conversations and
prints a result for each seed. The saved results are in `results/alternatives/sweep.json`.
`python notebooks/study/alternatives.py MODEL search` searches for settings and prints all settings that it
tries. MODEL is a key of `CHOSEN`.
"""

import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from small_models import GPT, LSTM, LanguageModel
from torch import Tensor, nn

import ctxkv_lib as ctxkv
from ctxkv_lib.baselines import size_of
from ctxkv_lib.data.cooccurrence import token_vectors
from ctxkv_lib.data.kneser_ney import smoothed_unigram
from ctxkv_lib.data.token_table import load_table, token_counts
from ctxkv_lib.method.config import GPT2_VOCAB_SIZE
from ctxkv_lib.runs.plan import Plan

# Warm-up as a share of all steps, epochs without improvement that end a run, and largest gradient norm.
WARMUP, PATIENCE, CLIP_NORM = 0.05, 2, 1.0
# The values to try for each setting. The search starts from the first values.
AXES: dict[str, tuple[Any, ...]] = {
    # The token table's learning rate as a multiple of `rate`. 0 keeps the table frozen.
    "table_rate": (0.1, 0.0),
    "rate": (0.001, 0.002),
    "dropout": (0.2, 0.4),
    "weight_decay": (0.1, 1.0),
    "epochs": (4, 8),
    # The number of layers of the GPT. The LSTM has one layer.
    "layers": (3, 1),
    "step_tokens": (512, 128),  # tokens per optimizer step
}
START = {axis: values[0] for axis, values in AXES.items()}
# The settings that the search found with 50 conversations.
CHOSEN: dict[str, dict[str, Any]] = {
    "GPT": {**START, "table_rate": 0.0, "layers": 1, "step_tokens": 256},
    "LSTM": {**START, "table_rate": 0.0, "layers": 1, "step_tokens": 128},
}
CHOSEN |= {f"{name}, random embeddings": {**chosen, "table_rate": 1.0} for name, chosen in CHOSEN.items()}


def batches(ids: Tensor, length: int, rows: int) -> Tensor:
    """Cut a stream `[n]` into batches `[steps, rows, length + 1]`, starting at a random position."""
    ids = ids[int(torch.randint(length, ())) :]
    steps = (len(ids) - 1) // (rows * length)
    cut = ids[: rows * steps * length + 1].unfold(0, length + 1, length)
    return cut.view(rows, steps, length + 1).transpose(0, 1)


def read_texts(samples: int, preset: str) -> tuple[Tensor, Tensor, Any, Tensor, Tensor]:
    """Return training tokens, validation tokens, test stream, token table, and the table's token counts."""
    splits = {"data.test_samples": 50} if preset == "offline" else {}
    config = ctxkv.build_config(preset, "tuned", samples, splits)
    plan = Plan(config, Path(), torch.device("cpu"))
    train, val = (part.int().long() for part in plan.ids.values())
    corpus, width = plan.tokens["corpus"], config.model.hidden_size
    vectors = token_vectors(corpus, GPT2_VOCAB_SIZE, width, config.data.neighbours)
    table = load_table(config.data, width, config.runtime.seed, vectors)
    return train, val, plan.tokens["test"], table, token_counts(corpus)


def train(
    model: str,
    samples: int,
    seed: int,
    settings: dict[str, Any],
    preset: str = "offline",
    is_tested: bool = True,
) -> dict[str, Any]:
    """Train a model and measure it at the epoch with the lowest validation perplexity.

    Models with random embeddings do not use the text from which the token table was built.
    """
    started, kind = time.process_time(), {"GPT": GPT, "LSTM": LSTM}[model.partition(",")[0]]
    ids, val, test, table, corpus = read_texts(samples, preset)
    torch.manual_seed(seed)
    counts = torch.bincount(ids, minlength=GPT2_VOCAB_SIZE)
    unigram, known = smoothed_unigram(corpus.numpy()), counts + corpus
    if "random" in model:
        table, unigram, known = 0.02 * torch.randn(table.shape), smoothed_unigram(counts.numpy()), counts
    body = kind(table.shape[1], settings["layers"], settings["dropout"])
    trained = LanguageModel(body, table, torch.from_numpy(unigram).log().float(), known)
    trained.table.requires_grad_(settings["table_rate"] > 0)
    rate, steps = settings["rate"], settings["epochs"] * (len(ids) // settings["step_tokens"])
    groups: list[dict[str, Any]] = [
        {"params": [*body.parameters(), trained.bias], "weight_decay": settings["weight_decay"]},
        {"params": [trained.table], "weight_decay": 0.0, "lr": rate * settings["table_rate"]},
    ]
    optimizer = torch.optim.AdamW(groups, rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / (WARMUP * steps), 0.5 + math.cos(math.pi * step / steps) / 2),
    )
    best, kept, best_epoch = math.inf, {}, 0
    trains_since = time.process_time()
    for epoch in range(1, settings["epochs"] + 1):
        trained.train()
        state = None
        for tokens in batches(ids, kind.training_length, settings["step_tokens"] // kind.training_length):
            optimizer.zero_grad()
            state = trained.set_gradients(tokens, state)
            nn.utils.clip_grad_norm_(body.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
        val_ppl = trained.token_losses(val).mean().exp().item()
        seconds = time.process_time() - started
        print(f"epoch {epoch}: {val_ppl:.2f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        if val_ppl < best:
            best, kept, best_epoch = val_ppl, copy.deepcopy(trained.state_dict()), epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    cell = {"variant": model, "samples": samples, "train_tokens": len(ids), "trained": size_of(body)}
    cell |= {"seed": seed, "best_epoch": best_epoch, "val_ppl": round(best, 3)}
    cell["epoch_seconds"] = round((time.process_time() - trains_since) / epoch, 2)
    if is_tested:
        trained.load_state_dict(kept)
        losses = trained.token_losses(test.ids.int().long())
        parts = losses.tensor_split(test.starts[1:] - 1)
        cell["test_ppl"] = round(losses.mean().exp().item(), 3)
        cell["test_conversations"] = [round(part.mean().item(), 4) for part in parts]
    return {**cell, "cpu_seconds": round(time.process_time() - started)}


def search(model: str) -> None:
    """Search, with 50 conversations, for the best value of one setting after the other."""
    best, val_ppls = tuple(START.values()), dict[tuple[Any, ...], float]()
    for place, values in enumerate(AXES.values()):
        for settings in ((*best[:place], value, *best[place + 1 :]) for value in values):
            if settings not in val_ppls:
                cell = train(model, 50, 42, dict(zip(AXES, settings, strict=True)), is_tested=False)
                val_ppls[settings] = cell["val_ppl"]
                row = {key: cell[key] for key in ("val_ppl", "best_epoch", "cpu_seconds")}
                print(json.dumps({"row": model, "settings": settings, **row}), flush=True)
        best = min(val_ppls, key=val_ppls.__getitem__)


if __name__ == "__main__":
    model, samples, *seeds = sys.argv[1:]
    if samples == "search":
        search(model)
    for seed in seeds:
        print(json.dumps(train(model, int(samples), int(seed), CHOSEN[model])), flush=True)
