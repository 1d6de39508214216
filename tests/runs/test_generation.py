"""Text is generated as the saved model generates it in transformers, without importing that."""

import torch
from conftest import in_python
from transformers import AutoModelForCausalLM

from ctxkv_lib.runs.generation import _Text, generate_text

PROMPT = "the cat and the dog and the cat"
LIGHT = """
import sys

from ctxkv_lib.cli import main

def imported(*names):
    return [name for name in names if name in sys.modules]

main(["list", "--json", sys.argv[1]])
assert not imported("torch", "transformers", "matplotlib")
main(["info", "--preset", "ci"])
assert not imported("torch._dynamo", "transformers", "matplotlib")
main(["generate", sys.argv[1], "--prompt", "the cat", "--max-new-tokens", "2"])
main(["run", "--out", sys.argv[1]])
assert not imported("torch._dynamo", "transformers.modeling_utils", "matplotlib")
"""


def test_the_saved_model_generates_the_same_text(finished_run, tokenizer):
    saved = AutoModelForCausalLM.from_pretrained(finished_run.path / "model", trust_remote_code=True)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0, "top_k": 20}):
        torch.manual_seed(7)
        ids = saved.generate(**prompt, max_new_tokens=40, **options)[0, prompt["input_ids"].shape[1] :]
        sampling = {
            "temperature": options.get("temperature", 0),
            "top_k": options.get("top_k", 50),
            "seed": 7,
        }
        assert generate_text(finished_run, PROMPT, max_new_tokens=40, **sampling) == PROMPT + (
            tokenizer.decode(ids, skip_special_tokens=True)
        )


@torch.no_grad()
def test_a_text_that_grows_has_the_logits_of_the_saved_model_also_where_it_copies(saved_model, tokenizer):
    saved = AutoModelForCausalLM.from_pretrained(saved_model, trust_remote_code=True).eval()
    ids = tokenizer(PROMPT)["input_ids"]
    logits = saved(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(_Text(saved.model, ids).next_logits(), logits)


def test_commands_import_only_what_they_need(finished_run):
    in_python(LIGHT, finished_run.path)
