"""What is wrong with the options of a command, in one line."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jsparse.reports.options_file import in_words

_OPTION = re.compile(r"--[A-Za-z][\w.-]*")
_NAMED = re.compile(rf"(?:^Error parsing |argument ')({_OPTION.pattern})")  # whose value tyro refuses
# How tyro draws: the rule that ends what it has to say, and what is around it.
_RULE, _FRAME = re.compile(r"[│|]?\s*[─-]{5,}|[╰└+]"), re.compile(r"^[│|]\s?|\s*[│|]$")


class Option(NamedTuple):
    """The type of an option's value, and whether the option must be given."""

    hint: Any
    is_required: bool


def options_of(
    config: type, above: str = "", *, may_be_required: bool = True
) -> Iterator[tuple[str, Option]]:
    """The options that fill in a dataclass, by their names as they are written: --batch-size, --mesh.fsdp."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        is_required = may_be_required and not has_default
        name = f"{above}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            inner = typing.cast(type, hints[field.name])
            yield from options_of(inner, f"{name}.", may_be_required=is_required)
            continue
        yield f"--{name}", Option(hints[field.name], is_required)
        if hints[field.name] is bool:
            yield f"--{above}no-{field.name}".replace("_", "-"), Option(bool, False)


def unknown_or_missing(config: type, words: Sequence[str]) -> str | None:
    """What is wrong with the names of the options; None if they are those of ``config``.

    - words: the command line. A word that begins as an option is none's value.
    """
    known = dict(options_of(config))
    for name in _names(words):
        if _normal(name) not in known and name != "--help":
            near = difflib.get_close_matches(_normal(name)[2:], [each[2:] for each in known], 1)
            return f"unknown option {name}" + (f"; the nearest is --{near[0]}" if near else "")
    given = {_normal(name) for name in _names(words)}
    missing = [name for name, option in known.items() if option.is_required and name not in given]
    if missing:
        *others, last = missing
        return f"{', '.join(others)} and {last} are required" if others else f"{last} is required"
    return None


def left_over(config: type, words: Sequence[str], word: str) -> str:
    """What is wrong with a word that is no option and no option's value."""
    known, before = dict(options_of(config)), None
    for given in words:
        if given == word or given.endswith(f"={word}"):
            before = _normal(given.partition("=")[0]) if given != word else before
            break
        if _OPTION.fullmatch(given.partition("=")[0]):
            before = _normal(given.partition("=")[0])
    if before not in known:
        return f"{word!r} belongs to no option"
    return (
        f"{word!r} belongs to no option: {before} takes {'no' if known[before].hint is bool else 'one'} value"
    )


def rejected(config: type, words: Sequence[str], drawn: str, raised: BaseException | None) -> str:
    """What is wrong with a value, or with several together.

    - drawn: what tyro said of it.
    - raised: the error that it had of it, if it had one: that of the constructor of ``config`` says it best.
    """
    said = _said(drawn)
    named = _NAMED.search(said)
    if named is None:
        while raised is not None:
            if isinstance(raised, ValueError):
                return str(raised)
            raised = raised.__context__
        return said
    name, known = named[1], dict(options_of(config))
    if name not in known:
        return said
    values = _values(words, name)
    if not values:
        return f"{name} needs a value"
    return f"{name} must be {in_words(known[name].hint, none='None')}, not {' '.join(values)!r}"


def _said(drawn: str) -> str:
    """The text in a box up to its first rule, in one line."""
    lines = []
    for line in drawn.splitlines()[1:]:
        if _RULE.match(line):
            if lines:
                break
            continue  # without UTF-8 there is no box, but a rule below its title
        lines.append(_FRAME.sub("", line))
    return " ".join(" ".join(lines).split())


def _names(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        name = word.partition("=")[0]
        if _OPTION.fullmatch(name):
            yield name


def _normal(name: str) -> str:
    return name.replace("_", "-")


def _values(words: Sequence[str], name: str) -> list[str]:
    """The words that the last option of this name has."""
    values: list[str] = []
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if _normal(option) == name:
            after = [] if equals else words[number + 1 :]
            stop = next((n for n, each in enumerate(after) if each.startswith("--")), len(after))
            values = [value] if equals else list(after[:stop])
    return values
