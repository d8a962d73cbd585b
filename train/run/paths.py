"""Paths in the configuration of a run, which may be given as text."""

from collections.abc import Sequence
from pathlib import Path


def as_paths(files: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """One file or several as a tuple of paths.

    >>> [path.name for path in as_paths("text/book.txt")]
    ['book.txt']
    """
    return tuple(map(Path, [files] if isinstance(files, str | Path) else files))
