"""Text that every machine has: the sources of the Python standard library."""

import sysconfig
from pathlib import Path

HELD_OUT_EVERY = 8  # one module in eight is never trained on


def standard_library_files(smallest: int = 2_000) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The modules at the top of the standard library: those to train on, and those held out, disjoint.

    Sorted by name, whole and as they are; only files under ``smallest`` bytes and files that are not UTF-8
    are left out. The same interpreter always gives the same two lists.

    >>> train, held_out = standard_library_files()
    >>> len(train) > 3 * len(held_out) > 0, set(train) & set(held_out)
    (True, set())
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file for file in sorted(folder.glob("*.py")) if file.stat().st_size >= smallest and _is_utf8(file)
    ]
    if len(files) < 2 * HELD_OUT_EVERY:
        raise FileNotFoundError(
            f"{folder} holds {len(files)} modules in source form; the demo needs them as its text"
        )
    # The demo's settings were tuned with other modules held out, so these measure what nobody looked at.
    held_out = tuple(files[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    return tuple(file for file in files if file not in held_out), held_out


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
