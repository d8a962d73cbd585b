"""Files of any kind that is read, to rows: a text as a whole, JSON lines, JSON lists, Parquet and Arrow."""

import io
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jsparse.texts.files.compressed import decompress, open_bytes
from jsparse.texts.files.file_kinds import BOM, DataFile
from jsparse.texts.files.json_rows import ListReader, parse_line
from jsparse.texts.files.tables import read_batches


class Row(NamedTuple):
    """A document, or the fields of a row.

    - content: the text of a text file, or the fields of a row.
    - place: file and line, or file and row, for errors.
    - size: the bytes of the file that it took; those of all rows, bad ones too, sum to the file's size.
    """

    content: dict[str, Any] | str
    place: str
    size: int


class BadRow(NamedTuple):
    """A row that cannot be read: where it stands, and why, as in "data.jsonl, line 3" "is no JSON object"."""

    place: str
    reason: str
    size: int


class _Read(NamedTuple):
    """A row before its size is known: ``end`` is how far into the file reading it came."""

    content: dict[str, Any] | str | None
    place: str
    problem: str | None
    end: int


def read_rows(file: DataFile) -> Iterator[Row | BadRow]:
    """The rows of a file in their order, read as they are needed.

    Lines are counted as an editor counts them, and blank ones are no rows; rows of a list or a table count
    from 1. Of JSON, one row is held at a time (two, to be exact); of Parquet and Arrow, a batch. A text is
    read whole: its byte order mark is left out, and its line ends stay as they are.

    Raises ValueError, naming the file, for what cannot be read on from: a text that is not UTF-8, a list that
    is no JSON from some row on, and damaged Parquet, Arrow, gzip or zstd.

    >>> import pathlib
    >>> from jsparse.texts.files.data_files import find_data
    >>> _ = pathlib.Path("two.jsonl").write_text('{"text": "a"}\\n\\n["b"]')
    >>> list(read_rows(*find_data(["two.jsonl"]).files))
    [Row(content={'text': 'a'}, place='two.jsonl, line 1', size=14), BadRow(place='two.jsonl, line 3', \
reason='is no JSON object', size=6)]
    """
    if file.kind == "text":
        yield Row(text_of(file.path.read_bytes(), f"data: {file.name}"), file.name, file.size)
    elif file.kind == "JSON lines":
        with open_bytes(file.path, file.name) as (content, raw):
            yield from _measured(_lines(content, raw, file.name), file.size)
    elif file.kind == "JSON list":
        with open_bytes(file.path, file.name) as (content, raw):
            yield from _measured(_elements(content, raw, file.name), file.size)
    else:
        yield from _measured(_table_rows(file), file.size)


def text_of(content: bytes, place: str) -> str:
    """The text that a file with this content holds: decompressed, and without a byte order mark.

    Line ends stay as they are. Raises ValueError, which begins with ``place``, for what is not UTF-8 or is
    damaged.

    >>> text_of(b"\\xef\\xbb\\xbfa\\r\\n", "data: a.txt")
    'a\\r\\n'
    """
    content = decompress(content, place).removeprefix(BOM)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error


def _measured(rows: Iterable[_Read], size: int) -> Iterator[Row | BadRow]:
    """Rows with their sizes; the last has what is left, so that they sum to ``size``."""
    before, held = 0, None
    for row in rows:
        if held is not None:
            yield _sized(held, held.end - before)
            before = held.end
        held = row
    if held is not None:
        yield _sized(held, size - before)


def _sized(row: _Read, size: int) -> Row | BadRow:
    if row.problem is not None or row.content is None:
        return BadRow(row.place, row.problem or "is empty", size)
    return Row(row.content, row.place, size)


def _lines(content: io.BufferedIOBase, raw: io.BufferedIOBase, name: str) -> Iterator[_Read]:
    plain, end = content is raw, 0
    for number, line in enumerate(content, start=1):
        end = end + len(line) if plain else raw.tell()
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            value, problem = parse_line(line)
            yield _Read(value, f"{name}, line {number}", problem, end)


def _elements(content: io.BufferedIOBase, raw: io.BufferedIOBase, name: str) -> Iterator[_Read]:
    number = 0
    try:
        for number, (value, problem) in enumerate(ListReader(content), start=1):
            yield _Read(value, f"{name}, row {number}", problem, raw.tell())
    except ValueError as error:
        raise ValueError(
            f"data: {name} is not valid JSON after row {number} ({error}), and nothing after that can be "
            "read; mend it, or write one row per line"
        ) from error


def _table_rows(file: DataFile) -> Iterator[_Read]:
    number = 0
    for batch, start, end in read_batches(file.path, file.kind, file.name):
        for row in range(batch.num_rows):
            number += 1
            place = f"{file.name}, row {number}"
            at = start + (end - start) * (row + 1) // batch.num_rows
            try:
                (content,) = batch.slice(row, 1).to_pylist()
            except (ValueError, OverflowError) as error:  # strings that are not UTF-8, dates beyond Python's
                yield _Read(None, place, f"cannot be read ({' '.join(str(error).split())})", at)
            else:
                fields = {name: _without_nulls(value) for name, value in content.items()}
                yield _Read(fields, place, None, at)


def _without_nulls(value: Any) -> Any:
    """A value without the fields that only others of its column have, which a table gives it as nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
