"""The examples in the docstrings are true; tests/docs does the same for the README and the documentation."""

import doctest
import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def public_modules() -> list[str]:
    """Every module, by the folders that pyproject.toml maps: an editable install lists none itself."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    names = [
        package if path.stem == "__init__" else f"{package}.{path.stem}"
        for package, folder in folders.items()
        for path in (ROOT / folder).glob("*.py")
    ]
    return sorted(name for name in names if not name.endswith("__main__"))


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
