"""For tools that look for it; the metadata stands in pyproject.toml."""

from setuptools import setup

setup()
