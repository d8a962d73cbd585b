"""Integers: checking an argument, rounding up to blocks, and powers of two."""

from typing import Any

import numpy as np


def is_integer(value: object) -> bool:
    """Whether a value is a Python or NumPy integer; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def require_integer(
    name: str, value: Any, least: int = 1, most: int | None = None, otherwise: str = ""
) -> None:
    """ValueError that names the argument and what is allowed, unless ``value`` is an integer in the range.

    ``otherwise`` is what the caller allows beside integers, for the message: " or None".
    """
    if not is_integer(value) or value < least or (most is not None and value > most):
        allowed = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {allowed}{otherwise}, not {value!r}")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: how many blocks of b tokens hold a tokens.

    >>> cdiv(9, 4)
    3
    """
    return -(-a // b)


def power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> [power_of_two_from(n) for n in (1, 4, 5)]
    [1, 4, 8]
    """
    return 1 << (n - 1).bit_length()


def power_of_two_up_to(n: int) -> int:
    """The largest power of two that is at most n, and at least 1.

    >>> [power_of_two_up_to(n) for n in (0, 4, 5)]
    [1, 4, 4]
    """
    return 1 << max(n, 1).bit_length() - 1
