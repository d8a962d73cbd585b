"""Control tokens that users write are text: they are marked before a template sees them, and encoded as text.

The marks are lone surrogates, characters that no valid text has. So nobody can write a mark, and none is left
in what is encoded.
"""

import functools
import json
import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken

OPEN, CLOSE = "\ud800", "\ud801"  # around a control token in a text
EDGE = "\ud802"  # where a text ends or begins with a part of a control token
CUT = "\ud803"  # where the message that is to be continued ends
GENERATION_START, GENERATION_END = "\ud804", "\ud805"  # around what the assistant writes
TURNS, TURNS_COUNT = "\ud900-\udaff", 512  # a range: around the texts of a message, one mark for each

_MARKS = re.compile(f"[{OPEN}-{GENERATION_END}{TURNS}]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogate(text: str) -> bool:
    """Whether a string has characters that cannot be written in UTF-8, of which the marks are some."""
    return _SURROGATE.search(text) is not None


def remove_marks(text: str) -> str:
    return _MARKS.sub("", text)


def remove_control_marks(text: str) -> str:
    """Without the marks of control tokens, which then are such tokens as if the template had written them."""
    return re.sub(f"[{OPEN}{CLOSE}{EDGE}]", "", text)


def escape_non_ascii(json_text: str) -> str:
    """JSON in ASCII. The marks stay as they are, and so can still be found."""

    def escape(match: re.Match[str]) -> str:
        return match[0] if _MARKS.match(match[0]) else json.dumps(match[0])[1:-1]

    return re.sub(r"[^\x00-\x7f]", escape, json_text)


def unescape_marks(written: str) -> str:
    """A value as Python writes it, in which the marks are characters again."""

    def unescape(match: re.Match[str]) -> str:
        return match[0] if match[1] == "\\" else chr(int(match[1][1:], 16))

    return re.sub(r"\\(\\|ud80[0-5]|ud[9a][0-9a-f]{2})", unescape, written)


def marker(names: Collection[str]) -> Callable[[str], str]:
    """A function that marks in a text whatever could become one of these control tokens.

    A token is put between OPEN and CLOSE, whatever the case of its letters, since a template may change that.
    EDGE is put where a text, without the space around it, ends with the beginning of a token or begins with
    the end of one: a template may write two texts, or its own and a text, one after the other.

    >>> mark = marker(["<|end|>"])
    >>> ascii(mark("a <|END|> b <|e"))
    "'a \\\\ud800<|END|>\\\\ud801 b <|e\\\\ud802'"
    """
    # Not parts that are a word: that would mark, and so change, roles and keys.
    beginnings = {name[:n] for name in names for n in range(1, len(name)) if not name[:n].isalnum()}
    ends = {name[n:] for name in names for n in range(1, len(name)) if not name[n:].isalnum()}
    lengths = sorted({len(name) for name in names}, reverse=True)
    # A tokenizer can have thousands of them, but they begin alike. One alternative for each would be slow.
    starts = "|".join(sorted({re.escape(name[:2]) for name in names})) or "(?!)"
    start = re.compile(f"(?={starts})", re.IGNORECASE)
    heads = tuple({name[:6] for name in names})  # of which few texts have more than a beginning

    def spans(text: str) -> Iterator[tuple[int, int]]:
        done = 0
        for match in start.finditer(text):
            at = match.start()
            if not text[at : at + 6].casefold().startswith(heads):
                continue
            length = next((n for n in lengths if text[at : at + n].casefold() in names), None)
            if length is not None and at >= done:
                done = at + length
                yield at, done

    def mark(text: str) -> str:
        body = text.strip()
        if not body:
            return text
        sizes = range(1, min(max(lengths, default=0), len(body) + 1))
        first = EDGE if any(body[:n].casefold() in ends for n in sizes) else ""
        last = EDGE if any(body[-n:].casefold() in beginnings for n in sizes) else ""
        before, after = text[: text.index(body)], text[text.index(body) + len(body) :]
        done, pieces = 0, []
        for a, b in spans(body):
            pieces += [body[done:a], OPEN, body[a:b], CLOSE]
            done = b
        return "".join([before, first, *pieces, body[done:], last, after])

    return mark


@dataclass(frozen=True)
class Unmarked:
    """A rendered text without its marks, and the places where they were.

    - written: from and to where users wrote a control token.
    - edges: where a text of a user ends or begins with a part of one.
    - generated: from and to where the assistant writes.
    """

    text: str
    written: list[tuple[int, int]]
    edges: list[int]
    generated: list[tuple[int, int]]


def unmark(marked: str, names: Collection[str]) -> Unmarked:
    """Takes the marks out of what a template gave.

    - marked: the text. A template that splits a text at a control token leaves an OPEN or a CLOSE alone,
      which then counts as an EDGE.
    - names: the control tokens, in `str.casefold`.
    """
    result = Unmarked(remove_marks(marked), [], [], [])
    opened: int | None = None  # the place of the mark before, if that is an OPEN
    starts: list[int] = []
    for n, match in enumerate(_MARKS.finditer(marked)):
        mark, at = match[0], match.start() - n
        if opened is not None and mark == CLOSE and result.text[opened:at].casefold() in names:
            result.written.append((opened, at))
            opened = None
            continue
        if opened is not None:
            result.edges.append(opened)
        opened = at if mark == OPEN else None
        if mark in (CLOSE, EDGE):
            result.edges.append(at)
        elif mark == GENERATION_START:
            starts.append(at)
        elif mark == GENERATION_END and starts:
            result.generated.append((starts.pop(), at))
    if opened is not None:
        result.edges.append(opened)
    return result


def assistant_mask(offsets: list[tuple[int, int]], generated: list[tuple[int, int]]) -> list[int]:
    """1 for each token of which a character lies in one of the intervals.

    - offsets: from and to where each token reaches in the text.
    - generated: the intervals, in the order of their beginnings.
    """
    mask, rest = [], sorted(generated, reverse=True)
    for start, end in offsets:
        while rest and start >= rest[-1][1]:
            rest.pop()
        mask.append(int(bool(rest) and end > rest[-1][0]))
    return mask


@dataclass(frozen=True)
class Encoded:
    """The ids of a prompt, its encoding, and from and to where in the encoded text the assistant writes."""

    ids: list[int]
    encoding: tokenizers.Encoding
    generated: list[tuple[int, int]]


class ControlTokens:
    """A tokenizer's control tokens: those that it has added and calls special."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
        self.tokens = {
            id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.names = {name.casefold() for name in self.tokens.values()}
        self.mark = marker(self.names)

    def encode(self, marked: str) -> Encoded:
        """The tokens of a rendered text. Only the control tokens that the template wrote are such tokens.

        - marked: the text, with the marks of what `mark` was given.

        Raises ValueError if the tokenizer makes a control token from plain text.
        """
        rendered = unmark(marked, self.names)
        if has_surrogate(rendered.text):  # the tokenizer would raise a TypeError that does not say so
            raise ValueError("the template writes a lone surrogate, which cannot be written in UTF-8")
        encoding = self.tokenizer.encode(rendered.text, add_special_tokens=False)
        plain = Encoded(encoding.ids, encoding, rendered.generated)
        if not (rendered.written or rendered.edges):
            return plain
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        found = [(id, span) for id, span in spans if id in self.tokens]
        own = [(id, span) for id, span in found if not _by_user(*span, rendered)]
        return plain if len(own) == len(found) else self._encode_otherwise(rendered, own)

    def _encode_otherwise(self, rendered: Unmarked, own: list[tuple[int, tuple[int, int]]]) -> Encoded:
        """Encodes a text by a tokenizer whose control tokens have secret names, put where ``own`` says."""
        tokenizer, ids, names = self._secret
        pieces, ends, shifts, done = [], [], [0], 0
        for id, (start, end) in own:
            pieces += [rendered.text[done:start], names[id]]
            ends.append(end)
            shifts.append(shifts[-1] + len(names[id]) - (end - start))
            done = end
        encoding = tokenizer.encode("".join([*pieces, rendered.text[done:]]), add_special_tokens=False)
        made = [id for id in encoding.ids if id in self.tokens and id not in ids]
        if made:
            raise ValueError(
                f"{self.tokens[made[0]]!r} in a message cannot be encoded as text: the tokenizer makes the "
                "control token from it"
            )

        def moved(at: int) -> int:
            return at + shifts[bisect_right(ends, at)]

        generated = [(moved(start), moved(end)) for start, end in rendered.generated]
        return Encoded([ids.get(id, id) for id in encoding.ids], encoding, generated)

    @functools.cached_property
    def _secret(self) -> tuple[tokenizers.Tokenizer, dict[int, int], dict[int, str]]:
        return _with_secret_names(self.tokenizer)


def _by_user(start: int, end: int, rendered: Unmarked) -> bool:
    """Whether a control token was written by a user, or has a part that was."""
    before = bisect_left(rendered.written, end, key=lambda span: span[0])
    if before and rendered.written[before - 1][1] > start:
        return True
    edge = bisect_right(rendered.edges, start)
    return edge < len(rendered.edges) and rendered.edges[edge] < end


def _with_secret_names(
    tokenizer: tokenizers.Tokenizer,
) -> tuple[tokenizers.Tokenizer, dict[int, int], dict[int, str]]:
    """A copy whose control tokens have names that nobody can guess.

    Returns it, the id in ``tokenizer`` of each of its added tokens, and the new name by id in ``tokenizer``.
    """
    secret = secrets.token_hex(16)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    names = {id: f"\U0010f000{secret}-{id}\U0010f001" for id, token in added if token.special}
    tokens = [
        AddedToken(names[id], normalized=False, special=True) if id in names else token for id, token in added
    ]
    copy.add_tokens(tokens)
    new_ids = [copy.token_to_id(token.content) for token in tokens]
    ids = {new: id for new, (id, _) in zip(new_ids, added, strict=True) if new is not None}
    return copy, ids, names
