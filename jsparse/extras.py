"""Packages that are installed only with an extra."""

import importlib.util


class MissingExtra(ImportError):
    """A package that only some users need is not installed; the message says how to get it."""


def require_extra(package: str, extra: str, why: str) -> None:
    """MissingExtra if ``package`` cannot be imported.

    - package: its name.
    - extra: the extra of jsparse that installs it.
    - why: what needs it; the message begins with this.

    >>> require_extra("no_such_package", "plot", "this needs matplotlib")
    Traceback (most recent call last):
    jsparse.extras.MissingExtra: this needs matplotlib: in a clone of jsparse, pip install -e '.[plot]'
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{why}: in a clone of jsparse, pip install -e '.[{extra}]'")
