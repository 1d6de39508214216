"""A saved model loads as what it was, with this package and without, or is refused in a sentence."""

import inspect
import json
import re
from textwrap import indent

import pytest
import torch
from conftest import TINY, in_python, tiny_ids, tiny_method, tiny_model
from ctxkv_lib.hf.modeling import ContextKVForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ctxkv_lib.runs.config import build_config

MINE = """
from dataclasses import dataclass
import torch
from torch import nn
from ctxkv_lib.method.model import ContextBlock

class MyBlock(ContextBlock):
    @dataclass
    class Settings:
        share: float = 0.5

    def __init__(self, context_dim, hidden_size, settings):
        super().__init__(context_dim, hidden_size)
        self.share = settings.share
        self.gate = nn.Parameter(torch.full((context_dim,), 0.3))

    def forward(self, contexts, inputs):
        return self.share * self.gate * contexts + super().forward(contexts, inputs)
"""

IMPORT = "from ctxkv_lib.method.model import ContextBlock"

LAYER = """
from torch import nn

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.context_dim, config.hidden_size)

    def forward(self, embeddings, window, present):
        return embeddings + self.out(window.mean(dim=1))
"""


@pytest.mark.parametrize("shape", [{"kv_method": "variable"}, {"has_unigram": True}])
def test_saved_model_is_the_same_and_still_frozen(tmp_path, shape):
    model, ids = tiny_model(**shape).eval(), tiny_ids(15)[None]
    if model.log_unigram is not None:
        model.load_table(model.wte.weight.detach().clone(), torch.rand(TINY["vocab_size"]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    frozen = {name.split(".")[0] for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {"wte", "embedding_norm", "context_block"}
    assert AutoConfig.from_pretrained(tmp_path).max_contexts == TINY["max_contexts"]


@pytest.mark.parametrize("name", ["context_block.gate.weight", "attention.k.bias"])
def test_weights_of_other_code_are_refused(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if weights.pop(name, None) is None:  # one that is missing, or one that is not known
        weights[name] = torch.ones(2, 2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"a weight of .* is '{name}'; allowed: those that this code has"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused_and_not_left_undefined(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a weight of .* is 'attention\.k\.weight'; allowed: those that"):
        AutoModelForCausalLM.from_pretrained(tmp_path, context_dim=8, ignore_mismatched_sizes=True)


def test_a_trained_model_is_wrapped_without_a_copy():
    model = tiny_method(has_unigram=True)
    wrapped = ContextKVForCausalLM.from_model(model, {})
    assert {*wrapped.state_dict()} == {*model.state_dict()}
    assert wrapped.wte.weight.data_ptr() == model.wte.weight.data_ptr()
    assert {*wrapped.trained_weights()} == {*model.trained_weights()}


def answers(model, ids):
    """Logits, text, and what would be trained."""
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return model(ids).logits.tolist(), made.tolist(), trained


ALONE = """
import json, sys
sys.modules["ctxkv_lib"] = None  # importing it fails
import torch
from transformers import AutoConfig, AutoModelForCausalLM
def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
ids, found = torch.tensor(json.loads(sys.argv[1])), []
for folder in sys.argv[2:]:
    model = load(folder)
    model.save_pretrained(folder + "/again/model")
    found += [answers(each, ids) for each in (model, load(folder + "/again/model"))]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
config.plugins = {"block": {"plugin": "json:JSONDecoder", "settings": {}}}
try:
    load(folder, config=config)
except ValueError as error:
    print(json.dumps([found, str(error)]))
"""


def of_recipe(recipe, settings=None):
    plugins = build_config("ci", recipe, settings=settings).plugins
    parts = {hook: plugins[hook] for hook in ("block", "attention")}
    return {hook: {"plugin": part.name, "settings": part.settings} for hook, part in parts.items()}


@pytest.mark.slow
def test_each_folder_runs_its_own_code_without_the_package_and_keeps_it_if_saved_again(tmp_path, own_module):
    def mine(source):
        part = f"{own_module('my_plugin', source)}:MyBlock"
        return {"block": {"plugin": part, "settings": {"share": 0.25}}}

    ids, folders, expected = tiny_ids(5)[None], [], []
    for name, plugins in {
        "one": lambda: mine(MINE),
        "other": lambda: mine(MINE.replace("self.share *", "2 *")),
        "tuned": lambda: of_recipe("tuned", {"attention.copy_weight": 0.5}),
        "plain": dict,
    }.items():
        model = tiny_model(plugins=plugins()).eval()
        folders.append(tmp_path / name / "model")
        model.save_pretrained(folders[-1])
        expected += 2 * [answers(model, ids)]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    program = inspect.getsource(answers) + ALONE
    found, said = json.loads(in_python(program, ids.tolist(), *folders, env=environment))
    for (logits, *others), (wanted, *same) in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        assert others == same
    assert said.startswith("The code of json:JSONDecoder is not in the folder of this model")
    for folder in folders:
        again = {file.name: file.read_bytes() for file in (folder / "again/model").glob("*.py")}
        assert again == {file.name: file.read_bytes() for file in folder.glob("*.py")}


def test_the_tokenizer_of_a_run_is_named_as_every_transformers_knows_it(finished_run, tokenizer):
    folder = finished_run.path / "model"
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"
    text, loaded = "Hello  world,\n it's <|endoftext|>", AutoTokenizer.from_pretrained(folder)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.special_tokens_map == {**tokenizer.special_tokens_map, "pad_token": tokenizer.eos_token}
    assert loaded.padding_side == "left"


@pytest.mark.parametrize("first", ["AutoConfig", "AutoModelForCausalLM"])
def test_what_transformers_loads_first_names_all_that_it_needs(first, tmp_path):
    tiny_model().save_pretrained(tmp_path)

    def named(module):
        text = (tmp_path / f"{module}.py").read_text()
        return set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE))

    needed = named(AutoConfig.from_pretrained(tmp_path).auto_map[first].partition(".")[0])
    for module in list(needed):
        assert named(module) <= needed, module


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from ctxkv_lib.files import digest", r"ctxkv_lib\.files; allowed of ctxkv_lib: hf\.modeling, "),
        ("from ctxkv_lib.hf.copying_streams import as_served", r"ctxkv_lib\.hf\.copying_streams; allowed of"),
        ("import sample_runs", "sample_runs, which is no installed package"),
        ("import os, ctxkv_lib.method.model as base", "ctxkv_lib.method.model as a whole; write from ctxkv"),
    ],
)
def test_code_that_needs_what_is_not_saved_is_refused(tmp_path, own_module, line, said):
    name = own_module("needs_more", f"{line}\n{MINE}")
    model = tiny_model(plugins={"block": {"plugin": f"{name}:MyBlock", "settings": {}}})
    with pytest.raises(ValueError, match=rf"needs_more\.py imports {said}"):
        model.save_pretrained(tmp_path / "model")
    assert not any((tmp_path / "model").glob("*"))


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("needs_more", f"# coding: latin-1\n{MINE}# \xe9", "save it as UTF-8 without a byte order mark"),
        ("needs_more", "\ufeff" + MINE, "save it as UTF-8 without a byte order mark"),
        ("needs_more", f"if True: {IMPORT}\n{MINE}", "line 1: write from ctxkv_lib.method.model import on a"),
        (
            "needs_more",
            MINE.replace("from ctxkv", "from  ctxkv"),
            "line 5: write from ctxkv_lib.method.model",
        ),
        (
            "needs_more",
            f"{IMPORT}; {IMPORT}\n{MINE}",
            "line 1: write from ctxkv_lib.method.model import on a",
        ),
        (
            "needs_more",
            f'{MINE}\nTEXT = """\nfrom .nowhere import it\n"""',
            "has a text with a line that begins",
        ),
        ("windows", MINE, "is named like a file of the model itself; rename it"),
        ("01_ideas", MINE, "has a name that no import can have; rename it"),
    ],
)
def test_code_that_would_not_load_from_a_folder_is_refused(tmp_path, own_module, name, code, said):
    name = own_module(name, code)
    if "latin-1" in code:
        (tmp_path / f"{name}.py").write_text(code, encoding="latin-1")
    model = tiny_model(plugins={"block": {"plugin": f"{name}:MyBlock", "settings": {}}})
    with pytest.raises(ValueError, match=rf"{name}\.py.* {said}"):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "given", ["named_twice:Other", "elsewhere_named:Alias", "elsewhere_named:Holder.Inner"]
)
def test_a_class_is_saved_under_its_name_in_the_file_that_has_it(tmp_path, own_module, given):
    own_module("named_twice", f"{MINE}\nOther = type('MyBlock', (MyBlock,), {{}})")
    own_module("elsewhere_named", "from named_twice import Other as Alias\nclass Holder:\n    Inner = Alias")
    tiny_model(plugins={"block": {"plugin": given, "settings": {}}}).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("modeling_*.py")
    assert re.search(r"^from \.named_twice_\w+ import Other$", file.read_text(), re.MULTILINE)


