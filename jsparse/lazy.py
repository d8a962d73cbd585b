"""Packages that import their names when they are first asked for, so that ``jsparse --help`` needs no jax."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_face(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package, for the names that its file imports for type checkers.

    Those are the imports under ``if TYPE_CHECKING``: people and programs read one and the same list. The
    package's modules are imported when they are asked for, too.

    - package: its ``__name__``.
    - file: its ``__file__``.

    >>> get, names = lazy_face("jsparse.masks", importlib.import_module("jsparse.masks").__file__)
    >>> "causal" in names(), get("causal").__module__
    (True, 'jsparse.masks.token_mask')
    >>> get("effect")
    Traceback (most recent call last):
    AttributeError: module 'jsparse.masks' has no attribute 'effect'
    """
    modules = _typed_imports(Path(file).read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name == "__all__":  # for `from jsparse.masks import *`
            return sorted(modules)
        if name in modules:
            value = getattr(importlib.import_module(modules[name]), name)
        else:
            value = _module(package, name)
        vars(sys.modules[package])[name] = value  # not asked for again
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})


def _typed_imports(source: str) -> dict[str, str]:
    """The names imported under ``if TYPE_CHECKING``, and the modules that they are from."""
    return {
        alias.name: node.module
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _module(package: str, name: str) -> Any:
    full = f"{package}.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
