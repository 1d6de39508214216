"""The model as transformers' own tools use it, on text."""

import json
import runpy
from copy import deepcopy
from functools import partialmethod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TOP, tiny_model, write_conversations
from ctxkv_lib.hf.inference import evaluate_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from ctxkv_lib.method.config import GPT2_VOCAB_SIZE
from ctxkv_lib.runs.run_folder import RunFolder
from ctxkv_lib.runs.settings import Sampling
from ctxkv_lib.runs.trained import _generated, stop_after_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A saved model with the real tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model(vocab_size=GPT2_VOCAB_SIZE)
    model.load_table(model.wte.weight.detach() / 5)
    tokenizer = deepcopy(tokenizer)
    stop_after_text(model, tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def served(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out") / "other.jsonl"
    write_conversations(path, 5, seed=9)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return ["\n".join(message["content"] for message in row) for row in rows]


def test_pipeline_generates(folder, served):
    generator = pipeline("text-generation", model=str(folder))
    (found,) = generator("Hello there", max_new_tokens=5, do_sample=False)
    assert found["generated_text"] == _generated(*served, "Hello there", Sampling(5, 0, 1, 0))
    assert found["generated_text"].startswith("Hello there")
    assert _generated(*served, "<|endoftext|>Hello", Sampling(1, 0, 1, 0)).startswith("<|endoftext|>Hello")
    texts = {_generated(*served, "Hello", Sampling(2, 1, top_k, 0)) for top_k in (5, 5.0, np.int64(5))}
    assert len(texts) == 1


def test_pipeline_generates_in_batches_from_a_runs_model(finished_run):
    generator = pipeline("text-generation", model=str(RunFolder(finished_run.path).model), device="cpu")
    prompts = ["Hello", "A longer prompt, of other words", "Hi there"]
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [generator(prompt, **options) for prompt in prompts]
    assert generator(prompts, batch_size=2, **options) == alone


class Rows(torch.utils.data.Dataset):
    """Sequences that hold something to learn: each token is the one before plus one."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = (torch.arange(16) + index) % TINY["vocab_size"]
        return {"input_ids": ids, "labels": ids}


def test_trainer_trains_evaluates_and_resumes(tmp_path):
    def trainer(model, steps):
        options = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        return Trainer(model=model, args=options, train_dataset=Rows(), eval_dataset=Rows())

    model = tiny_model()
    first = trainer(model, 6)
    before = first.evaluate()["eval_loss"]
    first.train()
    after = first.evaluate()["eval_loss"]
    assert after < before - 0.3

    resumed = trainer(tiny_model(), 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.evaluate()["eval_loss"] == pytest.approx(after, abs=1e-4)


def test_label_smoothing_is_of_the_next_token(tmp_path):
    options = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    model, ids = tiny_model().eval(), Rows()[0]["input_ids"][None]
    loss = Trainer(model, options).compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


def test_the_example_of_the_docs_trains_a_model_folder_on(folder, served, tmp_path, monkeypatch):
    text = tmp_path / "lines.txt"
    text.write_text("the cat sat on the mat\n\nand the rain fell\n" * 20)
    monkeypatch.setattr("sys.argv", ["", str(folder), str(text), str(tmp_path / "out")])
    monkeypatch.setattr(
        TrainingArguments, "__init__", partialmethod(TrainingArguments.__init__, use_cpu=True)
    )
    example = TOP / "docs" / "trainer_example.py"
    runpy.run_path(str(example))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = {
        name for name, value in served[0].state_dict().items() if not torch.equal(value, trained[name])
    }
    assert {name.split(".")[0] for name in changed} == {"attention", "feed_forward"}


def test_evaluate_reads_each_conversation_by_itself(served, texts):
    model, tokenizer = served
    scores, losses = evaluate_texts(model, tokenizer, texts), []
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
    every = torch.cat(losses)
    assert scores["tokens"] == len(every)
    assert scores["ppl"] == pytest.approx(every.mean().exp().item(), rel=1e-4)
    bits = every.sum().item() / sum(map(len, texts)) / 0.6931471805599453
    assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    first = {"by_position": 16, "by_history": 3}  # interval 3: one context up to position 2
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
    scores = evaluate_texts(model, tokenizer, texts)
    assert found["word_perplexity,none"] == pytest.approx(scores["word_ppl"], rel=1e-3)
    assert found["bits_per_byte,none"] == pytest.approx(scores["bits_per_byte"], rel=1e-3)
