"""The arguments of tool calls: objects, or JSON in a text, which templates write as one or the other."""

import json
from collections.abc import Mapping
from typing import Any


class Arguments(dict):
    """An object and the text that it was read from.

    Most templates write arguments by ``tojson``, or one by one, and need the object. Others write them as a
    text, and get the one that was given. See ``jinja_limits.text_of``.
    """

    __slots__ = ("_text",)  # the underscore keeps it from templates

    def __init__(self, values: Mapping[Any, Any], text: str):
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text


def with_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message in which arguments that are JSON of an object, or an empty text, are :class:`Arguments`.

    >>> call = {"function": {"name": "f", "arguments": '{"x":1}'}}
    >>> message = with_arguments({"role": "assistant", "tool_calls": [call]})
    >>> arguments = message["tool_calls"][0]["function"]["arguments"]
    >>> arguments["x"], str(arguments)
    (1, '{"x":1}')
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_read(call) for call in calls]}


def _read(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _read(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str):
        return call
    values = _object(text)
    return call if values is None else {**call, "arguments": Arguments(values, text)}


def _object(text: str) -> dict[str, Any] | None:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
