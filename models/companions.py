"""What a model's folder has beside config.json and weights, and a copy of the model needs too."""

import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from jsparse.files import read_json_object
from jsparse.hub import (
    CHAT_TEMPLATE_FILES,
    COMPANIONS,
    GENERATION_FILE,
    LICENCE_FILES,
    NEVER,
    TOKENIZER_FILES,
)

TEMPLATES_FOLDER = "additional_chat_templates"
_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


def companions(folder: Path, patterns: Iterable[str] = COMPANIONS) -> dict[str, Path]:
    """The files that transformers, vLLM and llama.cpp's converter read beside config.json and the weights.

    These are the tokenizer's in all their forms, the chat templates, and ``generation_config.json``; and, for
    whoever passes the model on, its licence. A README.md describes the model it came with, and is left out.

    - folder: of a model or an adapter.
    - patterns: which of them, by ``fnmatch``.

    Returns the files by their paths below ``folder``; none can run code.

    >>> Path("model").mkdir()
    >>> for name in ("README.md", "config.json", "tokenizer.json", "tokenizer.model", "LICENSE.txt"):
    ...     _ = Path("model", name).write_text("")
    >>> list(companions(Path("model")))
    ['LICENSE.txt', 'tokenizer.json', 'tokenizer.model']
    """
    patterns = tuple(patterns)
    found = sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES_FOLDER}/*")])
    files = {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}
    return {
        name: file for name, file in files.items() if _matches(name, patterns) and not _matches(name, NEVER)
    }


def companions_of_merged(base: Path, adapter: Path) -> dict[str, Path]:
    """The :func:`companions` of a base model merged with an adapter that brings its own tokenizer.

    The adapter's files come first. The base's fill in what it lacks where that fits: other forms of the same
    tokenizer (a ``tokenizer.model`` beside a ``tokenizer.json``) if both have the same tokens, and chat
    templates if it has none. The licence is the base's.
    """
    own = companions(adapter)
    files = companions(base, (GENERATION_FILE,)) | own | companions(base, LICENCE_FILES)
    if same_tokens(base, adapter):
        # Beside the adapter's settings, the base's would say something else, or the same once more.
        settings = {_SETTINGS, "special_tokens_map.json"} if _SETTINGS in own else set()
        others = companions(base, TOKENIZER_FILES)
        files |= {name: file for name, file in others.items() if name not in settings | own.keys()}
    if not companions(adapter, CHAT_TEMPLATE_FILES) and not _has_template(own.get(_SETTINGS)):
        files |= companions(base, CHAT_TEMPLATE_FILES)
    return files


def copy_files(files: Mapping[str, Path], output: Path) -> None:
    """Copy files unchanged, each to its path below ``output``, which is created."""
    output.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, output / name)


def same_tokens(one: Path, other: Path) -> bool:
    """Whether two folders have a ``tokenizer.json``, with the same tokens and ids."""
    if not all((folder / _TOKENIZER).is_file() for folder in (one, other)):
        return False
    from jsparse.texts.tokenizer import load_tokenizer  # which `jsparse convert --help` can do without

    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()


def _has_template(settings: Path | None) -> bool:
    return settings is not None and read_json_object(settings).get("chat_template") is not None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
