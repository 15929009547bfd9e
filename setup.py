"""Beam's --setup_file wants a setup.py; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
