"""A stage is made again if anything that it is computed from is another one, and taken from beside if not."""

import ast
import os
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import NearestTwo, local_experiment, outcome

from ctxkv_lib import files
from ctxkv_lib.errors import UserError
from ctxkv_lib.experiments import prepare, run
from ctxkv_lib.files import PACKAGE, source_digest
from ctxkv_lib.plugins import code_digest
from ctxkv_lib.plugins.hooks import HOOKS, PlugIn
from ctxkv_lib.report.info import describe_settings
from ctxkv_lib.runs.device import choose_precision
from ctxkv_lib.runs.experiment import Experiment, read_splits
from ctxkv_lib.runs.folder import RunFolder, Stage
from ctxkv_lib.runs.keys import MEASUREMENTS, STAGES, stage_key
from ctxkv_lib.runs.presets import build_config

ALL = ("phase1", "caches", "phase2", "model", "test")
FROM_CACHES, FROM_PHASE2, TEST = ALL[1:], ALL[2:], ("test",)
DATA = "data.samples data.table data.neighbours data.row_length data.corpus_samples"  # the table's text here
# The stages that another value of a setting, or of any in a group, makes anew.
CHANGED_BY = {
    **dict.fromkeys(f"model.context_dim model.hidden_size phase1 block runtime.seed {DATA}".split(), ALL),
    **dict.fromkeys(("runtime.precision", "runtime.embedding_cache", "data.validation_samples"), FROM_CACHES),
    **dict.fromkeys(("model", "phase2", "layer", "data.unigram"), FROM_PHASE2),
    "data.test_samples": TEST,
}
UNCOUNTED = {
    **dict.fromkeys(("runtime.device", "runtime.threads"), "where and how it computes"),
    **dict.fromkeys(("data.source", "data.path", "data.split", "data.corpus"), "the texts count themselves"),
    "data.tokenizer": "the tokenizer counts itself, wherever its files lie",
}
INPUTS = {
    **dict.fromkeys(("train text", "tokenizer", "token table"), ALL),
    **dict.fromkeys(("validation text", "precision"), FROM_CACHES),
    "log-frequencies": FROM_PHASE2,
    "test text": TEST,
}
PLUGGED = {"block": ALL, "loss": ALL, "layer": FROM_PHASE2}


def inputs_of(config):
    cpu = torch.device("cpu")
    precision = choose_precision(config.runtime.precision, cpu)
    folder = RunFolder(Path(), config, {"precision": precision})
    return Experiment(folder, read_splits(config), cpu, print).inputs


def keys(config, inputs):
    """The keys of all stages, each as if those before it had just been made; and of measurements."""
    folder = RunFolder(Path(), config, {})
    for name in (*ALL, *MEASUREMENTS):
        folder.stages[name] = Stage(stage_key(name, folder, inputs))
    return {name: stage.key for name, stage in folder.stages.items()}


def changed_stages(before, after):
    return tuple(name for name in ALL if before[name] != after[name])


def another(config, row):
    """The configuration with another value of a setting."""
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
    config = build_config("ci", recipe).replace({"runtime.precision": "fp32"})
    inputs = inputs_of(config)
    before = keys(config, inputs)
    for row in describe_settings("ci", recipe):
        setting, (group, _, _) = row["setting"], row["setting"].partition(".")
        if setting in UNCOUNTED and group == "data":
            continue
        other = another(config, row)
        counts_itself = group in ("data", "runtime") or setting == "model.hidden_size"
        after = keys(other, inputs_of(other) if counts_itself else inputs)
        expected = () if setting in UNCOUNTED else CHANGED_BY.get(setting) or CHANGED_BY[group]
        assert changed_stages(before, after) == expected, setting


def test_every_input_changes_the_stages_that_are_computed_from_it():
    config = build_config("ci")
    inputs = inputs_of(config)
    assert INPUTS.keys() == inputs.keys()
    for name, expected in INPUTS.items():
        after = keys(config, {**inputs, name: "another"})
        assert changed_stages(keys(config, inputs), after) == expected, name
    counted = config.replace({"data.table": "random", "data.unigram": "corpus"})
    fewer = counted.replace({"data.corpus_samples": 3})
    assert inputs_of(counted)["log-frequencies"] != inputs_of(fewer)["log-frequencies"]


