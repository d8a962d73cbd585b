"""JSON objects one after another, from lines and from one long list, of which one is held at a time."""

import codecs
import io
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

_CHUNK = 1 << 20  # bytes read at a time; more only if one object is longer
_SPACE = " \t\r\n"  # JSON's own, not Unicode's
_LONGEST_WORD = 16  # "-Infinity", or an escape: what an end in the middle of it makes look wrong


class Parsed(NamedTuple):
    """A value, and what is wrong with it as a row, None if nothing is."""

    value: Any
    problem: str | None


class _Decoder:
    """Python's JSON, with what it lets pass noted: NaN, infinities, a field that stands there twice."""

    def __init__(self):
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, start: int = 0) -> tuple[Parsed, int]:
        """The value that begins at ``start``, and where it ends. Raises ValueError, or RecursionError."""
        self._problem = None
        value, end = self._decoder.raw_decode(text, start)
        problem = self._problem
        if problem is None and not isinstance(value, dict):
            problem = "is no JSON object"
        return Parsed(value, problem), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            self._problem = "is not valid JSON (a field stands there twice)"
        return fields

    def _constant(self, name: str) -> float:
        self._problem = f"is not valid JSON ({name} is no number there)"
        return math.nan

    def _float(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            self._problem = f"is not valid JSON ({text[:50]} is too large a number)"
        return value


def parse_line(line: bytes) -> Parsed:
    """The value on a line, and what is wrong with it; the value is None if it cannot be read.

    >>> parse_line(b'{"text": "a"}')
    Parsed(value={'text': 'a'}, problem=None)
    >>> parse_line(b'["a"]').problem, parse_line(b'{"text": NaN}').problem
    ('is no JSON object', 'is not valid JSON (NaN is no number there)')
    """
    try:
        text = line.decode("utf-8").strip(_SPACE)
    except UnicodeDecodeError as error:
        return Parsed(None, f"is not UTF-8 text: byte {line[error.start]:#04x} at offset {error.start}")
    try:
        parsed, end = _Decoder().decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        return Parsed(None, f"is not valid JSON ({reason_of(error)})")
    return parsed


def reason_of(error: Exception) -> str:
    """What is wrong with a text that is no JSON, and where."""
    return f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)


def is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether the text in which an error was found might be valid if it went on."""
    return error.msg.startswith("Unterminated") or error.pos > len(error.doc) - _LONGEST_WORD


class ListReader:
    """The elements of a JSON list in UTF-8, read in pieces; ``list`` of it gives them all.

    - stream: where the list begins; a byte order mark before it is left out.

    Iterating raises ValueError, with the character where it is, for what is no JSON list.

    >>> import io
    >>> list(ListReader(io.BytesIO(b'[{"a": 1}, 2]')))
    [Parsed(value={'a': 1}, problem=None), Parsed(value=2, problem='is no JSON object')]
    """

    def __init__(self, stream: io.BufferedIOBase):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0  # what is decoded and not yet done with, and how far it is done with
        self._before = 0  # characters of the file before that
        self._ended = False

    def __iter__(self) -> Iterator[Parsed]:
        self._expect("[", "Expecting a list")
        if self._next_character() == "]":
            self._at += 1
        else:
            while True:
                yield self._element()
                if self._expect(",]", "Expecting ',' delimiter or ']'") == "]":
                    break
        if self._next_character():
            raise self._wrong("Extra data after the list")

    def _element(self) -> Parsed:
        self._next_character()
        decoder = _Decoder()
        while True:
            try:
                parsed, end = decoder.decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not is_cut_off(error):
                    self._at = error.pos
                    raise self._wrong(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._wrong(str(error)) from error
            else:
                # A number may go on where the text ends for now.
                if self._ended or end < len(self._text):
                    self._at = end
                    return parsed
            self._read()

    def _expect(self, characters: str, message: str) -> str:
        found = self._next_character()
        if not found or found not in characters:
            raise self._wrong(message)
        self._at += 1
        return found

    def _next_character(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Whether there was more to read: as much again as is held, so that nothing is parsed often."""
        if self._ended:
            return False
        self._before += self._at
        self._text, self._at = self._text[self._at :], 0
        more = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not more
        try:
            self._text += self._decoder.decode(more, final=self._ended)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]  # type: ignore[index]
            raise ValueError(f"byte {byte:#04x} after character {self._before} is not UTF-8") from error
        return not self._ended

    def _wrong(self, message: str) -> ValueError:
        return ValueError(f"{message} at character {self._before + self._at}")
