"""Checks of a configuration. Each error names the field, its value and what is allowed."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jsparse.integers import require_integer


def require_integers(config: Any, minimum: int, *fields: str) -> None:
    """ValueError unless each of these fields of ``config`` is an integer of at least ``minimum``."""
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, int):  # NumPy's are refused too: settings are written as JSON
            raise ValueError(f"{field} must be an integer >= {minimum}, not {value!r}")
        require_integer(field, value, minimum)


def require_seed(config: Any) -> None:
    """ValueError unless ``config.seed`` has the 32 bits that JAX's generators take on every machine."""
    require_integers(config, 0, "seed")
    require_integer("seed", config.seed, 0, 2**32 - 1)


def require_numbers(config: Any, *fields: str, allow_zero: bool = False) -> None:
    """ValueError unless each of these fields of ``config`` is a finite number above 0, or 0 if allowed."""
    for field in fields:
        value = getattr(config, field)
        if not allow_zero:
            require_positive(field, value)
        elif not is_number(value) or value < 0:
            raise ValueError(f"{field} must be a number >= 0, not {value!r}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def require_positive(name: str, value: Any, allowed: str = "a number > 0") -> None:
    """ValueError unless ``value`` is a finite number above 0."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


def require_fraction(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a number from 0 on and below 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), not {value!r}")


def require_choice(config: Any, field: str, *allowed: str | int | None) -> None:
    """ValueError unless this field of ``config`` is one of ``allowed``."""
    if getattr(config, field) not in allowed:
        raise ValueError(
            f"{field} must be one of {', '.join(map(repr, allowed))}, not {getattr(config, field)!r}"
        )


def require_new_folder(path: Path, option: str = "output", *, allowed: Collection[str] = ()) -> None:
    """FileExistsError unless a folder is empty or does not exist yet, so that no result is overwritten.

    - path: the folder.
    - option: the name under which the path was given; the message begins with it.
    - allowed: names of files that the folder may hold.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{option}={path} is a file; it must be a folder, or not exist")
    others = sorted({file.name for file in path.iterdir()} - set(allowed)) if path.exists() else []
    if others:
        raise FileExistsError(
            f"{option}={path} has {'other ' if allowed else ''}files ({', '.join(others[:3])}); "
            "choose a new folder"
        )
