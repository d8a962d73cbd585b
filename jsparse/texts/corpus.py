"""Text that every machine has: the sources of the Python standard library."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path

# Never trained on: one in eight of the modules of Python 3.13, by name, so they are the same everywhere.
HELD_OUT = (
    *("_compat_pickle", "_pydecimal", "argparse", "cmd", "copy", "enum", "getopt", "hmac", "mailbox"),
    *("operator", "plistlib", "pyclbr", "sched", "socket", "symtable", "tokenize", "uuid"),
)


# These teach and test nothing: test data, tables, and what differs from machine to machine.
_LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "ensurepip", "encodings", "pydoc_data", "lib2to3")


def standard_library_files(
    smallest: int = 2_000, *, packages: bool = False
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The modules at the top of the standard library: those to train on, and those held out, disjoint.

    With ``packages``, those to train on include the modules inside its packages, except their tests. The
    files are sorted by path. Only those under ``smallest`` bytes, those that are not UTF-8 and those that
    describe the machine are left out. An interpreter always gives the same two lists, and all hold out the
    same names.

    Raises FileNotFoundError if the standard library has none of the modules held out.

    >>> train, held_out = standard_library_files()
    >>> len(train) > 3 * len(held_out) > 0, set(train) & set(held_out)
    (True, set())
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = _modules(folder.glob("*.py"), smallest)
    held_out = tuple(file for file in files if file.stem in HELD_OUT)
    if not held_out:
        raise FileNotFoundError(
            f"{folder} holds {len(files)} modules in source form, and not one of {', '.join(HELD_OUT)}; they "
            "are needed as text"
        )
    if packages:
        inside = (file for file in folder.rglob("*.py") if not _is_left_out(file.relative_to(folder)))
        files = _modules(inside, smallest)
    return tuple(file for file in files if file not in held_out), held_out


def _modules(files: Iterable[Path], smallest: int) -> list[Path]:
    return [
        file
        for file in sorted(files)
        if file.stat().st_size >= smallest and not file.name.startswith("_sysconfig") and _is_utf8(file)
    ]


def _is_left_out(file: Path) -> bool:
    return bool({*_LEFT_OUT} & {*file.parts}) or file.parts[0].startswith("config-")


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
