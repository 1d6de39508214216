"""Set up the package for tools that need a setup.py. All metadata is in pyproject.toml."""

from setuptools import setup

setup()
