"""The wheel has every file, and Colab's versions are within our ranges."""

import tomllib
from pathlib import PurePath

from conftest import TOP
from packaging.requirements import Requirement

PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_every_file_of_the_package_is_in_the_wheel_and_setup_py_leaves_all_to_the_metadata():
    patterns = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = TOP / "ctxkv_lib"
    assert (package / "py.typed").is_file()
    for path in package.rglob("*.*"):
        if path.suffix not in (".py", ".pyc"):
            inside = PurePath(path.relative_to(package))
            assert any(inside.match(pattern) for pattern in patterns["ctxkv_lib"]), inside
    assert (TOP / "setup.py").read_text().splitlines()[-1] == "setup()"


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
