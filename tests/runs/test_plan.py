"""Every setting, text and own part changes the steps that depend on it, and nothing else changes a step."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GatedBlock, NearestTwo, local_experiment, write_conversations

from ctxkv_lib import files, store
from ctxkv_lib.data.config import SOURCE_NAMES, DataConfig
from ctxkv_lib.data.sources import SOURCES
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import run
from ctxkv_lib.files import PACKAGE, source_digest
from ctxkv_lib.plugins import code_digest
from ctxkv_lib.report.info import describe_settings
from ctxkv_lib.runs import plan
from ctxkv_lib.runs.folders import run_folder_of
from ctxkv_lib.runs.opened import open_run
from ctxkv_lib.runs.plan import Plan
from ctxkv_lib.runs.presets import build_config
from ctxkv_lib.runs.steps import config_of
from ctxkv_lib.store import Record

ALL = {"table", "contexts", "phase2", "test"}
TRAINED = ALL - {"table"}
PHASE2 = {"phase2", "test"}
# The steps that change with a setting, or with any setting of a group. If you add a setting to `data` or
# `runtime`, list here the steps that depend on it.
CHANGED_BY = {
    "model": PHASE2,
    "model.context_dim": TRAINED,
    "model.hidden_size": ALL,
    "phase1": TRAINED,
    "phase2": PHASE2,
    "block": TRAINED,
    "loss": TRAINED,
    "layer": PHASE2,
    "data.samples": TRAINED,
    "data.validation_samples": TRAINED,
    "data.test_samples": {"test"},
    "data.table": ALL,
    "data.neighbours": ALL,
    "data.row_length": TRAINED,
    "data.corpus_samples": ALL,
    "data.unigram": PHASE2,
    "runtime.seed": TRAINED,
    "runtime.embedding_cache": TRAINED,
    "runtime.device": set(),
    "runtime.threads": set(),
    "runtime.precision": set(),  # the chosen precision counts instead
}
# Settings whose other values need a network or a file. Other tests check their texts and tokens.
ELSEWHERE = {"data.source", "data.path", "data.split", "data.tokenizer", "data.corpus"}


def inputs_of(config):
    return Plan(config, Path("run"), torch.device("cpu")).inputs


def changed(config, other):
    """Return the names of the steps whose inputs differ between two configurations."""
    before, after = inputs_of(config), inputs_of(other)
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


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
def test_every_setting_changes_the_steps_that_are_computed_with_it(recipe):
    config = build_config("ci", recipe, settings={"data.validation_samples": 4})
    for row in describe_settings("ci", recipe):
        setting, (group, _, _) = row["setting"], row["setting"].partition(".")
        if setting not in ELSEWHERE:
            expected = CHANGED_BY[setting if setting in CHANGED_BY else group]
            assert changed(config, another(config, row)) == expected, setting


def squared(contexts):
    return contexts.square().mean()


@pytest.mark.parametrize(("kind", "part"), [("block", GatedBlock), ("loss", squared), ("layer", NearestTwo)])
def test_a_users_part_changes_the_steps_that_are_computed_with_it(kind, part):
    config = build_config("ci")
    assert changed(config, config.with_plugins(**{kind: part})) == CHANGED_BY[kind]


def test_the_chosen_precision_counts():
    fp32, bf16 = (Plan(build_config("ci"), Path("run"), torch.device("cpu"), p) for p in ("fp32", "bf16"))
    assert {name for name in ALL if fp32.inputs[name] != bf16.inputs[name]} == TRAINED


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Copy the package into a git checkout, and make digests read the code of the copy."""
    path = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".git").mkdir()
    for module in (files, code_digest, store):
        monkeypatch.setattr(module, "PACKAGE", path)
    source_digest.cache_clear()
    yield path
    source_digest.cache_clear()


def codes():
    source_digest.cache_clear()
    return {step: plan.code_of(step) for step in plan.VERSIONS}


