"""The saved model as transformers' own tools use it."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import TINY, local_experiment, tiny_model, write_conversations
from ctxkv_lib.runs.inference import evaluate_texts, generate_text, load_trained
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from ctxkv_lib.data.conversations import read_conversations
from ctxkv_lib.experiments import run
from ctxkv_lib.hf.export import FILES
from ctxkv_lib.runs.config import build_config

ALONE = """
import sys
sys.modules["ctxkv_lib"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3, 4, 5]])).logits.double().sum().item())
print([name for name, p in model.named_parameters() if p.requires_grad and "context_block" in name])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a finished run with the real tokenizer and a tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    run(build_config("ci", samples=8, settings=local_experiment(folder)), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out") / "other.jsonl"
    write_conversations(path, 5, seed=9)
    return path


@pytest.mark.slow
def test_the_folder_works_without_the_package(tmp_path):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "model")]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    total, trainable = done.stdout.splitlines()
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3, 4, 5]])).logits.double().sum().item()
    assert float(total) == pytest.approx(expected, abs=1e-3)
    assert trainable == "[]"


def test_the_folder_carries_all_code_of_the_model_and_nothing_of_the_package(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    written = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    assert set(written) == {name for names in FILES.values() for name in names}
    for name, text in written.items():
        needed = set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE))
        assert needed <= set(written), name
        assert not re.search(r"from \.\.|import_module|ctxkv_lib", text), name


@pytest.mark.parametrize("first", ["configuration", "modeling"])
def test_what_transformers_loads_first_names_all_that_it_needs(first, tmp_path):
    tiny_model().save_pretrained(tmp_path)

    def named(module):
        text = (tmp_path / f"{module}.py").read_text()
        return set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE))

    needed = named(first)
    for module in list(needed):
        assert named(module) <= needed, module


def test_pipeline_generates(trained):
    generator = pipeline("text-generation", model=str(trained / "model"))
    (found,) = generator("Hello there", max_new_tokens=5, do_sample=False)
    model, tokenizer = load_trained(trained, torch.device("cpu"))
    assert found["generated_text"] == generate_text(model, tokenizer, "Hello there", 5, 0, 1, 0)
    assert found["generated_text"].startswith("Hello there")


def test_model_card_holds_the_numbers_of_the_run(trained):
    card = (trained / "model" / "README.md").read_text(encoding="utf-8")
    summary = json.loads((trained / "summary.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for shown in (f"{summary['phase2']['val_ppl']:.1f}", f"{summary['parameters']['total']:,}"):
        assert shown in card
    assert "{" not in card


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
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    first = trainer(model, 6)
    before = first.evaluate()["eval_loss"]
    first.train()
    after = first.evaluate()["eval_loss"]
    assert after < before - 0.5
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())

    resumed = trainer(tiny_model(), 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.evaluate()["eval_loss"] == pytest.approx(after, abs=1e-4)


def test_evaluate_reads_each_conversation_by_itself(trained, held_out):
    model, tokenizer = load_trained(trained, torch.device("cpu"))
    texts = list(read_conversations(held_out).texts())
    scores = evaluate_texts(model, tokenizer, texts)
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    every = torch.cat(losses)
    assert scores["tokens"] == len(every)
    assert scores["ppl"] == pytest.approx(every.mean().exp().item(), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(
        every.sum().item() / sum(map(len, texts)) / 0.6931471805599453, rel=1e-4
    )
    for key in ("by_position", "by_history"):
        assert sum(row["tokens"] for row in scores[key]) == len(every)
    first = torch.cat([loss[:16] for loss in losses])
    assert scores["by_position"][0]["ppl"] == pytest.approx(first.mean().exp().item(), rel=1e-4)
    alone = torch.cat([loss[:3] for loss in losses])  # interval 3: one context up to position 2
    assert scores["by_history"][0]["ppl"] == pytest.approx(alone.mean().exp().item(), rel=1e-4)


def harness_task(path, name, **options):
    """A task of lm-evaluation-harness on a local file."""
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    return {"task": name, **files, "test_split": "test", **options}


@pytest.mark.slow
def test_lm_evaluation_harness_agrees(trained, held_out, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    texts = list(read_conversations(held_out).texts())
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    questions = tmp_path / "questions.jsonl"
    asked = [{"q": "the cat sat on", "choices": [" some", " zebra"], "answer": 0}] * 3
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")

    model = AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    served = HFLM(pretrained=model, tokenizer=tokenizer, max_length=100_000, batch_size=2, device="cpu")
    rolling = harness_task(
        documents,
        "held_out",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    choice = harness_task(
        questions,
        "choice",
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    found = lm_eval.simple_evaluate(model=served, tasks=[rolling, choice], bootstrap_iters=0)["results"]
    scores = evaluate_texts(model, tokenizer, texts)
    assert found["held_out"]["word_perplexity,none"] == pytest.approx(scores["word_ppl"], rel=1e-3)
    assert found["held_out"]["bits_per_byte,none"] == pytest.approx(scores["bits_per_byte"], rel=1e-3)
    assert found["choice"]["acc,none"] in (0.0, 1.0)
