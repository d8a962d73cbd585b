"""JSON files that hold one object, with errors that name the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsparse.git_lfs import pointer_hint


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
