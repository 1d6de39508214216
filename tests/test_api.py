"""The public names of the package: what they are, when they are imported, and where they are used."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import TOP, in_python, sources

import ctxkv_lib as ctxkv

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in [TOP / "README.md", *TOP.glob("docs/*.md")]}
SHOWN = {path.stem: "\n".join(sources(path).values()) for path in sorted((TOP / "notebooks").glob("*.ipynb"))}
SHOWN |= {
    f"{page} {n}": code
    for page, text in PAGES.items()
    for n, code in enumerate(re.findall(r"(?s)```python\n(.*?)```", text), 1)
}


def imported(code):
    """Return (module, name) for every `from module import name`."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in nodes for alias in node.names]


def test_the_package_gives_what_its_type_hints_promise():
    promised = imported(Path(ctxkv.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    assert sorted(name for _, name in promised) == sorted(ctxkv.__all__)
    for home, name in promised:
        found = (
            getattr(import_module(f"ctxkv_lib.{home}"), name) if home else import_module(f"ctxkv_lib.{name}")
        )
        assert getattr(ctxkv, name) is found
    assert dir(ctxkv) == sorted(ctxkv.__all__)


HEAVY = {"torch", "transformers", "datasets", "matplotlib", "numpy"}
MAIN = "from ctxkv_lib.cli import main; main"


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        ("import ctxkv_lib; ctxkv_lib.build_config('ci')", HEAVY),
        (f"{MAIN}(['--help'])", HEAVY),
        (f"{MAIN}(['info'])", {"transformers", "matplotlib"}),
        ("import ctxkv_lib.data.conversations", {*HEAVY, "pyarrow", "huggingface_hub"} - {"numpy"}),
        ("from ctxkv_lib.views import explore, live, figures", {"matplotlib.pyplot"}),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code, unused):
    """This lets `ctxkv --help` answer at once."""
    watched = f"import sys\ntry: {code}\nfinally: print(*sys.modules)"
    assert not unused & set(in_python(watched).split())


@pytest.mark.parametrize("code", SHOWN.values(), ids=SHOWN.keys())
def test_notebooks_and_pages_use_the_public_names_and_the_method_alone(code):
    code = re.sub(r"(?m)^( *)%.*$", r"\1pass", code)
    compile(code, "snippet", "exec")
    assert re.findall(r"(?m)^\s*(?:from|import) ctxkv_lib\.(?!method).+", code) == []
    used = {name for module, name in imported(code) if module == "ctxkv_lib"}
    used |= {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "ctxkv"
    }
    assert used <= {*ctxkv.__all__}