def test_every_plug_in_counts_by_name_code_and_settings(monkeypatch):
    config, inputs = build_config("ci"), dict.fromkeys(INPUTS, "")
    assert PLUGGED.keys() == {*HOOKS}
    monkeypatch.setattr(PlugIn, "reads", "contexts")  # nothing is behind the names
    plugin = PlugIn("a:B", "code", {"rate": 1})
    others = [replace(plugin, **change) for change in ({"name": "a:C"}, {"code": ""}, {"settings": {}})]
    for hook, expected in PLUGGED.items():
        before, *after = (
            keys(replace(config, plugins={hook: each} if each else {}), inputs)
            for each in (plugin, None, *others)
        )
        assert {changed_stages(before, other) for other in after} == {expected}
    read = replace(config, plugins={"layer": plugin})
    before = keys(read, inputs)
    monkeypatch.setattr(PlugIn, "reads", "tokens")  # such a run has no Phase 1 to share
    assert changed_stages(before, keys(read, inputs)) == ALL


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, whose code counts in the place of this one's."""
    path = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for module in (files, code_digest):
        monkeypatch.setattr(module, "PACKAGE", path)
    source_digest.cache_clear()
    yield path
    source_digest.cache_clear()


COMPUTE = {
    "method/reference": (),
    "method/memory": (),
    "method/tuned": (*ALL, *MEASUREMENTS),
    "method/modeling": ("model",),
    "method/optimizer": (*FROM_PHASE2, *MEASUREMENTS),
    "measure/probe": ("probe",),
    "measure/ngrams": ("ngrams",),
}


def test_code_counts_without_docstrings_comments_and_layout(package):
    path = package / "method" / "oacd.py"
    before = source_digest("method.oacd")
    code = re.sub(r'"""(?=[A-Z])', '"""Now: ', path.read_text(encoding="utf-8"))
    path.write_text(code.replace("  # ", "  # now: ").replace("\n\n", "\n"), encoding="utf-8")
    source_digest.cache_clear()
    assert source_digest("method.oacd") == before


def test_a_stage_counts_the_modules_that_it_computes_with(package):
    config, inputs = build_config("ci"), dict.fromkeys(INPUTS, "")
    before = keys(config, inputs)
    for module, expected in COMPUTE.items():
        with (package / f"{module}.py").open("a") as file:
            file.write("NUMBER = 1\n")
        source_digest.cache_clear()
        after = keys(config, inputs)
        assert tuple(name for name in before if before[name] != after[name]) == expected, module
        before = after


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
    PlugIn(name, digests[0]).refuse_changed()  # of another version of the package, a notice
    monkeypatch.setattr("ctxkv_lib.mine.SHARE", 1)
    with pytest.raises(UserError, match=r"What ctxkv_lib\.mine:Mine returns in a row depends on other rows"):
        prepare(tiny_config, tmp_path / "run", block=name)


FUNCTIONS = ("_train_block", "_make_caches", "_train_layer", "model_stage", "test_stage")
STARTS = {name: ("runs.stages", function) for name, function in zip(ALL, FUNCTIONS, strict=True)}
STARTS |= {name: (f"measure.{name}", "of_run") for name in MEASUREMENTS}
REASONS = {
    "says what happens": "errors progress method.memory runs.provenance",
    "writes and reads": "files runs.folder runs.keys runs.summary runs.opened",
    "settings count": "method.config method.fields data.config runs.config",
    "plug-ins count": "plugins.hooks plugins.code_digest",
    "texts count": "data.conversations data.texts data.hub data.chitchat data.ultrachat",
    "part of the digests of tokenizer and table": "data.tokens data.token_table",
    "refuses, and leaves the model as it was": "plugins.checks",
    "who computes what, and where": "ranks method.loop runs.device",
}
NOT_COMPUTED_WITH = {module for modules in REASONS.values() for module in modules.split()}
# The model imports the first four, of which Phase 1 and the caches call nothing; Phase 1 saves no state.
NOT_IN = {"caches": {"data.cooccurrence", "method.copying", "method.losses", "method.windows"}}
NOT_IN["phase1"] = NOT_IN["caches"] | {"method.caches", "runs.saved_epochs"}


