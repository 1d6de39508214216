"""The saved model works in pipelines, in trainers, and in the evaluation harness."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_ids, tiny_model, write_conversations
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from ctxkv_lib.measure.other_text import score_texts
from ctxkv_lib.runs.config import Sampling
from ctxkv_lib.runs.generation import generate_ids


@pytest.fixture(scope="module")
def served(saved_model):
    model = AutoModelForCausalLM.from_pretrained(saved_model, trust_remote_code=True)
    return model.eval(), AutoTokenizer.from_pretrained(saved_model, trust_remote_code=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out") / "other.jsonl"
    write_conversations(path, 5, seed=9)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [*("\n".join(message["content"] for message in row) for row in rows), "雨の日、猫は眠る。"]


def test_pipeline_generates_alone_and_in_batches(saved_model):
    generator = pipeline("text-generation", model=str(saved_model), trust_remote_code=True, device="cpu")
    prompts = ["Hello", "A longer prompt, of other words", "Hi there"]
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [generator(prompt, **options) for prompt in prompts]
    assert generator(prompts, batch_size=2, **options) == alone
    assert alone[0][0]["generated_text"].startswith("Hello")
    saved = AutoTokenizer.from_pretrained(saved_model, trust_remote_code=True)
    assert saved.padding_side == "left"  # `generate` needs this; a pipeline sets it by itself


def test_label_smoothing_in_a_trainer_uses_the_next_token(tmp_path):
    options = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    model, ids = tiny_model(attention_dropout=0.0).train(), tiny_ids(16)[None]
    loss = Trainer(model, options).compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


def test_a_run_generates_the_text_that_its_saved_model_does(served):
    model, tokenizer = served
    encoded = tokenizer("The cat sat on some old mat while rain fell", return_tensors="pt")
    ids, end = encoded["input_ids"][0].tolist(), tokenizer.eos_token_id
    for sampling, options in (
        (Sampling(40, temperature=0), {"do_sample": False}),
        (Sampling(40, temperature=1.5, top_k=7), {"do_sample": True, "temperature": 1.5, "top_k": 7}),
    ):
        torch.manual_seed(0)
        expected = model.generate(**encoded, max_new_tokens=40, **options)[0, len(ids) :].tolist()
        torch.manual_seed(0)
        found = generate_ids(model.model, ids, sampling, end)
        assert found == expected[: len(found)]
        assert expected[len(found) :] in ([], [end])


def test_evaluate_reads_each_text_by_itself(served, texts):
    model, tokenizer = served
    scores, losses, correct = score_texts(model.model, tokenizer, texts), [], []
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        correct.append(logits.argmax(dim=1) == ids[1:])
    every = torch.cat(losses)
    assert (scores["conversations"], scores["tokens"]) == (6, len(every))
    assert scores["ppl"] == pytest.approx(every.mean().exp().item(), rel=1e-4)
    assert scores["accuracy"] == pytest.approx(torch.cat(correct).float().mean().item())
    characters = 3 * len(texts[-1]) + sum(map(len, texts[:-1]))  # three bytes per Japanese character
    bits = every.sum().item() / characters / math.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    first = {"by_position": 16, "by_history": model.model.window.offsets[1]}  # tokens in the first row
    for key, count in first.items():
        assert sum(row["tokens"] for row in scores[key]) == len(every)
        assert all(row["tokens"] for row in scores[key])
        mean = torch.cat([loss[:count] for loss in losses]).mean()
        assert scores[key][0]["ppl"] == pytest.approx(mean.exp().item(), rel=1e-4)


@pytest.mark.slow
def test_lm_evaluation_harness_agrees(served, texts, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    model, tokenizer = served
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=100_000, batch_size=2, device="cpu")
    task = {
        "task": "held_out",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    found = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0)["results"]["held_out"]
    scores = score_texts(model.model, tokenizer, texts)
    assert found["word_perplexity,none"] == pytest.approx(scores["word_ppl"], rel=1e-3)
    assert found["bits_per_byte,none"] == pytest.approx(scores["bits_per_byte"], rel=1e-3)
