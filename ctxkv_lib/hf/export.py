"""Export the code of a saved model, so that transformers can load it without this package.

Each file's name ends in a digest of all this code, so that of two models in one process each has its own.
"""

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_imports, get_relative_imports

from .plugins import key_of, named_part

HERE = Path(__file__).parent
SUFFIX = Path(__file__).stem.removeprefix("export")  # of the files in a saved folder; empty in the package
FILES = {
    "hf": ("modeling", "configuration", "arguments", "cache", "export", "plugins", "prefill"),
    "method": ("config", "contexts", "copying", "losses", "model", "settings", "tuned", "windows"),
}
ANY = "|".join(name for names in FILES.values() for name in names)
OWN = re.compile(r"^([ \t]*)from \.(\w+)(\s+)import", re.MULTILINE)  # of files in one folder
PACKAGE = re.compile(rf"^([ \t]*)from (?:\.\.|ctxkv_lib\.)(?:method|hf)\.(?=(?:{ANY})\b)", re.MULTILINE)


def write_code(folder: Path, plugins: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Write all files of the model's code into `folder`, with imports adapted to one flat folder.

    `plugins` are those of `ContextKVConfig`. Raises a ValueError if the code of one cannot be exported.
    Returns the `auto_map` of its configuration.
    """
    if SUFFIX:  # the code of a saved folder is complete
        for file in HERE.glob(f"*{SUFFIX}.py"):
            (folder / file.name).write_bytes(file.read_bytes())
        return _auto_map(SUFFIX)
    files = [HERE.parent / package / f"{name}.py" for package, names in FILES.items() for name in names]
    named = ["\n# Classes that this model was trained with.\n"]
    for plugin in plugins.values():
        part = named_part(plugin)
        source = (
            Path(inspect.getfile(part)) if part.__module__.startswith("ctxkv_lib.") else source_file(part)
        )
        files.append(source)
        if same := [file for file in files[:-1] if file.stem == files[-1].stem and file != files[-1]]:
            raise ValueError(f"{files[-1]} and {same[0]} have one name; rename one of them")
        name = name_in_module(part)
        named.append(f"from .{files[-1].stem} import {name}\n")
        named.append(f'NAMED["{key_of(plugin)}"] = {name}\n')
    codes = {file.stem: PACKAGE.sub(r"\1from .", file.read_text(encoding="utf-8")) for file in files}
    codes["modeling"] += "".join(named)
    suffix = f"_{hashlib.sha256(repr(sorted(codes.items())).encode()).hexdigest()[:8]}"
    for name, code in codes.items():
        renamed = OWN.sub(rf"\1from .\2{suffix}\3import", code)
        (folder / f"{name}{suffix}.py").write_text(renamed, encoding="utf-8")
    return _auto_map(suffix)


def _auto_map(suffix: str) -> dict[str, str]:
    """Return the classes that transformers' auto classes load, in files of that suffix."""
    return {
        "AutoConfig": f"configuration{suffix}.ContextKVConfig",
        "AutoModelForCausalLM": f"modeling{suffix}.ContextKVForCausalLM",
    }


def source_file(part: Any) -> Path:
    """Return the file of a plug-in that can be exported.

    Raises:
        ValueError: it is defined in a notebook, a script, a function or a class, or its file needs more than
            installed packages and, of this one, `FILES`.
    """
    module = inspect.getmodule(part)
    file = getattr(module, "__file__", None)
    if module is None or file is None or module.__name__ == "__main__" or not name_in_module(part):
        raise ValueError(
            f"{part.__qualname__} is defined in a notebook, a script, a function or a class, not in a module"
        )
    try:
        _check_file(Path(file))
    except (SyntaxError, UnicodeDecodeError):  # transformers reads files as UTF-8
        raise ValueError(f"{file} cannot be read; save it as UTF-8 without a byte order mark") from None
    return Path(file)


def name_in_module(part: Any) -> str:
    """Return the name of a class in its module; empty if it has none there, as one within a function."""
    held = vars(inspect.getmodule(part)).items()
    return next((name for name, value in held if value is part), "")


def _check_file(file: Path) -> None:
    """Raise a ValueError if a file could not be loaded from a saved folder, which has `FILES` beside it."""
    if file.stem in {name for names in FILES.values() for name in names}:
        raise ValueError(f"{file} is named like a file of the model itself; rename it")
    if not file.stem.isidentifier():
        raise ValueError(f"{file} has a name that no import can have; rename it with letters, digits and _")
    if missing := {*get_imports(file)} - _installed():  # it leaves out what code tries to import
        raise ValueError(f"{file} imports {min(missing)}, which is no installed package; copy its code there")
    code, relative = file.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(code)):
        whole = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if own := [name for name in whole if name.partition(".")[0] == "ctxkv_lib"]:
            raise ValueError(f"{file} imports {own[0]} as a whole; write from {own[0]} import NAME")
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ctxkv_lib")):
            name, line = f"{'.' * node.level}{node.module or ''}", code.split("\n")[node.lineno - 1]
            if not PACKAGE.match(f"from {name}"):
                allowed = ", ".join(f"{package}.{each}" for package, names in FILES.items() for each in names)
                raise ValueError(f"{file} imports {name}; allowed of ctxkv_lib: {allowed}")
            if line[: node.col_offset].strip() or not PACKAGE.match(line[node.col_offset :]):
                raise ValueError(f"{file}, line {node.lineno}: write from {name} import on a line of its own")
            relative.add(name[1:])
    if texts := {*get_relative_imports(file)} - relative:  # where transformers looks for files, too
        raise ValueError(f"{file} has a text with a line that begins with from .{min(texts)}; reword it")


@cache
def _installed() -> set[str]:
    """Return the top-level packages that any code can import here; it reads the files of all of them."""
    return {*sys.stdlib_module_names, *packages_distributions(), "ctxkv_lib"}
