"""The options of a command in a YAML file: read with the checks of the command line, and written by a run."""

import collections.abc
import dataclasses
import difflib
import itertools
import json
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_OPTION = "--config"
_MAPPINGS = (dict, collections.abc.Mapping)


def with_file(config: type, options: Sequence[str], *, either: Collection[tuple[str, str]] = ()) -> list[str]:
    """The options with those of the file that ``--config`` names before them, so that theirs win.

    - config: the dataclass that the options fill in; its fields are the keys that the file may have.
    - options: as they were given.
    - either: pairs of fields that say the same in two ways; an option replaces the other one in the file.

    Raises FileNotFoundError for a file that does not exist. ValueError, naming the file and the key, for one
    that is not YAML, for unknown keys, and for values of another type than the option's.
    """
    path = _file_named(options)
    if path is None or {"-h", "--help"}.intersection(options):
        return list(options)
    given = {option.partition("=")[0].replace("-", "_") for option in options}
    pairs = [*either, *(pair[::-1] for pair in either)]
    replaced = {other for name, other in pairs if f"__{name}" in given and f"__{other}" not in given}
    return [*_options_of(path, config, read_options(path), without=replaced), *options]


def _file_named(options: Sequence[str]) -> Path | None:
    """The value of the last ``--config``, which is what the parser takes too."""
    found = None
    if options and options[-1] == _OPTION:
        raise ValueError("--config needs a value, the name of a YAML file of options")
    for option, after in itertools.pairwise([*options, ""]):
        if option == _OPTION:
            found = Path(after)
        elif option.startswith(_OPTION + "="):
            found = Path(option.removeprefix(_OPTION + "="))
    return found


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_options(path: Path) -> dict:
    """The keys and values of such a file. Raises as :func:`with_file` does for what has none."""
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} does not exist; it must be a YAML file of options")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # safe: it makes no objects
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must have one option per line, as in 'steps: 100', not {content!r:.40}")
    return content


def _options_of(
    path: Path,
    config: type,
    content: Mapping[Any, Any],
    above: str = "",
    *,
    without: Collection[str] = (),
) -> Iterator[str]:
    """The words that the command line would have for the content of a file, except keys in ``without``."""
    hints = typing.get_type_hints(config)
    allowed = [field.name for field in dataclasses.fields(config) if field.name != "config"]
    seen = set()
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1, 0.0)
            raise ValueError(f"{path}: unknown option {above}{key}; the nearest is {above}{near[0]}")
        hint, full = hints[name], f"{above}{name}"
        if name in seen:
            raise ValueError(f"{path}: {full} is given twice, with a dash and with an underscore")
        seen.add(name)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {full} must have options of its own below it, not {value!r}")
            yield from _options_of(path, typing.cast(type, hint), value, f"{full}.")
            continue
        if not _fits(value, hint):
            raise ValueError(f"{path}: {full} must be {in_words(hint)}, not {value!r}")
        if name in without:
            continue
        option = f"--{full.replace('_', '-')}"
        if hint is bool:
            yield option if value else f"--{above}no-{name}".replace("_", "-")
        elif isinstance(value, list):
            yield from [option, *map(str, value)]
        elif isinstance(value, dict):
            if value:  # the command line has no word for an empty one, which is what it is by default
                yield from [option, *(str(word) for pair in value.items() for word in pair)]
        else:
            yield f"{option}={value}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether the command line would take a value for an option of this type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin in (tuple, collections.abc.Sequence):
        values = value if isinstance(value, list) else [value]
        return all(_fits(each, inner[0]) for each in values)
    if origin in _MAPPINGS:
        is_dict = isinstance(value, dict)
        return is_dict and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint is type(None):
        return value is None or value == "None"
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str if hint is Path else hint)


def _is_number(value: Any) -> bool:
    """A number, or a text like 2e-5, which is no number in YAML because it has no point."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def in_words(hint: Any, *, none: str = "null") -> str:
    """What a value of this type is; ``none`` is how None is written.

    >>> in_words(int | None), in_words(dict[str, float])
    ('an integer or null', 'a mapping from text to a number')
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each, none=none) for each in inner))
    if origin is typing.Literal:
        return "one of " * (len(inner) > 1) + ", ".join(map(repr, inner))
    if origin in (tuple, collections.abc.Sequence):
        return f"a list, each {in_words(inner[0], none=none)}"
    if origin in _MAPPINGS:
        key, value = (in_words(each, none=none) for each in inner)
        return f"a mapping from {key} to {value}"
    names = {type(None): none, bool: "true or false", int: "an integer", float: "a number"}
    return names.get(hint, "text")


def as_yaml(config: Any) -> str:
    """The fields of a dataclass as a file that :func:`with_file` reads.

    >>> from jsparse.models import MeshConfig
    >>> print(as_yaml(MeshConfig(fsdp=2)), end="")
    data: 1
    fsdp: 2
    tensor: 1
    sequence: 1
    """
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # lists, and paths as text
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
