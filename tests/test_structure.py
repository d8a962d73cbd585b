"""The rooms import one way only, always by their full names, and all of them are packed."""

import ast
import importlib
import importlib.util
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
from jsparse.cache import decode as decode_table
from jsparse.implementations import table as attention_table

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "long_chat"  # a recipe to read and run, which is not installed

# The rooms from the ground up: each may import those before it, as far as ROOMS says, and itself.
GROUND = {"arrays", "checks", "device", "extras", "files", "hub", "integers", "lazy", "mesh"}
ROOMS = {
    "pallas_kernels": set(),
    "ground": set(),  # single files that know nothing of the rooms
    "reports": {"ground"},
    "masks": {"ground"},
    "implementations": {"pallas_kernels", "ground", "masks"},
    "attention": {"pallas_kernels", "ground", "masks", "implementations"},
    "cache": {"pallas_kernels", "ground", "masks", "implementations", "attention"},
    "texts": {"ground", "reports"},
    "plan": {"ground", "reports", "masks"},
}
LIBRARY = set(ROOMS) | {"jsparse"}  # "jsparse" is the package's own face
ROOMS |= {
    "jsparse": set(ROOMS),
    "models": LIBRARY,
    "serve": LIBRARY | {"models"},
    "evaluate": LIBRARY | {"models", "serve"},
    "train": LIBRARY | {"models", "serve", "evaluate"},
    "examples": LIBRARY | {"models", "serve", "evaluate", "train"},
}
AT_THE_TOP = {"pallas_kernels", "models", "serve", "evaluate", "train", "examples"}
COMMAND_LINE = "jsparse.__main__"  # knows every room


def room_of(module: str) -> str | None:
    """The room a module lies in: ``jsparse.models.llama`` in models, ``jsparse.sequence`` in attention."""
    parts = module.split(".")
    if parts[0] != "jsparse":
        return None
    if len(parts) == 1:
        return "jsparse"
    if parts[1] in GROUND:
        return "ground"
    return "attention" if parts[1] == "sequence" else parts[1]


