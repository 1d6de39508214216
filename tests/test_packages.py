"""The method imports little, since saved models contain its files and students read them on their own."""

import ast
import sys

import pytest
from conftest import TOP

FILES = sorted((TOP / "ctxkv_lib" / "method").glob("*.py"))
MORE = {"modeling.py": {"transformers"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_method_imports_torch_numpy_psutil_and_itself(path):
    allowed = {"torch", "numpy", "psutil", *sys.stdlib_module_names, *MORE.get(path.name, ())}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert path.name != "reference.py"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
