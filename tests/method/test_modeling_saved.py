"""A saved model loads unchanged in a process without this package, or is refused in one sentence."""

import inspect
import json
from functools import partial
from importlib import import_module

import pytest
import torch
from conftest import TUNED, NearestTwo, in_python, tiny_ids, tiny_method, tiny_model
from safetensors.torch import load_file, save_file

from ctxkv_lib.method.modeling import ContextKVForCausalLM

MINE = """
from dataclasses import dataclass
import torch
from torch import nn
from ctxkv_lib.method.block import ContextBlock

class MyBlock(ContextBlock):
    @dataclass
    class Settings:
        share: float = 0.5

    def __init__(self, context_dim, hidden_size, settings):
        super().__init__(context_dim, hidden_size)
        self.share = settings.share
        self.gate = nn.Parameter(torch.full((context_dim,), 0.3))

    def forward(self, contexts, inputs):
        from ctxkv_lib.method.windows import ContextWindow
        return self.share * self.gate * contexts + super().forward(contexts, inputs)
"""


def with_block(name):
    """Return a tiny model with the class `MyBlock` of the module `name`."""
    kind = import_module(name).MyBlock
    model = tiny_method(partial(kind, settings=kind.Settings(share=0.25)))
    return ContextKVForCausalLM.of(model, {"block": {"share": 0.25}})


def answers(model, ids):
    """Return logits, generated ids, and the names of the weights that would be trained."""
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return model(ids).logits.tolist(), made.tolist(), trained


ALONE = """
import json, sys
sys.modules["ctxkv_lib"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids, found = torch.tensor(json.loads(sys.argv[1])), []
for folder in sys.argv[2:]:
    model = load(folder)
    model.save_pretrained(folder + "/again/model")
    found += [answers(each, ids) for each in (model, load(folder + "/again/model"))]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_each_folder_runs_its_own_code_without_the_package_and_keeps_it_if_saved_again(tmp_path, own_module):
    ids, folders, expected = tiny_ids(5)[None], [], []
    for name, make in {
        "one": lambda: with_block(own_module("my_plugin", MINE)),
        "other": lambda: with_block(own_module("my_plugin", MINE.replace("self.share *", "2 *"))),
        "tuned": lambda: tiny_model(**TUNED),
        "plain": lambda: tiny_model(kv_method="variable"),
    }.items():
        model = make().eval()
        if model.model.log_unigram is not None:
            model.model.log_unigram.normal_()
        folders.append(tmp_path / name / "model")
        model.save_pretrained(folders[-1])
        expected += 2 * [answers(model, ids)]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    program = inspect.getsource(answers) + ALONE
    found = json.loads(in_python(program, ids.tolist(), *folders, env=environment, cwd=tmp_path))
    for (logits, *others), (wanted, *same) in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        assert others == same
    for folder in folders:
        again = {file.name: file.read_bytes() for file in (folder / "again/model").glob("*.py")}
        assert again == {file.name: file.read_bytes() for file in folder.glob("*.py")}


@pytest.mark.parametrize("name", ["attention.q.weight", "model.layer.attention.k.bias"])
def test_weights_that_do_not_fit_the_code_are_refused(tmp_path, name):
    """Models that were saved before version 0.2 contain weights with these names."""
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if weights.pop(name, None) is None:  # remove a known weight, or add an unknown one
        weights[name] = torch.ones(2, 2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"do not fit this code: {name} differs; load a folder from another version"
    ):
        ContextKVForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("needs_more", f"from .other import more\n{MINE}", r"needs_more\.py is '\.other'; allowed"),
        ("needs_mine", f"import my_plugin\n{MINE}", r"needs_mine\.py is 'my_plugin'; allowed: an installed"),
        ("windows", MINE, r"the file of a part is 'windows\.py'; allowed: another name"),
    ],
)
def test_code_that_would_not_load_from_a_folder_is_refused(tmp_path, own_module, name, code, said):
    own_module("my_plugin", MINE)
    model, file = with_block("my_plugin"), tmp_path / f"{name}.py"
    file.write_text(code)
    import_module("my_plugin").__file__ = str(file)
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "model")


def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path):
    class Inner(NearestTwo):
        pass

    model = ContextKVForCausalLM.of(tiny_method(layer=Inner), {"layer": {}})
    with pytest.raises(ValueError, match="a part of the model is 'Inner'; allowed: a class of a module"):
        model.save_pretrained(tmp_path)
    model = tiny_model()
    model.model.context_block.register_buffer("lost", torch.zeros(2), persistent=False)
    with pytest.raises(ValueError, match=r"a buffer is 'model\.context_block\.lost'; allowed: those saved"):
        model.save_pretrained(tmp_path)
