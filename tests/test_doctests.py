"""The examples in the docstrings and in the README are true."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import jsparse

ROOT = Path(__file__).parent.parent
ROOMS = ["examples", "models", "pallas_kernels", "serve", "train"]


def public_modules() -> list[str]:
    """Every module of the package. The rooms are named one by one: an editable install does not list them."""
    names = ["jsparse"]
    for package in [jsparse] + [importlib.import_module(f"jsparse.{room}") for room in ROOMS]:
        modules = pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}.")
        names += [package.__name__] + [module.name for module in modules]
    return sorted({name for name in names if not name.endswith("__main__")})


@pytest.mark.parametrize("name", public_modules())
def test_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        example
        for name in public_modules()
        for test in finder.find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(examples) >= 10
