"""Checks of the fields of a configuration, each a ValueError that names the field and what is allowed."""

import math
from typing import Any


def require_integers(config: Any, minimum: int, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{field} must be an integer >= {minimum}, not {value!r}")


def require_numbers(config: Any, *fields: str, allow_zero: bool = False) -> None:
    for field in fields:
        value = getattr(config, field)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not allow_zero):
            raise ValueError(f"{field} must be a number {'>=' if allow_zero else '>'} 0, not {value!r}")


def require_choice(config: Any, field: str, *allowed: str | int | None) -> None:
    if getattr(config, field) not in allowed:
        raise ValueError(
            f"{field} must be one of {', '.join(map(repr, allowed))}, not {getattr(config, field)!r}"
        )
