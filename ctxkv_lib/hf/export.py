"""The code that a saved model carries, so that transformers can load it without this package."""

import re
from pathlib import Path

HERE = Path(__file__).parent
FILES = {
    "hf": ("modeling", "configuration", "cache", "export"),
    "method": ("config", "losses", "model", "scan", "settings", "windows"),
}
AUTO_MAP = {
    "AutoConfig": "configuration.ContextKVConfig",
    "AutoModelForCausalLM": "modeling.ContextKVForCausalLM",
}


def write_code(folder: Path) -> None:
    """Write all files of the model's code side by side into `folder`, their imports adapted to that."""
    for package, names in FILES.items():
        beside = HERE.parent / package
        for name in names:
            file = (beside if beside.is_dir() else HERE) / f"{name}.py"  # in a saved folder they lie here
            flat = re.sub(r"^from \.\.\w+\.", "from .", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            (folder / file.name).write_text(flat, encoding="utf-8")
