"""The rooms import one way only, always by their full names, and all of them are packed."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

import jsparse

ROOT = Path(__file__).parent.parent

# What each room may import, besides itself and libraries. The command line may import everything.
MAY_IMPORT = {
    "pallas_kernels": set(),
    "jsparse": {"pallas_kernels"},
    "models": {"jsparse", "pallas_kernels"},
    "train": {"models", "jsparse", "pallas_kernels"},
    "serve": {"models", "jsparse", "pallas_kernels"},
    "examples": {"train", "serve", "models", "jsparse", "pallas_kernels"},
}
ROOMS = set(MAY_IMPORT)
COMMAND_LINE = "jsparse/__main__.py"


def room_of(module: str) -> str | None:
    """The room that a module lies in: ``jsparse.models.llama`` in models, ``jsparse.masks`` in jsparse."""
    parts = module.split(".")
    if parts[0] != "jsparse":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "jsparse"


def imported_modules(source: str) -> list[str]:
    """Every module that a source imports anywhere, lazily or not; relative imports come with their dots."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.append(module)
            # `from jsparse import models` imports a room as well.
            names += [
                f"{module}.{alias.name}"
                for alias in node.names
                if module == "jsparse" and alias.name in ROOMS
            ]
    return names


def violations(room: str, source: str) -> list[str]:
    """The imports of a file of ``room`` that break a rule."""
    found = []
    for module in imported_modules(source):
        bare = module.split(".")[0] in ROOMS - {"jsparse"}
        to = room_of(module)
        if module.startswith(".") or bare or (to is not None and to != room and to not in MAY_IMPORT[room]):
            found.append(module)
    return found


def source_files() -> list[Path]:
    return [path for room in sorted(ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize(
    ("room", "source", "bad"),
    [
        ("jsparse", "import jsparse.models", ["jsparse.models"]),
        ("jsparse", "def f():\n    from jsparse.train import finetune", ["jsparse.train"]),
        ("models", "from jsparse import serve", ["jsparse.serve"]),
        ("serve", "from jsparse.train.data import read", ["jsparse.train.data"]),
        ("pallas_kernels", "from jsparse.masks import causal", ["jsparse.masks"]),
        ("train", "from models import Llama", ["models"]),
        ("train", "from . import data", ["."]),
        ("train", "import jsparse.train.data, jsparse, numpy\nfrom jsparse.models import Llama", []),
    ],
)
def test_the_rule_itself(room, source, bad):
    assert violations(room, source) == bad


def test_imports_go_one_way():
    found = {}
    for path in source_files():
        name = path.relative_to(ROOT).as_posix()
        if name != COMMAND_LINE:
            found[name] = violations(path.relative_to(ROOT).parts[0], path.read_text())
    assert COMMAND_LINE not in found and len(found) >= len(ROOMS)
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_every_folder_with_code_is_packed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = config["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in source_files()}
    assert set(setuptools["package-dir"].values()) == folders
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    for package, folder in setuptools["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file(), folder
        assert package == (folder if folder == "jsparse" else f"jsparse.{folder.replace('/', '.')}")
    banned = config["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == ROOMS - {"jsparse"}


def test_a_room_is_imported_as_part_of_the_package():
    import jsparse.models

    assert Path(jsparse.models.__file__).parent == ROOT / "models"


def test_shapes_are_checked_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        jsparse.page_scores(jnp.ones(3), jnp.ones((2, 4)), jnp.ones((2, 4)))


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_license(tmp_path):
    tree = tmp_path / "tree"  # a copy, for setuptools builds beside the sources
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "demo")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(tree),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    shipped = [path for path in (ROOT / "models" / "small").iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in shipped}
    packed = [*source_files(), ROOT / "pallas_kernels" / "measured.json", *shipped]
    sources = [path.relative_to(ROOT).as_posix() for path in packed]
    assert sorted(names) == sorted(
        path if path.startswith("jsparse/") else f"jsparse/{path}" for path in sources
    )
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())
