"""Small files that people have: JSON objects, and git-lfs's pointers in place of large files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else in it."""
    return parse_json_object(file.read_bytes(), file)


def parse_json_object(
    text: bytes, file: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """As :func:`read_json_object`, for a text that comes from ``file``.

    - pairs_hook: makes each object from its pairs; it may refuse them with a ValueError.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors too
        raise ValueError(f"{file} cannot be read: {pointer_hint(text) or error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def pointer_hint(start: bytes) -> str | None:
    """What to do about a file that begins with ``start``, if git-lfs has yet to bring what it stands for.

    >>> pointer_hint(b"version https://git-lfs.github.com/spec/v1")
    'it is a pointer of git-lfs; in its repository, git lfs pull brings the file'
    >>> pointer_hint(b"{}")
    """
    if start.lstrip().startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs; in its repository, git lfs pull brings the file"
    return None
