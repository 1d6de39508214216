"""The shape of the package: it imports downwards only, and nothing in it grows out of hand."""

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.experiments import run

PACKAGE = Path(__file__).parent.parent / "ctxkv_lib"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # each imports only from itself and those above it in this list
    {"errors"},
    {"ranks"},
    {"progress"},
    {"files"},
    {"locks"},
    {"method"},
    {"data"},
    {"hf"},
    {"runs"},
    {"report"},
    {"views"},
    {"experiments"},
    {"measure"},
    {"options"},
    {"cli"},
    {"", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def name_of(path):
    """Dotted name below the package; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def absolute_names(path, at_import=False):
    """Full names of all that a module imports, such as `torch.nn` and `ctxkv_lib.files.digest`.

    Args:
        at_import: leave out imports within functions and for type checkers.
    """
    package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (at_import and (checked or isinstance(node, ast.FunctionDef))):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imported(path, at_import=False):
    """Names of the modules of the package that a module imports."""
    for full_name in {*absolute_names(path, at_import)} - {"ctxkv_lib.__version__"}:
        package, _, name = full_name.partition(".")
        if package == "ctxkv_lib":
            yield name if name in MODULES else name.rpartition(".")[0]


def lines(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_imports_go_downwards_only():
    wrong = {
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported(path)
        if LEVEL[other.split(".")[0]] > LEVEL[name.split(".")[0]]
    }
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    needs = {
        name: {other for other in imported(path, at_import=True) if other != name and other in MODULES}
        for name, path in MODULES.items()
    }
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert not needs


def test_the_method_imports_nothing_but_itself():
    allowed = {"torch", "numpy", "psutil", *sys.stdlib_module_names}
    for path in (PACKAGE / "method").glob("*.py"):
        for name in absolute_names(path):
            assert name.split(".")[0] in allowed or name.startswith("ctxkv_lib.method."), f"{path}: {name}"


def test_no_file_or_folder_grows_out_of_hand():
    assert lines((PACKAGE / "method").glob("*.py")) <= 2400  # an hour's reading
    assert not [f"{path}: {lines([path])} lines" for path in FILES if lines([path]) > 350]
    folders = {path.parent for path in FILES} - {PACKAGE}
    assert {folder.parent for folder in folders} == {PACKAGE}
    assert len(folders) <= 7
    for folder in {*folders, PACKAGE}:
        assert (folder / "__init__.py").is_file(), folder  # else an installed copy lacks it


def test_a_run_reads_its_first_conversation_within_8_steps(tiny_config, tmp_path):
    """A step goes on to another file, by the first call of a function; the run folder comes later."""
    called, files = set(), []

    def follow(frame, event, _):
        path, code = Path(frame.f_code.co_filename), frame.f_code
        if event == "call" and PACKAGE in path.parents and code not in called:
            called.add(code)
            files.extend([path] if path not in files[-1:] else [])
        if code is load_conversations.__code__:
            raise StopIteration

    sys.setprofile(follow)
    try:
        with pytest.raises(StopIteration):
            run(tiny_config, tmp_path / "run")
    finally:
        sys.setprofile(None)
    assert files[-1].stem == "conversations"
    assert len(files) <= 8
    assert not (tmp_path / "run").exists()
