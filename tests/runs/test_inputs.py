"""Tests of a run's inputs (code, settings and texts), and of contexts from a sibling run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GatedBlock, NearestTwo, local_experiment

from ctxkv_lib import files
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import prepare, run
from ctxkv_lib.files import PACKAGE, source_digest
from ctxkv_lib.plugins import code_digest
from ctxkv_lib.plugins.hooks import PlugIn
from ctxkv_lib.report.info import describe_settings
from ctxkv_lib.runs import inputs
from ctxkv_lib.runs.inputs import Inputs, read_splits
from ctxkv_lib.runs.names import run_folder_of
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.stages import experiment_stages

TRAINED = {"settings", "contexts", "phase2"}
TEXTS = {"contexts", "phase2"}
# The stages whose tables change with a setting, or with any setting of a group. The stage `settings` always
# changes. If you add a setting to `data` or `runtime`, list here the stages that depend on it.
CHANGED_BY = {
    "model": {"phase2"},
    "model.context_dim": {"contexts", "phase2"},
    "phase1": {"contexts"},
    "block": {"contexts"},
    "loss": {"contexts"},
    "phase2": {"phase2"},
    "layer": {"phase2"},
    "runtime.seed": {"contexts"},
    "runtime.embedding_cache": {"contexts"},
    "runtime.device": set(),
    "runtime.threads": set(),
    "runtime.precision": set(),  # tables list the chosen precision instead
    "model.hidden_size": TEXTS,
    "data.samples": TEXTS,
    "data.validation_samples": TEXTS,
    "data.test_samples": {"test"},
    "data.table": TEXTS,
    "data.neighbours": TEXTS,
    "data.row_length": TEXTS,
    "data.corpus_samples": TEXTS,
    "data.unigram": {"phase2"},
}
# Settings whose other values need a network or a file. Other tests check their texts and tokens.
ELSEWHERE = {"data.source", "data.path", "data.split", "data.tokenizer", "data.corpus"}


def tables(config):
    cpu = torch.device("cpu")
    return {
        stage.name: stage.made_from
        for stage in experiment_stages(Inputs(config, read_splits(config), cpu, "fp32"))
    }


def another(config, row):
    """Return the configuration with a different value for one setting."""
    value, is_number = row["value"], isinstance(row["value"], int | float)
    values = (value + 1, 2 * value, value / 2, not value) if is_number else (*row["meanings"], "1")[::-1]
    for candidate in values:
        try:
            if candidate != value:
                return config.replace({row["setting"]: candidate})
        except UserError:
            continue
    raise AssertionError(f"no other value of {row['setting']}")


@pytest.mark.parametrize("recipe", ["exact", "tuned"])
def test_every_setting_changes_the_stages_that_are_computed_with_it(recipe):
    config = build_config("ci", recipe)
    before = tables(config)
    for row in describe_settings("ci", recipe):
        setting, (group, _, _) = row["setting"], row["setting"].partition(".")
        if setting in ELSEWHERE:
            continue
        after = tables(another(config, row))
        expected = {"settings"} | CHANGED_BY[setting if setting in CHANGED_BY else group]
        assert {name for name in before if before[name] != after[name]} == expected, setting


def squared(contexts):
    return contexts.square().mean()


@pytest.mark.parametrize(("hook", "part"), [("block", GatedBlock), ("loss", squared), ("layer", NearestTwo)])
def test_a_users_part_changes_the_stage_that_is_computed_with_it(hook, part):
    config = build_config("ci")
    before, after = tables(config), tables(config.replace({hook: part}))
    assert {name for name in before if before[name] != after[name]} == {"settings"} | CHANGED_BY[hook]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Copy the package, and make digests read the code of the copy."""
    path = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for module in (files, code_digest, inputs):
        monkeypatch.setattr(module, "PACKAGE", path)
    source_digest.cache_clear()
    yield path
    source_digest.cache_clear()


def test_code_counts_without_docstrings_comments_and_layout(package):
    path = package / "method" / "oacd.py"
    before = inputs.result_code()
    code = re.sub(r'"""(?=[A-Z])', '"""Now: ', path.read_text(encoding="utf-8"))
    path.write_text(code.replace("  # ", "  # now: ").replace("\n\n", "\n"), encoding="utf-8")
    source_digest.cache_clear()
    assert inputs.result_code() == before


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        ("method/oacd", True),
        ("method/scoring", True),
        ("data/tokens", True),
        ("runs/stages", True),
        ("runs/build", True),
        ("method/reference", False),
        ("method/modeling", False),
        ("method/memory", False),
        ("runs/folder", False),
        ("runs/driver", False),
        ("report/tables", False),
        ("measure/ngrams", False),
        ("files", False),
    ],
)
def test_only_code_that_computes_results_counts(package, module, counts):
    before = inputs.result_code()
    with (package / f"{module}.py").open("a") as file:
        file.write("NUMBER = 1\n")
    source_digest.cache_clear()
    assert (inputs.result_code() != before) == counts


MINE = """
from torch import nn
from .method.model import ContextBlock
class Mine(ContextBlock):
    def forward(self, contexts, inputs):
        return super().forward(0.5 * contexts, inputs - SHARE * inputs.mean(dim=0))
SHARE = 0
"""


