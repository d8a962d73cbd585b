"""Paths in the configuration of a run, which may be given as text."""

from collections.abc import Sequence
from pathlib import Path


def as_paths(files: str | Path | Sequence[str | Path], field: str = "data") -> tuple[Path, ...]:
    """One file or several as a tuple of paths.

    - field: of the settings that name them, for messages.

    Raises ValueError for what a path would turn into something else: "" into the current folder, as where a
    shell's variable is not set, and an address on the web into a file with one slash less.

    >>> [path.name for path in as_paths("text/book.txt")]
    ['book.txt']
    """
    names = [files] if isinstance(files, str | Path) else list(files)
    for name in map(str, names):
        if not name:
            raise ValueError(f"{field} has an empty name; the current folder is '.'")
        if "://" in name:
            raise ValueError(
                f"{field}={name} is an address; download it, or name a dataset of the hub as org/name"
            )
    return tuple(map(Path, names))
