"""Write the repository and the version into every file that names them: `make badges [REPO=owner/name]`."""

import json
import re
import sys
from pathlib import Path

sys.path.append("notebooks")
from outputs import code_digest

FOLLOWING = ("README.md", "CITATION.cff", "docs/*.md", "docs/conf.py", "docs/_templates/*.html")
FOLLOWING += ("notebooks/*.ipynb", "notebooks/study/*.md")

project = Path("pyproject.toml")
known = re.findall(r'Repository = "https://github.com/(.+)"', project.read_text())[0]
version = re.findall(r'__version__ = "(.+)"', Path("ctxkv_lib/__init__.py").read_text())[0]
repository = sys.argv[1] if sys.argv[1:] else known

changes = [
    (rf'(github\.com/|\.com/github/|"SOURCE = \\"){re.escape(known)}(?![\w-])', rf"\g<1>{repository}"),
    (re.escape(known.replace("/", ".github.io/")), repository.replace("/", ".github.io/")),
    (rf"({re.escape(repository)}/(?:blob|tree)/)[^/]+", rf"\g<1>v{version}"),
    (rf'("SOURCE = \\"{re.escape(repository)}@v)[^"\\]+', rf"\g<1>{version}"),
    (r"^version: .+", f"version: {version}"),
]
for path in [project, *(path for pattern in FOLLOWING for path in sorted(Path().glob(pattern)))]:
    text = new = path.read_text(encoding="utf-8")
    for pattern, replacement in changes:
        new = re.sub(pattern, replacement, new, flags=re.MULTILINE)
    if path.suffix == ".ipynb":  # these changes do not make its outputs out of date
        before, after = (code_digest(json.loads(notebook)) for notebook in (text, new))
        new = new.replace(f'"outputs_of": "{before}"', f'"outputs_of": "{after}"')
    if new != text:
        path.write_text(new, encoding="utf-8")
        print(path)
