"""What is published: files that name versions, the repository or commands agree with the metadata."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePath

import pytest
import yaml
from conftest import TOP
from packaging.requirements import Requirement

import ctxkv_lib

PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in TOP.glob(".github/workflows/*.yml")}
CITATION = yaml.safe_load((TOP / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_version_and_links_have_one_home():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", ctxkv_lib.__version__)
    assert CITATION["version"] == ctxkv_lib.__version__
    assert f"## [{ctxkv_lib.__version__}]" in (TOP / "CHANGELOG.md").read_text(encoding="utf-8")
    repository = PROJECT["urls"]["Repository"]
    assert all(url.startswith(repository) for url in PROJECT["urls"].values())
    assert CITATION["repository-code"] == repository


def test_every_file_of_the_package_is_in_the_wheel_and_setup_py_leaves_all_to_the_metadata():
    patterns = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = TOP / "ctxkv_lib"
    assert (package / "py.typed").is_file()
    for path in package.rglob("*.*"):
        if path.suffix not in (".py", ".pyc"):
            inside = PurePath(path.relative_to(package))
            assert any(inside.match(pattern) for pattern in patterns["ctxkv_lib"]), inside
    assert (TOP / "setup.py").read_text().splitlines()[-1] == "setup()"


def test_readme_and_ci_install_what_they_use():
    """`requirements.txt` is for using, the second command adds testing and linting."""
    assert "-e .[offline,notebooks,launch]" in (TOP / "requirements.txt").read_text()
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    assert 'pip install -r requirements.txt -e ".[dev]" && .venv/bin/pytest' in readme
    for script in (TOP / ".ci/run", TOP / ".github/workflows/ci.yml"):
        assert '-r requirements.txt -e ".[dev,harness]"' in script.read_text()
    tools = {re.split("[<>=]", need)[0] for name in ("test", "dev") for need in EXTRAS[name]}
    assert {"pytest", "ruff", "mypy", "build", "twine", "pre-commit", "nbstripout"} <= tools
    hooks = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} <= tools


def test_ci_runs_on_the_pythons_and_systems_that_the_metadata_names():
    matrix = WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    named = {name.removeprefix(prefix) for name in PROJECT["classifiers"] if name.startswith(prefix + "3.")}
    assert set(matrix["python"]) == named == {"3.11", "3.12", "3.13", "3.14"}
    assert PROJECT["requires-python"] == f">={min(named)}"
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    for path in TOP.glob(".github/workflows/*.yml"):
        assert set(re.findall(r'python(?:-version)?: "(.+?)"', path.read_text())) <= named


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_call_targets_that_exist(name):
    targets = set(re.findall(r"^(\w+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    for job in WORKFLOWS[name]["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(re.findall(r"^make (\w+)", step.get("run", ""), re.MULTILINE)) <= targets
    assert WORKFLOWS[name]["permissions"]["contents"] == "read"


def test_forms_and_dependabot_are_well_formed():
    forms = [yaml.safe_load(path.read_text()) for path in TOP.glob(".github/ISSUE_TEMPLATE/[bi]*.yml")]
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["attributes"]["label"] for field in form["body"])
    assert [form["name"] for form in sorted(forms, key=lambda form: form["name"])] == ["Bug", "Idea"]
    updates = yaml.safe_load((TOP / ".github/dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}


def test_colabs_versions_are_within_our_ranges():
    needs = [Requirement(need) for need in [*PROJECT["dependencies"], *EXTRAS["launch"]]]
    ranges = {
        need.name: need.specifier
        for need in needs
        if not need.marker or need.marker.evaluate({"python_version": "3.13"})
    }
    lines = (TOP / ".ci/colab-constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "transformers", "datasets", "ipywidgets", "numpy"} <= pins.keys() <= ranges.keys()
    for name, version in pins.items():
        assert ranges[name].contains(version.replace("*", "99")), name


@pytest.fixture
def copy(tmp_path):
    """What `make badges` reads and writes."""
    files = ("Makefile", "*.toml", "*.md", "*.cff", ".ci/badges.py", "ctxkv_lib/__init__.py")
    texts = ("docs/*.md", "notebooks/*.ipynb", "notebooks/study/*.md")
    for path in (path for pattern in (*files, *texts) for path in TOP.glob(pattern)):
        (tmp_path / path.relative_to(TOP)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(TOP))
    return tmp_path


def texts(folder):
    return {
        path.relative_to(folder): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def make_badges(folder, repository):
    command = ["make", "badges", f"REPO={repository}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_repository_and_version_are_written_by_one_command_which_has_nothing_left_to_write(copy):
    before = texts(copy)
    repository = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    assert make_badges(copy, repository).returncode == 0
    assert texts(copy) == before, "run `make badges`"
    init = copy / "ctxkv_lib/__init__.py"
    init.write_text(init.read_text().replace(f'"{ctxkv_lib.__version__}"', '"7.8.9"'))
    assert make_badges(copy, "someone/something").returncode == 0
    after = texts(copy)
    assert 'Repository = "https://github.com/someone/something"' in after[Path("pyproject.toml")]
    assert "\nversion: 7.8.9\n" in after[Path("CITATION.cff")]
    assert "rato-tokyo/new-llm" in after[Path("CITATION.cff")]
    for page in ("README.md", "docs/start.md"):
        assert "git clone https://github.com/someone/something && cd something\n" in after[Path(page)]
    for path in (path for path in after if path.suffix == ".ipynb"):
        assert 'REPOSITORY = \\"someone/something\\"' in after[path]
        assert 'VERSION = \\"v7.8.9\\"' in after[path]
        assert f"/github/someone/something/blob/v7.8.9/notebooks/{path.name}" in after[path]
        assert "OWNER/REPOSITORY/" not in after[path]
        assert len(before[path].splitlines()) == len(after[path].splitlines())


def test_an_unknown_repository_is_refused_in_a_sentence(copy):
    (copy / "pyproject.toml").write_text('Repository = "https://github.com/OWNER/REPOSITORY"')
    done = make_badges(copy, "")
    assert done.returncode != 0
    assert "name the repository: make badges REPO=owner/name" in done.stderr
