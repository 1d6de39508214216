"""This file exists only for tools that look for it. The metadata is in pyproject.toml."""

from setuptools import setup

setup()
