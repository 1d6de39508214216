"""The shape of the package: every room imports only from rooms below it, and none grows out of hand."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ctxkv_lib"
# Top floor first. `model` comes last because it imports nothing: a saved model carries it alone.
FLOORS = [
    "__main__",
    "cli",
    "bench",
    "experiments",
    "report",
    "views",
    "measures",
    "runs",
    "baselines",
    "training",
    "data",
    "config",
    "locks",
    "files",
    "progress memory",
    "ranks",
    "errors threads",
    "model",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
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


def room_of(name):
    return name.split(".")[0]


def test_every_module_has_a_floor():
    assert {room_of(name_of(path)) for path in MODULES if name_of(path)} == set(FLOOR)


def test_every_room_is_a_package():
    """Else an installed copy lacks it."""
    for folder in {path.parent for path in MODULES}:
        assert (folder / "__init__.py").is_file(), folder


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_imports_upwards(path):
    if not name_of(path):  # the front door opens every room
        return
    here = room_of(name_of(path))
    for target in imported(path):
        room = room_of(target)
        if room in FLOOR and room != here:
            assert FLOOR[room] > FLOOR[here], f"{name_of(path)} imports {target}"


def test_no_room_has_a_cycle():
    modules = {name_of(path): path for path in MODULES}
    edges = {
        name: {target if target in modules else target.rpartition(".")[0] for target in imported(path)}
        for name, path in modules.items()
        if name
    }
    while edges:
        free = [name for name, targets in edges.items() if not targets & set(edges)]
        assert free, f"a cycle among {sorted(edges)}"
        for name in free:
            del edges[name]


def test_rooms_and_modules_stay_small():
    for folder in {path.parent for path in MODULES}:
        assert len(list(folder.glob("*.py"))) <= 10, folder
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
