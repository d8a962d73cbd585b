"""What the commands of every room share: options from dataclasses, tables, results as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

Config = TypeVar("Config")


def parse(config: type[Config], name: str, options: list[str], description: str | None = None) -> Config:
    """The dataclass that the options of ``jsparse name`` fill in; ``description`` heads its --help.

    Raises SystemExit with code 2, as tyro does, for options that do not parse.
    """
    # An example in Python is no help on the command line.
    description = (description or config.__doc__ or "").split(">>>")[0]
    return tyro.cli(config, prog=f"jsparse {name}", description=description, args=options)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, numbers to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def check_can_write(path: Path | None, option: str) -> None:
    """FileNotFoundError where a file could not be written when all is computed."""
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option}: the folder of {path} does not exist")


def write_json(path: Path, content: Any) -> None:
    """Write to a file, or to stdout where ``path`` is "-"."""
    text = json.dumps(content, indent=1) + "\n"
    if str(path) == "-":
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")
