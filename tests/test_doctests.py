"""The examples in the docstrings and in the README are true."""

import doctest
import importlib
import re
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


# What makes the README's example small enough for a test; the rest runs as it stands.
SMALLER = {
    "context=8192, steps=1000": "context=256, steps=2, batch_size=1",
    'output="pattern", context=8192': 'output="pattern", context=256, min_context=256, steps=2, '
    "needles=1, words=1, sink=8, window=16",
    "budget=1024": "budget=64",
    "capacity=4096, batch=8": "capacity=256, batch=2",
}


@pytest.mark.slow
def test_readme(save_tiny_model, tmp_path, monkeypatch, capsys):
    """Every Python block of the README, one after another, on a tiny checkpoint."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    source = "\n".join(blocks)
    for large, small in SMALLER.items():
        assert large in source
        source = source.replace(large, small)

    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "my-llama")
    Path("book.txt").write_text("Call me Ishmael. " * 50)

    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["out"].shape == names["gradient"].shape == (1, 1024, 8, 64)
    assert len(names["result"].tokens[0]) == 100 and capsys.readouterr().out
    assert len(names["events"]) == 200 and names["streams"].sum() == 2
    assert names["logits"].shape == (1, len("Call me"), 257)
    assert names["model"].config.max_position_embeddings == 256
