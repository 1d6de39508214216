"""The shape of the package: it imports downwards only."""

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path

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