def test_a_part_that_cannot_be_imported_is_said():
    plugins = {"block": {"plugin": "not_here:Block", "settings": {}}}
    with pytest.raises(
        ValueError, match=r"not_here:Block cannot be imported here \(No module .*\); put its file on"
    ):
        tiny_model(plugins=plugins)


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ("elsewhere.needs_more:Layer", "needs_more.py and .*needs_more.py have one name; rename one"),
        ("outer:Outer.Layer", r"Outer\.Layer is defined in a notebook, a script, a function or a class"),
    ],
)
def test_code_whose_names_clash_or_are_within_a_class_is_refused(tmp_path, own_module, attention, said):
    name = own_module("needs_more", MINE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "needs_more.py").write_text(LAYER)
    (tmp_path / "outer.py").write_text("from torch import nn\n\nclass Outer:\n" + indent(LAYER, "    "))
    plugins = {"block": {"plugin": f"{name}:MyBlock", "settings": {}}}
    model = tiny_model(plugins={**plugins, "attention": {"plugin": attention, "settings": {}}})
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "model")


def test_an_import_within_a_function_is_adapted_to_the_saved_folder(tmp_path, own_module):
    inner = MINE.replace(
        "        super().__init__",
        "        from ctxkv_lib.method.model import ContextBlock\n\n        super().__init__",
    )
    name = own_module("imports_inside", inner)
    model = tiny_model(plugins={"block": {"plugin": f"{name}:MyBlock", "settings": {}}}).eval()
    model.save_pretrained(tmp_path / "model")
    assert "ctxkv_lib" not in next((tmp_path / "model").glob("imports_inside_*.py")).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    ids = tiny_ids(7)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
