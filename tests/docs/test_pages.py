"""What the README and docs/ show is true: Python blocks run, commands and options exist, names import."""

import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import jsparse
from jsparse.__main__ import main

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A language, or a directive in braces, and the text up to the closing fence.
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# What makes an example small enough for a test; the rest runs as it stands.
SMALLER = {
    "context=8192, steps=1000": "context=256, steps=2, batch_size=1",
    'output="pattern", context=8192': 'output="pattern", context=256, min_context=256, steps=2, '
    "needles=1, words=1, sink=8, window=16",
    "budget=1024": "budget=64",
    "capacity=4096, batch=8": "capacity=256, batch=2",
    "contexts=[1024, 2048]": "contexts=[32, 64]",
}
# These train, or compile much.
SLOW = {
    "README.md",
    "docs/gallery.md",
    "docs/guides/finetune.md",
    "docs/guides/heads.md",
    "docs/guides/sparse_cache.md",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


def runs_here(block: str) -> bool:
    """Whether what a block imports beside jsparse is installed: transformers and peft are not everywhere."""
    modules = re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE)
    return all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
        for page in pages_with("python")
    ],
)
def test_python_blocks_run(page, save_tiny_model, tmp_path, monkeypatch, capsys):
    """A page's blocks, one after another, on tiny checkpoints."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "my-llama")
    if 'output="my-llama-long"' not in page.read_text():
        save_tiny_model(tmp_path / "my-llama-long", max_position_embeddings=256)
    Path("book.txt").write_text("Call me Ishmael. " * 50)
    Path("held-out.txt").write_text("Some years ago, never mind how long. " * 10)
    jsparse.HeadPattern([[0.9, 0.1], [0.2, 0.8]]).save("full_attention_heads.tsv")

    source = "\n".join(block for block in blocks(page, "python") if runs_here(block))
    for large, small in SMALLER.items():
        source = source.replace(large, small)
    names: dict = {"__name__": "page"}
    exec(compile(source, name_of(page), "exec"), names)
    if page.name == "README.md":
        assert names["out"].shape == names["gradient"].shape == (1, 1024, 8, 64)
        assert len(names["result"].tokens[0]) == 100 and capsys.readouterr().out
        assert names["model"].config.max_position_embeddings == 256
    if page.name == "heads.md":
        assert names["streams"].sum() == 2
    if page.name == "masks.md":
        assert names["logits"].shape == (1, len("Call me"), 257)


def test_what_is_made_smaller_is_there():
    text = "".join(page.read_text() for page in PAGES)
    assert [large for large in SMALLER if large not in text] == []


def commands(page: Path) -> list[list[str]]:
    """The words of each command line that starts with ``jsparse``."""
    found = []
    for block in blocks(page, "sh", "bash", "console", ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["jsparse"]:
                found.append(words[1:])
    return found


@functools.cache
def help_of(*command: str) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        assert main([*command, "--help"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_and_their_options_exist(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for words in commands(page):
        options = [word for word in words if word.startswith("--")]
        command = [word for word in words[: words.index(options[0]) if options else None] if word.isalpha()]
        text = help_of(*command, *(["--train"] if "--train" in options else []))
        for option in options:
            known = re.search(rf"(?<![\w-]){re.escape(option)}(?![\w.-])", text)
            assert known or option in ("--help", "--train"), f"jsparse {' '.join(words)}: {option} in\n{text}"


def test_the_check_of_options_fails_where_it_should():
    assert "--budget" in help_of("generate") and "--invented" not in help_of("generate")
    assert main(["invented"]) == 2


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_can_be_imported(page):
    """Every `jsparse.something` of the text."""
    for name in set(re.findall(r"`(jsparse(?:\.\w+)+)(?:\(.*?\))?`", page.read_text())):
        parts, found = name.split("."), None
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            found = functools.reduce(getattr, parts[end:], found)
            break
        assert found is not None, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Relative links lead to files. Results pages are written by the benchmarks and checked with them."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target and "gallery_pictures/" not in target:
            assert (page.parent / target).exists(), target


def test_every_public_name_is_documented():
    documented = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    for face in (
        "jsparse",
        *(f"jsparse.{room}" for room in ("masks", "models", "train", "serve", "evaluate")),
    ):
        module = importlib.import_module(face)
        for name in re.findall(r"^from .* as (\w+)$", Path(module.__file__ or "").read_text(), re.MULTILINE):
            assert re.search(rf"\.{name}\b|``{name}``", documented), f"{face}.{name}"


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
