"""The shape of the package: every room imports only from rooms below it, and none grows out of hand."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ctxkv_lib"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Dotted names, from the package's top, of what a module imports of the package."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                yield ".".join(part for part in [*base, alias.name] if part)


def test_every_room_is_a_package():
    """Else an installed copy lacks it."""
    for folder in {path.parent for path in MODULES}:
        assert (folder / "__init__.py").is_file(), folder
