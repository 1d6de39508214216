"""Builds the reference from the docstrings; a warning, or a page without what it shows, is an error."""

import shutil
import sys
import warnings
from pathlib import Path
from pkgutil import iter_modules

import pdoc

import ctxkv_lib

OUT = Path("build/docs")

for name in ctxkv_lib.__all__:
    getattr(ctxkv_lib, name)  # pdoc shows what has been used already
ctxkv_lib.__all__ += [room.name for room in iter_modules(ctxkv_lib.__path__) if room.name != "__main__"]

warnings.simplefilter("error", UserWarning)  # pdoc's; a deprecation inside another library is not ours
shutil.rmtree(OUT, ignore_errors=True)
pdoc.render.configure(docformat="google", show_source=False)
pdoc.pdoc("ctxkv_lib", output_directory=OUT)

if "packages.png" in (OUT / "ctxkv_lib.html").read_text(encoding="utf-8"):
    sys.exit("The picture of the packages is not in the page; `make picture` draws it.")
print(f"{len(list(OUT.rglob('*.html')))} pages: {OUT / 'index.html'}")