def test_a_class_in_a_file_of_the_package_counts_and_is_tried(package, tiny_config, tmp_path, monkeypatch):
    import ctxkv_lib

    monkeypatch.setattr(ctxkv_lib, "__path__", [*ctxkv_lib.__path__, str(package)])
    name, digests = "ctxkv_lib.mine:Mine", []
    for source in (MINE, MINE + "# words\n", MINE.replace("0.5", "0.6")):
        (package / "mine.py").write_text(source)
        source_digest.cache_clear()
        digests.append(PlugIn.of(name).code)
    assert digests[0] == digests[1] != digests[2]
    monkeypatch.setattr("ctxkv_lib.mine.SHARE", 1)
    with pytest.raises(UserError, match=r"What ctxkv_lib\.mine:Mine returns in a row depends on other rows"):
        prepare(tiny_config, tmp_path / "run", block=name)


SPLITS = {"train": 0, "test": 8, "corpus": 10, "validation": 12}  # first conversation of each split


def with_another(split, config, folder):
    """Return the configuration with a file in which two conversations of a split are swapped."""
    lines = Path(config.data.path).read_text().splitlines()
    first = SPLITS[split]
    lines[first : first + 2] = reversed(lines[first : first + 2])
    (folder / "other.jsonl").write_text("\n".join(lines))
    return config.replace({"data.path": str(folder / "other.jsonl")})


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A finished run that depends on all texts."""
    folder = tmp_path_factory.mktemp("there")
    settings = {"phase2.max_epochs": 1, "data.unigram": "corpus", "runtime.precision": "bf16"}
    return run(build_config("ci", "exact", 8, local_experiment(folder) | settings), folder / "run")


@pytest.fixture
def copy(there, tmp_path):
    return Path(shutil.copytree(there.path, tmp_path / "runs" / "there", copy_function=os.link))


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ("train", False),
        ("validation", False),
        ({"runtime.precision": "fp32"}, False),
        ("test", True),
        ("corpus", True),
        ({"phase2.learning_rate": 0.5, "model.interval": 4}, True),
        ({"layer": NearestTwo}, True),
    ],
    ids=str,
)
def test_a_run_takes_its_contexts_from_one_beside_it_if_they_are_the_same(
    there, copy, tmp_path, capsys, change, is_taken
):
    config = there.config.replace(change) if isinstance(change, dict) else None
    config = config or with_another(change, there.config, tmp_path)
    prepare(config, copy.with_name("new"))
    assert ("contexts: taken from there" in capsys.readouterr().err) == is_taken
    prepare(config, tmp_path / "alone" / "new")
    for name in (
        "caches/train_ctx.safetensors",
        "caches/val_ctx.safetensors",
        "caches/train_emb.safetensors",
    ):
        assert (copy.with_name("new") / name).read_bytes() == (tmp_path / "alone/new" / name).read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_another_text_is_another_result(there, copy, tmp_path, split):
    config, name = with_another(split, there.config, tmp_path), "training" if split == "train" else split
    name = "token frequencies" if split == "corpus" else f"{name} text"
    with pytest.raises(
        UserError, match=f"holds a trained model, but the {name} differs; replace it with --again"
    ):
        run(config, copy)
    changed = run(config, copy, again=True)
    alone = run(config, tmp_path / "alone" / "run")
    assert changed.summary["phase2"]["val_ppl"] == alone.summary["phase2"]["val_ppl"]
    assert changed.summary["test"] == alone.summary["test"]


def test_the_text_counts_and_not_where_it_lies(there, copy, tmp_path):
    moved = Path(shutil.copy(there.config.data.path, tmp_path / "moved.jsonl"))
    config = there.config.replace({"data.path": str(moved)})
    assert run_folder_of(config) == run_folder_of(there.config)
    assert run(config, copy).summary == there.summary


def test_the_name_of_a_folder_says_what_was_changed(tmp_path, monkeypatch):
    config = build_config("ci", samples=3)
    name = run_folder_of(config).name
    assert name == "ci-exact-3"
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "runs"))  # read when the function is called
    assert run_folder_of(config) == tmp_path / "runs" / name
    changed = run_folder_of(config.replace({"phase2.patience": 7})).name
    assert changed.startswith("ci-exact-3-")
    assert changed == run_folder_of(config.replace({"phase2.patience": "7"})).name


def test_a_setting_that_is_new_has_its_default_and_one_that_is_not_known_is_of_another_version(copy):
    from ctxkv_lib.runs.folder import RunFolder
    from ctxkv_lib.runs.records import Record

    folder = RunFolder.open(copy)
    values = json.loads(json.dumps(folder.records["settings"].result))
    del values["phase2"]["patience"]
    folder.write("settings", Record({}, {}, values))
    assert RunFolder.open(copy).config.phase2.patience == 3
    values["phase2"]["momentum"] = 1
    folder.write("settings", Record({}, {}, values))
    with pytest.raises(UserError, match="another version of ctxkv_lib; use that version, or another folder"):
        _ = RunFolder.open(copy).config