@cache
def names_of(module):
    """What a module of the package defines, and what it imports of the package as (module, name), by name."""
    tree, defined, imported = ast.parse(_file(module).read_bytes()), {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            defined |= {name.id: node for name in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*module.split(".")[: -node.level], *(node.module or "").split(".")]
            home = ".".join(filter(None, base))
            imported |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
    return defined, imported


def _file(module):
    return PACKAGE / f"{module.replace('.', '/')}.py"


def modules_of(start):
    """The modules in which a function, and all that is named in what it names, are defined."""
    places, modules = [start], set()
    for module, name in places:  # to which what is named there is appended
        defined, imported = names_of(module)
        further = []
        if name in defined:
            modules.add(module)
            for node in ast.walk(defined[name]):
                if isinstance(node, ast.Name) and node.id in defined.keys() | imported.keys():
                    further.append((module, node.id))
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    home = ".".join(filter(None, imported.get(node.value.id, ())))
                    further.append((home, node.attr))
        elif name in imported:
            further.append(imported[name])
        places += {place for place in further if place[0] and _file(place[0]).is_file()} - {*places}
    return modules


def test_no_module_that_a_stage_computes_with_is_forgotten():
    used = set()
    for name in STARTS:
        stages = [name]
        for stage in stages:  # to which those it depends on are appended
            stages += STAGES[stage].stages
        counted = {module for stage in stages for module in STAGES[stage].code}
        uncounted = modules_of(STARTS[name]) - counted - NOT_IN.get(name, set())
        assert uncounted <= NOT_COMPUTED_WITH, name
        used |= uncounted
    assert used == NOT_COMPUTED_WITH


SPLITS = {"train": 0, "test": 8, "corpus": 10, "validation": 12}  # the first conversation, of `tiny_settings`


def with_another(split, config, folder):
    """The configuration with a file in which two conversations of a split are exchanged."""
    lines = Path(config.data.path).read_text().splitlines()
    first = SPLITS[split]
    lines[first : first + 2] = reversed(lines[first : first + 2])
    (folder / "other.jsonl").write_text("\n".join(lines))
    return config.replace({"data.path": str(folder / "other.jsonl")})


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A finished run, whose parts depend on all texts."""
    folder = tmp_path_factory.mktemp("there")
    settings = {"phase2.max_epochs": 1, "data.unigram": "corpus", "runtime.precision": "bf16"}
    return run(build_config("ci", "exact", 8, local_experiment(folder) | settings), folder / "run")


@pytest.fixture
def copy(there, tmp_path):
    return Path(shutil.copytree(there.path, tmp_path / "runs" / "there", copy_function=os.link))


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ("train", []),
        ("validation", ["phase1"]),
        ({"runtime.precision": "fp32"}, ["phase1"]),
        ("test", ["phase1", "caches"]),
        ("corpus", ["phase1", "caches"]),
        ({"phase2.learning_rate": 0.5, "model.interval": 4}, ["phase1", "caches"]),
        ({"layer": NearestTwo}, ["phase1", "caches"]),
    ],
    ids=str,
)
def test_a_run_takes_what_it_may_from_one_beside_it(there, copy, tmp_path, capsys, change, taken):
    config = there.config.replace(change) if isinstance(change, dict) else None
    config = config or with_another(change, there.config, tmp_path)
    prepare(config, copy.with_name("new"))
    assert re.findall(r"(\w+): taken from there", capsys.readouterr().err) == taken
    prepare(config, tmp_path / "alone" / "new")
    beside, alone = (RunFolder.read(tmp_path / name / "new").stages for name in ("runs", "alone"))
    for stage in ("phase1", "caches"):
        assert beside[stage].files == alone[stage].files


KEPT = {"train": set(), "validation": {"context_block"}, "corpus": {"context_block"}}
KEPT["test"] = {"context_block", "layer"}


@pytest.mark.parametrize(("split", "kept"), KEPT.items(), ids=KEPT)
def test_a_run_of_another_text_keeps_what_it_may_and_has_its_numbers(there, copy, tmp_path, split, kept):
    config = with_another(split, there.config, tmp_path)
    with pytest.raises(UserError, match="holds a finished result of other data; replace it with --again"):
        run(config, copy)
    run(config, copy, again=True)
    run(config, tmp_path / "alone" / "run")
    assert outcome(copy) == outcome(tmp_path / "alone" / "run")
    weights = {path.stem: path for path in (there.path / "checkpoint").glob("*.safetensors")}
    assert {name for name, path in weights.items() if path.samefile(copy / "checkpoint" / path.name)} == kept
