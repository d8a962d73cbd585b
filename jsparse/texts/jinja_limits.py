"""What a chat template may build, and for how long it may run.

A template is code from whoever made a checkpoint. What it builds is counted before it is built: by operators,
filters and methods that take the place of jinja2's, and by `jinja_sandbox`, which calls them. The time is
looked at between such steps and cannot stop one of them. What is counted bounds each: walking through or
sorting as much as the budget allows takes a second or two.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.environment import Environment
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import SandboxedFormatter
from markupsafe import Markup

from jsparse.texts.control_tokens import escape_non_ascii, unescape_marks
from jsparse.texts.tool_arguments import Arguments

# What one rendering may build, in characters; a loop's turn and an element of a list count as NODE.
BUDGET = 64 * 1024 * 1024
BUDGET_PER_CHARACTER = 64  # and this for each character of the messages, which templates copy several times
NODE = 64
SECONDS = 5.0
MAX_BITS = 20_000  # of an integer
MAX_ARGUMENT = 1000  # characters; real templates split at and strip less than 50


class LimitExceeded(Exception):
    """A template does more than one rendering may."""


class Budget:
    """What one rendering may still build, and until when it may run."""

    def __init__(self, input_size: int):
        self.limit = BUDGET + BUDGET_PER_CHARACTER * input_size
        self.left = self.limit
        self.deadline = time.monotonic() + SECONDS

    def step(self) -> None:
        """One turn of a loop, or one call."""
        self.spend(NODE)
        if time.monotonic() > self.deadline:
            raise LimitExceeded(f"rendering takes longer than {SECONDS:g} s")

    def spend(self, characters: int) -> None:
        """Takes this off the budget."""
        self.left -= characters
        if self.left < 0:
            raise LimitExceeded(f"rendering builds more than {self.limit} characters")

    def keep(self, value: Any) -> Any:
        """The value, which a template has just built."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, int):
            require_bits(value.bit_length())
        elif isinstance(value, list | tuple | dict):
            self.spend(NODE * len(value) + size(value, self.limit) // NODE)
        return value


current_budget: ContextVar[Budget] = ContextVar("budget of the rendering in this thread")

_SEQUENCES = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


def size(value: Any, limit: int) -> int:
    """The characters of plain data written out, with NODE for each element.

    A list that holds another one twice counts it twice, as writing it out or comparing it would. Raises
    LimitExceeded, early, for more than ``limit``.
    """
    total, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            total += 2 * NODE * len(item)
            rest += [*item.keys(), *item.values()] if total <= limit else []
        elif isinstance(item, _SEQUENCES):
            total += NODE * len(item)
            rest += item if total <= limit else []
        if total > limit:
            raise LimitExceeded(f"rendering builds more than {limit} characters")
    return total


def require_bits(bits: int) -> None:
    """LimitExceeded for an integer of more than MAX_BITS bits."""
    if bits > MAX_BITS:
        raise LimitExceeded(f"rendering builds an integer of more than {MAX_BITS} bits")


def text_of(value: Any) -> str:
    """``str(value)``, within the budget. The marks of texts in a list or a mapping stay as they are."""
    budget = current_budget.get()
    value = str(value) if isinstance(value, Arguments) else value
    if not isinstance(value, str):
        size(value, budget.left)
        value = unescape_marks(str(value))
    budget.spend(len(value))
    return value


def concatenate(values: Iterable[Any]) -> str:
    """The texts of the values, one after the other."""
    return "".join([text_of(value) for value in values])


# Operators


def add(left: Any, right: Any) -> Any:
    left, right = (str(value) if isinstance(value, Arguments) else value for value in (left, right))
    if isinstance(left, str) and isinstance(right, str):
        current_budget.get().spend(len(left) + len(right))
        return left + right
    return current_budget.get().keep(left + right)


def multiply(left: Any, right: Any) -> Any:
    budget = current_budget.get()
    if isinstance(left, int) and isinstance(right, int):
        require_bits(left.bit_length() + right.bit_length())
        return left * right
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            budget.spend(len(value) * max(times, 0) * (1 if isinstance(value, str) else NODE))
    return budget.keep(left * right)


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        require_bits(left.bit_length() * right)
    return left**right


def modulo(left: Any, right: Any) -> Any:
    """``%``, also of a string. Then its widths count, and each of its places as if it took all values."""
    budget = current_budget.get()
    if isinstance(left, str):
        numbers = [*map(int, re.findall(r"\d+", left))]
        values = right if isinstance(right, tuple) else (right,)
        # With `*`, a width is one of the values.
        numbers += [left.count("*") * abs(value) for value in values if isinstance(value, int)]
        escaped = 5 if isinstance(left, Markup) else 1
        budget.spend(len(left) + sum(numbers) + escaped * left.count("%") * size(right, budget.left))
        if re.search(r"%(\([^)]*\))?[^%a-zA-Z(]*[hlL]?[ra]", left.replace("%%", "")):
            raise ValueError(
                "%r and %a, which write a value as Python does, cannot be used in a chat template"
            )
        if isinstance(right, tuple):
            right = tuple(map(_written, right))
        elif isinstance(right, dict) and "%(" in left:
            right = {key: _written(value) for key, value in right.items()}
        else:
            right = _written(right)
    return budget.keep(left % right)


def _written(value: Any) -> Any:
    """A list or a mapping as text, before a format would write it and escape the marks."""
    return text_of(value) if isinstance(value, (dict, *_SEQUENCES)) else value


# Filters, and the methods of a string that can give far more than they are given


def joined(value: Iterable[Any], d: Any = "") -> str:
    budget = current_budget.get()
    texts, d = [text_of(item) for item in value], text_of(d)
    budget.spend(len(d) * len(texts))
    return d.join(texts)


@jinja2.pass_environment
def join(environment: Environment, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    return joined(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)


def join_strings(separator: str, values: Iterable[Any]) -> str:
    values = list(values)
    if not all(isinstance(value, str) for value in values):
        raise TypeError("str.join takes strings only")
    return joined(values, separator)


def replace(text: str, old: str, new: str, count: int | None = -1) -> str:
    current_budget.get().spend(text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def short_argument(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method or filter that is slow for long arguments: it looks for each at every place of the text."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, str) and len(value) > MAX_ARGUMENT:
                raise LimitExceeded(
                    f"{getattr(method, '__name__', 'a method')} takes at most {MAX_ARGUMENT} characters"
                )
        return method(*args, **kwargs)

    return run


def trim(text: str, chars: str | None = None) -> str:
    return short_argument(text.strip)(chars)


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    each = width if isinstance(width, int) else len(width)
    current_budget.get().spend(len(text) + (len(text.splitlines()) + 1) * max(each, 0))
    return FILTERS["indent"](text, width, first, blank)


def percent_format(text: str, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("the filter `format` takes either positional or keyword arguments")
    return modulo(text, kwargs or args)


@jinja2.pass_environment
def sum_of(environment: Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise TypeError("the filter `sum` adds numbers only")
    return FILTERS["sum"](environment, iterable, attribute, start)


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: letters stay as they are, and nothing is escaped for HTML."""
    budget = current_budget.get()
    between = [*(separators or ()), " " * min(indent, 65) if isinstance(indent, int) else indent or ""]
    if sum(map(len, between)) > 64:
        raise LimitExceeded("the filter `tojson` indents or separates by more than 64 characters")
    size(x, budget.left)
    text = json.dumps(x, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return escape_non_ascii(text) if ensure_ascii else text


class Formatter(SandboxedFormatter):
    """``str.format`` within the budget. The width is looked at when it is known: it can be a value."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion in ("r", "a"):
            raise ValueError(
                "!r and !a, which write a value as Python does, cannot be used in a chat template"
            )
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        budget = current_budget.get()
        budget.spend(sum(map(int, re.findall(r"\d+", format_spec))) + size(value, budget.left))
        return budget.keep(super().format_field(_written(value), format_spec))


def of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of a text, which gets that of any value."""
    return functools.wraps(function)(lambda value, *args, **kwargs: function(text_of(value), *args, **kwargs))


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, counted when it is called and by what it gives."""

    @functools.wraps(function)  # keeps the mark of those that are given the environment
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.step()
        return budget.keep(function(*args, **kwargs))

    return run


# Those of jinja2 that give at most about what they are given, and those of them that want a text.
_FILTERS = (
    "abs count d default dictsort first float groupby int items last length list map max min reject "
    "rejectattr reverse select selectattr sort unique"
)
_TEXT_FILTERS = "capitalize e escape lower safe string title upper"

FILTERS_WITH_LIMITS = (
    {name: counted(FILTERS[name]) for name in _FILTERS.split()}
    | {name: counted(of_text(FILTERS[name])) for name in _TEXT_FILTERS.split()}
    | {
        "join": counted(join),
        "replace": counted(of_text(replace)),
        "indent": counted(of_text(indent)),
        "trim": counted(of_text(trim)),
        "format": counted(of_text(percent_format)),
        "sum": counted(sum_of),
        "tojson": counted(tojson),
    }
)
