"""Writes the repository and the version into every file that names them: `make badges [REPO=owner/name]`.

The repository stands in pyproject.toml and is written there, too, where one is given; the version stands in
ctxkv_lib/__init__.py. Links to files go to the tag of the version.
"""

import re
import sys
from pathlib import Path

FOLLOWING = (
    "README.md",
    "CITATION.cff",
    "CHANGELOG.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "notebooks/study/*.md",
)
UNKNOWN = "OWNER/REPOSITORY"


def one(pattern: str, path: Path) -> str:
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)[0]


project = Path("pyproject.toml")
before = one(r'^Repository = "https://github.com/(.+)"', project)
version = one(r'^__version__ = "(.+)"', Path("ctxkv_lib/__init__.py"))
repository = sys.argv[1] if sys.argv[1:] else before
if not sys.argv[1:] and before == UNKNOWN:
    sys.exit("git's origin is not on github.com; name the repository: make badges REPO=owner/name")

changes = [
    (rf'(github\.com/|\.com/github/|"SOURCE = \\"){re.escape(before)}(?![\w-])', rf"\g<1>{repository}"),
    (re.escape(before.replace("/", ".github.io/")), repository.replace("/", ".github.io/")),
    (rf"({re.escape(repository)} && cd )[\w.-]+", rf"\g<1>{repository.partition('/')[2]}"),
    (rf"({re.escape(repository)}/blob/)[^/]+", rf"\g<1>v{version}"),
    (rf'("SOURCE = \\"{re.escape(repository)}@v)[^"\\]+', rf"\g<1>{version}"),
    (r"^(version: |  version = \{)[^}\n]+", rf"\g<1>{version}"),
]
changed = []
for path in [project, *(path for pattern in FOLLOWING for path in sorted(Path().glob(pattern)))]:
    text = new = path.read_text(encoding="utf-8")
    for pattern, replacement in changes:
        new = re.sub(pattern, replacement, new, flags=re.MULTILINE)
    if new != text:
        path.write_text(new, encoding="utf-8")
        changed.append(str(path))
print(f"{repository}, v{version}: {len(changed)} files changed.")
print(f"Notebooks install the tag; push it: git tag v{version} && git push origin v{version}")
