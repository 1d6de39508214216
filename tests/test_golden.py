"""Small runs from the command line give the numbers that were recorded in `golden.json`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
TEXTS = [
    "Hi there! How was your weekend?\nIt was good, thanks. We went hiking and it only rained a little.",
    "What do you do for work?\nI teach maths at a school near the sea. And you?\nI am a nurse.",
    "Do you have any pets?\nTwo cats. They sleep all day and run around all night.",
]


def ctxkv(*words: object) -> str:
    command = [sys.executable, "-m", "ctxkv_lib", *map(str, words)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(recipe: str, folder: Path) -> dict[str, list[float]]:
    """Return validation perplexity per epoch, test loss per conversation, and perplexity on other text."""
    out, text = folder / recipe, folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS), encoding="utf-8")
    ctxkv("run", "--preset", "ci", "--recipe", recipe, "--set", "runtime.precision=fp32", "--out", out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "val_ppl": [line["val_ppl"] for line in lines if line["stage"] == "phase2"],
        "test_loss": [
            loss for _, loss in json.loads((out / "summary.json").read_text())["test"]["conversations"]
        ],
        "evaluate_ppl": [json.loads(ctxkv("evaluate", out, "--data", text, "--json"))["ppl"]],
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["published", "exact", "tuned"])
def test_the_numbers_equal_the_recorded_ones(recipe, tmp_path):
    expected = json.loads(GOLDEN.read_text())[recipe]
    found = numbers(recipe, tmp_path)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-3), name
