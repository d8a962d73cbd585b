"""What the commands of every room share: options from dataclasses, tables, results as JSON."""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jsparse.reports.option_errors import left_over, rejected, unknown_or_missing

Config = TypeVar("Config")

# A --model whose default is the model in the package: --help then shows that, and no path of this machine.
# It is text as it was typed, for a Path would drop what tells the folder ./org/name from an id on the hub.
DefaultsToShipped = Annotated[str | Path, tyro.conf.arg(help_behavior_hint="(default: the shipped model)")]


def parse(config: type[Config], name: str, options: list[str], description: str | None = None) -> Config:
    """The dataclass that the options of ``jsparse name`` fill in; ``description`` heads its --help.

    Raises SystemExit with code 2, after one line on stderr, for options that do not parse.
    """
    # What a constructor raises, and examples in Python, do not help on the command line.
    description = re.split(r"\n\s*(?:Raises |>>>)", description or config.__doc__ or "")[0]
    drawn = io.StringIO()
    if {"-h", "--help"}.intersection(options):
        _join_lines_of_help(config)
    try:
        with contextlib.redirect_stderr(drawn):  # tyro draws boxes around errors, as wide as the terminal
            parsed, left = tyro.cli(
                config,
                prog=f"jsparse {name}",
                description=description,
                args=options,
                return_unknown_args=True,
            )
    except SystemExit as end:
        if end.code != 2:
            raise
        wrong = _wrong_names(config, name, options)
        raise _refused(wrong or rejected(config, options, drawn.getvalue(), end.__context__)) from None
    print(drawn.getvalue(), end="", file=sys.stderr)
    if left:
        raise _refused(_wrong_names(config, name, options) or left_over(config, options, left[0]))
    return parsed


def _wrong_names(config: type, name: str, options: list[str]) -> str | None:
    wrong = unknown_or_missing(config, options)
    return None if wrong is None else f"{wrong} (jsparse {name} --help lists the options)"


def _refused(wrong: str) -> SystemExit:
    print(f"jsparse: error: {' '.join(for_terminal(wrong).split())}", file=sys.stderr)
    return SystemExit(2)


def _join_lines_of_help(config: type) -> None:
    """Put what is said of each field where tyro looks first: in what it reads itself it keeps line breaks."""
    import docstring_parser

    for origin in config.__mro__[:-1]:
        said = {each.arg_name: each.description for each in docstring_parser.parse_from_object(origin).params}
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(field.type):
                _join_lines_of_help(typing.cast(type, field.type))
            elif "help" not in field.metadata and said.get(field.name):
                text = " ".join(str(said[field.name]).split()).replace("``", "")
                field.metadata = types.MappingProxyType({**field.metadata, "help": text})


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout, with its cells aligned to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print facts by their names on stderr: aligned in a terminal, and elsewhere as "name: fact"."""
    console = Console(stderr=True)
    if not console.is_terminal:
        for name, fact in facts.items():
            print(f"{name}: {fact}", file=sys.stderr)
        return
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name, style="bold"), Text(fact))
    console.print(table)


def check_can_write(path: Path | None, option: str) -> None:
    """Raise FileNotFoundError if the file could not be written after everything is computed."""
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option}: the folder of {path} does not exist")


def write_json(path: Path, content: Any) -> None:
    """Write to a file, or to stdout if ``path`` is "-"."""
    text = as_json(content)
    if str(path) == "-":
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")


def write_json_whole(path: Path, content: Any) -> None:
    """Write a file whole or not at all, in a folder that is created if necessary.

    For results that are written again and again while a benchmark runs: if it is interrupted, the last ones
    remain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(as_json(content), encoding="utf-8")
    os.replace(beside, path)


def as_json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def for_terminal(text: str) -> str:
    """Text without the characters that a terminal would obey: a model may write anything.

    >>> for_terminal("red: \\x1b[31m")
    'red: �[31m'
    """
    return text.translate(_CONTROLS)


def print_part(text: str) -> None:
    """Print at once what has come of a model's text; in a terminal, only what is safe there."""
    print(for_terminal(text) if sys.stdout.isatty() else text, end="", flush=True)


def rate_of(arrivals: Sequence[float]) -> str:
    """Tokens per second from the times at which they came, "" for fewer than three.

    It counts from the second token on: the first call for a token compiles.

    >>> rate_of([3.0, 5.0, 5.5, 6.0])
    ', 2.0 tokens/s after the second'
    """
    later = arrivals[1:]
    if len(later) < 2:
        return ""
    return f", {(len(later) - 1) / (later[-1] - later[0]):.1f} tokens/s after the second"


def short_count(count: int) -> str:
    """A number of tokens, in short: 1024 is 1k.

    >>> short_count(131072), short_count(1000)
    ('128k', '1000')
    """
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
