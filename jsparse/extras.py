"""Packages that are installed only with an extra."""

import importlib.util


class MissingExtra(ImportError):
    """A package is not installed that only some users need; the message says how to get it."""


def require_extra(package: str, extra: str, why: str) -> None:
    """MissingExtra where ``package`` cannot be imported.

    - why: what needs it, the beginning of the message.

    >>> require_extra("no_such_package", "plot", "plot: figures are drawn with matplotlib")
    Traceback (most recent call last):
    jsparse.extras.MissingExtra: plot: figures are drawn with matplotlib: pip install 'jsparse[plot]'
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{why}: pip install 'jsparse[{extra}]'")