def source_files() -> dict[str, Path]:
    """Every module of the package by name; a room's face goes by the room's name. Scripts are no modules."""
    found = {}
    for folder in sorted(AT_THE_TOP | {"jsparse"}):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if SCRIPTS in path.parents:
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "jsparse" else ("jsparse", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = source_files()


def imported_modules(source: str) -> set[str]:
    """The modules that a source imports anywhere, lazily, by name or only for types; relative ones with their
    dots. What it takes from the package's face counts too, as in ``jsparse.serve.generate``.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from jsparse.serve import loop` imports the module, and from the face only what is no module.
            full = {alias.name: f"{module}.{alias.name}" for alias in node.names}
            names |= {path if path in MODULES else module for path in full.values()}
        elif isinstance(node, ast.Attribute):
            names |= {ast.unparse(node)} & set(MODULES)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {x.value for x in node.args if isinstance(x, ast.Constant) and x.value in MODULES}
    return names


def violations(room: str, source: str) -> list[str]:
    """The imports of a module of ``room`` that break a rule."""
    found = []
    for module in sorted(imported_modules(source)):
        bare = module.split(".")[0] in AT_THE_TOP
        to = room_of(module)
        if module.startswith(".") or bare or (to is not None and to != room and to not in ROOMS[room]):
            found.append(module)
    return found


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which imports, through others of the set, itself."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), list(imports[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += imports[module]
        return seen

    reached = {module: reach(module) for module in imports}
    found = []
    for module in sorted(imports):
        circle = {other for other in reached[module] if module in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


@pytest.mark.parametrize(
    ("room", "source", "bad"),
    [
        ("masks", "import jsparse.models", ["jsparse.models"]),
        ("attention", "def f():\n    from jsparse.train import finetune", ["jsparse.train"]),
        ("models", "from jsparse import serve", ["jsparse.serve"]),
        ("serve", "from jsparse.train.data.windows import read", ["jsparse.train.data.windows"]),
        ("pallas_kernels", "from jsparse.masks import causal", ["jsparse.masks"]),
        ("masks", "from jsparse import attention", ["jsparse.attention"]),
        ("implementations", "from jsparse.cache.pages import PagedKVCache", ["jsparse.cache.pages"]),
        ("evaluate", "from jsparse.train import finetuning", ["jsparse.train.finetuning"]),
        ("train", "from models import Llama", ["models"]),
        ("train", "from . import data", ["."]),
        ("models", "import jsparse\njsparse.serve.generate", ["jsparse.serve"]),
        ("masks", "importlib.import_module('jsparse.serve.layout')", ["jsparse.serve.layout"]),
        ("masks", "__import__('jsparse.serve')", ["jsparse.serve"]),
        ("train", "import jsparse.train.data, jsparse, numpy\nfrom jsparse.models import Llama", []),
    ],
)
def test_the_rule_itself(room, source, bad):
    assert violations(room, source) == bad


def test_imports_go_one_way():
    found = {
        name: violations(room_of(name) or "", path.read_text())
        for name, path in MODULES.items()
        if name != COMMAND_LINE
    }
    assert len(found) >= len(ROOMS)
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_nothing_imports_in_a_circle():
    """Not even for types, nor inside a function: what two modules both need stands in a third."""
    imports = {
        name: imported_modules(path.read_text()) & set(MODULES)
        for name, path in MODULES.items()
        if name != COMMAND_LINE
    }
    assert circles(imports) == []


NAMES = {row.name for row in (*attention_table.IMPLEMENTATIONS, *decode_table.IMPLEMENTATIONS)}


def compared_names(source: str) -> list[str]:
    """The expressions of a source that ask for an implementation by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asks = isinstance(node, ast.Compare | ast.MatchValue)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asks = node.func.attr in ("startswith", "endswith", "removeprefix", "index")
        keys = node.keys if isinstance(node, ast.Dict) else [node] if asks else []
        strings = {
            x.value
            for key in keys
            if key is not None
            for x in ast.walk(key)
            if isinstance(x, ast.Constant) and isinstance(x.value, str)
        }
        if any(text in NAMES or text.startswith("mosaic") for text in strings):
            found.append(ast.unparse(node))
    return found


def test_a_compared_name_is_found():
    sources = (
        "if name == 'xla': pass",
        "x = name in ('a', 'cudnn')",
        "name.startswith('mosaic')",
        "{'xla': 1}[name]",
        "name.removeprefix('mosaic_gpu')",
        "('xla', 'cudnn').index(name)",
    )
    assert [len(compared_names(source)) for source in sources] == [1, 1, 1, 1, 1, 1]
    assert compared_names("attention(q, k, v, mask, implementation='xla')") == []


def test_only_the_tables_know_implementations_by_name():
    """A new device is one file and one row: nothing else asks which implementation it has."""
    found = {name: compared_names(path.read_text()) for name, path in MODULES.items()}
    assert {name: asked for name, asked in found.items() if asked} == {}


def test_every_folder_with_code_is_packed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = config["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in MODULES.values()}
    assert set(setuptools["package-dir"].values()) == folders
    assert set(setuptools["packages"]) == set(setuptools["package-dir"])
    for package, folder in setuptools["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file(), folder
        name = folder.replace("/", ".")
        assert package == (name if name.split(".")[0] == "jsparse" else f"jsparse.{name}")
    banned = config["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == AT_THE_TOP


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
    packed = [*MODULES.values(), ROOT / "pallas_kernels" / "measured.json", *shipped]
    sources = [path.relative_to(ROOT).as_posix() for path in packed]
    assert sorted(names) == sorted(
        path if path.startswith("jsparse/") else f"jsparse/{path}" for path in sources
    )
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_public_names_are_there_for_a_star_and_can_be_replaced(monkeypatch):
    names: dict[str, object] = {}
    exec("from jsparse import *", names)
    assert names["BlockMask"] is jsparse.BlockMask and "sys" not in names
    importlib.import_module("jsparse.attention")
    attention = jsparse.attention
    with monkeypatch.context() as patch:
        patch.setattr(jsparse, "attention", len)
        assert jsparse.attention is len
    assert jsparse.attention is attention and attention.__name__ == "attention"


@pytest.mark.parametrize("room", ["", ".masks", ".models", ".serve", ".evaluate", ".train"])
def test_no_module_hides_a_public_name(room):
    """Importing a module makes it an attribute of its package, in place of a name that is the same."""
    names = importlib.import_module(f"jsparse{room}").__all__
    hidden = [name for name in names if importlib.util.find_spec(f"jsparse{room}.{name}") is not None]
    assert hidden == ([] if room else ["attention"])  # jsparse/__init__.py sees to that one