def test_code_counts_without_docstrings_comments_and_layout(package):
    path = package / "method" / "oacd.py"
    before = codes()
    code = re.sub(r'"""(?=[A-Z])', '"""Now: ', path.read_text(encoding="utf-8"))
    path.write_text(code.replace("  # ", "  # now: ").replace("\n\n", "\n"), encoding="utf-8")
    assert codes() == before


@pytest.mark.parametrize(
    ("module", "steps"),
    [
        ("data/cooccurrence", {"table"}),
        ("method/oacd", TRAINED),
        ("runs/contexts", {"contexts", "test"}),
        ("method/phase2", {"phase2"}),
        ("method/scoring", TRAINED),
        ("runs/training", {"phase2"}),
        ("runs/testing", {"test"}),
        ("method/model", TRAINED),
        ("runs/build", {"contexts", "phase2"}),
        ("data/token_table", {"contexts", "phase2"}),
        ("data/kneser_ney", {"phase2"}),
        ("method/reference", set()),
        ("method/modeling", set()),
        ("data/texts", set()),
        ("runs/steps", set()),
        ("report/tables", set()),
        ("measure/ngrams", set()),
        ("files", set()),
    ],
)
def test_the_code_that_computes_a_step_counts_in_a_checkout_and_never_elsewhere(package, module, steps):
    before = codes()
    with (package / f"{module}.py").open("a") as file:
        file.write("NUMBER = 1\n")
    assert {name for name, code in codes().items() if code != before[name]} == steps
    (package.parent / ".git").rmdir()
    installed = codes()
    with (package / f"{module}.py").open("a") as file:
        file.write("NUMBER = 2\n")
    assert codes() == installed


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A finished run that depends on all texts."""
    folder = tmp_path_factory.mktemp("there")
    settings = {
        "phase2.max_epochs": 1,
        "data.corpus": "own",
        "data.unigram": "corpus",
        "runtime.precision": "bf16",
    }
    return run(build_config("ci", "exact", 8, local_experiment(folder) | settings), folder / "run")


@pytest.fixture
def copy(there, tmp_path):
    return Path(shutil.copytree(there.path, tmp_path / "runs" / "there"))


def is_reused(there, copy, config=None):
    """Return whether a run in `copy` reuses all results of the run `there`."""
    heard = []
    again = run(config or there.config, copy, heard.append)
    return all("replayed" in metric for metric in heard) and again.summary == there.summary


def test_a_new_version_of_the_package_whose_results_are_the_same_reuses_a_run(there, copy, monkeypatch):
    monkeypatch.setattr("ctxkv_lib.__version__", "9.0.0")
    assert is_reused(there, copy)


def test_a_reworded_message_reuses_a_run(there, copy, package):
    path = package / "data" / "texts.py"
    reworded = re.sub(r'raise UserError\(f?"', r"\g<0>Sorry: ", path.read_text(encoding="utf-8"))
    assert "Sorry: " in reworded
    path.write_text(reworded, encoding="utf-8")
    source_digest.cache_clear()
    assert is_reused(there, copy)


def test_a_new_source_of_conversations_reuses_a_run(there, copy, monkeypatch):
    monkeypatch.setitem(SOURCES, "letters", SOURCES["chitchat"])
    monkeypatch.setitem(SOURCE_NAMES, "letters", "letters that were written by hand")
    assert DataConfig(source="letters")
    assert is_reused(there, copy)


def test_a_new_setting_with_its_default_reuses_a_run(there, copy):
    """Forget `phase2.patience` in all records, as if they had been written before it existed."""

    def without(value):
        if not isinstance(value, dict):
            return value
        forgotten = ("phase2.patience", "patience", "checksum")
        return {name: without(each) for name, each in value.items() if name not in forgotten}

    for name in ("settings", "phase2", "test"):
        path = copy / f"steps/{name}.json"
        Record(**without(json.loads(path.read_text()))).write(path)
        assert "phase2.patience" not in path.read_text()
    assert is_reused(there, copy)
    assert config_of(copy).phase2.patience == 3


def test_a_setting_that_is_not_known_is_of_another_version(copy):
    values = json.loads((copy / "steps/settings.json").read_text())
    del values["checksum"]
    values["numbers"]["config"]["phase2"]["momentum"] = 1
    Record(**values).write(copy / "steps/settings.json")
    with pytest.raises(UserError, match="a run of another version of ctxkv_lib; use that version"):
        open_run(copy)


def test_results_of_another_version_are_shown_and_replaced_only_on_request(there, copy, monkeypatch, capsys):
    monkeypatch.setitem(plan.VERSIONS, "phase2", 2)
    open_run(copy)
    said = "another version of the method's code (results version of phase2 1 → 2), so results may differ"
    assert said in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"trained model, but results version of phase2 1 → 2; replace it with --again"
    ):
        run(there.config, copy)
    assert open_run(copy).run.summary == there.summary
    assert run(there.config, copy, again=True).summary["phase2"]["val_ppl"] > 1


SPLITS = {"train": 0, "test": 8, "corpus": 10, "validation": 12}  # first conversation of each split


def with_another(split, config, folder):
    """Return the configuration with a file in which two conversations of a split are swapped."""
    lines = Path(config.data.path).read_text().splitlines()
    first = SPLITS[split]
    lines[first] = lines[first + 1]
    (folder / "other.jsonl").write_text("\n".join(lines))
    return config.replace({"data.path": str(folder / "other.jsonl")})


@pytest.mark.parametrize("split", SPLITS)
def test_another_text_is_another_result(there, copy, tmp_path, split):
    config = with_another(split, there.config, tmp_path)
    if split != "test":
        with pytest.raises(
            UserError, match=f"a trained model, but the {split} text differs; replace it with --again"
        ):
            run(config, copy)
    replaced = run(config, copy, again=split != "test")
    alone = run(config, tmp_path / "alone" / "run")
    assert replaced.summary["phase2"]["val_ppl"] == alone.summary["phase2"]["val_ppl"]
    assert replaced.summary["test"] == alone.summary["test"]


def test_a_refused_run_changes_nothing(tiny_settings, tmp_path):
    write_conversations(tmp_path / "conversations.jsonl", 18)
    settings = tiny_settings | {"data.table": "cooccurrence", "data.corpus_samples": 4}
    made = run(build_config("ci", samples=8, settings=settings), tmp_path / "run")
    lines = Path(made.config.data.path).read_text().splitlines()
    lines[10] = lines[11]  # conversations 10 to 13 are counted for the table
    Path(made.config.data.path).write_text("\n".join(lines))
    with pytest.raises(UserError, match="a trained model, but the corpus text differs"):
        run(made.config, made.path)
    assert open_run(made.path).run.summary == made.summary


def test_the_text_counts_and_not_where_it_is(there, copy, tmp_path):
    moved = Path(shutil.copy(there.config.data.path, tmp_path / "moved.jsonl"))
    config = there.config.replace({"data.path": str(moved)})
    assert run_folder_of(config) == run_folder_of(there.config)
    assert is_reused(there, copy, config)


def test_the_name_of_a_folder_says_what_was_changed(tmp_path, monkeypatch):
    config = build_config("ci", samples=3)
    name = run_folder_of(config).name
    assert name == "ci-exact-3"
    monkeypatch.setenv("CTXKV_RUNS", str(tmp_path / "runs"))  # read when the function is called
    assert run_folder_of(config) == tmp_path / "runs" / name
    other = run_folder_of(config.replace({"phase2.patience": 7})).name
    assert other.startswith("ci-exact-3-")
    assert other == run_folder_of(config.replace({"phase2.patience": "7"})).name


def test_a_recipe_without_one_of_its_parts_has_a_folder_of_its_own():
    tuned = build_config("ci", "tuned")
    parts = ({}, {"block": None}, {"layer": None})
    assert len({run_folder_of(tuned.with_plugins(**part)) for part in parts}) == 3
