"""Builds the reference from the docstrings; a warning is an error."""

import shutil
import warnings
from pathlib import Path
from pkgutil import iter_modules

import pdoc

import ctxkv_lib

OUT = Path("build/docs")

for name in ctxkv_lib.__all__:
    getattr(ctxkv_lib, name)  # pdoc shows what has been used already
ctxkv_lib.__all__ += [module.name for module in iter_modules(ctxkv_lib.__path__) if module.name != "__main__"]

warnings.simplefilter("error", UserWarning)  # pdoc's; a deprecation inside another library is not ours
shutil.rmtree(OUT, ignore_errors=True)
pdoc.render.configure(docformat="google", show_source=False)
pdoc.pdoc("ctxkv_lib", output_directory=OUT)

print(f"{len(list(OUT.rglob('*.html')))} pages: {OUT / 'index.html'}")
