"""What a file of training data is, read from its content and not believed from its name."""

import codecs
import hashlib
import io
import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jsparse.files import pointer_hint
from jsparse.texts.files.compressed import is_compressed, open_bytes
from jsparse.texts.files.json_rows import ListReader, is_cut_off, parse_line
from jsparse.texts.files.tables import read_batches

BOM = b"\xef\xbb\xbf"
ROWS = ("JSON list", "JSON lines", "Parquet", "Arrow")
READ = (
    "what is read is UTF-8 text, a JSON list of objects, JSON lines, these in gzip or zstd, Parquet and Arrow"
)
JSON_NAMES = (".json", ".jsonl", ".ndjson")
COMPRESSED_NAMES = (".gz", ".zst")
TABLE_NAMES = (".parquet", ".arrow", ".feather", ".ipc")

_HEAD = 1 << 20  # what of a file is looked at; more only if its first line or row is longer

_STARTS = {  # of files that are not read, by their first bytes
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive, or a document of an office program",
    b"PK\x05\x06": "an empty zip archive",
    b"{\\rtf": "a document of an office program (RTF)",
    b"\xd0\xcf\x11\xe0": "a document of an office program",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"FEA1": "a Feather file of the first version",
    b"PARE": "an encrypted Parquet file",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x7fELF": "a program",
}
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_OTHER_NAMES = {  # names of files that are not read; text under such a name is not what it says
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin"), "a pickle"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".epub"), "a document"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar"), "an archive"),
    **dict.fromkeys(
        (".h5", ".hdf5", ".npy", ".npz", ".safetensors", ".avro", ".orc"), "a file of arrays or tables"
    ),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".wav", ".mp4"), "a picture or sound"),
}
_SEPARATORS = {".csv": ",", ".tsv": "\\t"}
# Ends of names that are those of files, and not of datasets.
FILE_NAMES = frozenset(
    (*JSON_NAMES, *TABLE_NAMES, *COMPRESSED_NAMES, *_OTHER_NAMES, *_SEPARATORS, ".txt", ".md", ".py")
)
# Keys under which people put all their rows in one object.
_CONTAINERS = ("data", "train", "rows", "examples", "instances", "items", "records", "samples")


class NotData(ValueError):
    """A file is of a kind that is not read; in a folder, it is left out."""


class DataFile(NamedTuple):
    """A file to read.

    - path: where it is; for standard input, a temporary file.
    - name: what users call it: the path as given, "standard input", or org/name/file of a dataset.
    - kind: "text", "JSON list", "JSON lines", "Parquet" or "Arrow".
    - size: its bytes on disk.
    """

    path: Path
    name: str
    kind: str
    size: int

    def digest(self) -> bytes:
        """SHA-256 of the content, and of the kind as which it is read."""
        sha = hashlib.sha256(f"{self.kind}\n".encode())
        with self.path.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
        return sha.digest()


def look_at(path: Path, name: str) -> DataFile:
    """The file at ``path`` with its kind, of which the first mebibyte tells.

    JSON counts by its content, whatever the file's name; text under the name of JSON or of a table is
    refused, and so is CSV, which only its name tells.

    Raises NotData, naming the file and what it is, for a kind that is not read, and for a file without
    content; ValueError for what it says it is and is not: a pointer of git-lfs, text that is not UTF-8, JSON
    without an object, damaged gzip, zstd, Parquet or Arrow; MissingExtra if pyarrow is needed and is not
    installed.

    >>> Path("rows.txt").write_text('{"text": "a"}')
    13
    >>> look_at(Path("rows.txt"), "rows.txt").kind
    'JSON lines'
    """
    with open_bytes(path, name) as (content, raw):
        head = _read_head(content)
        kind = _binary_kind(head, name, inside=content is not raw) or _text_kind(head, content, path, name)
    if kind in ("Parquet", "Arrow") and next(read_batches(path, kind, name), None) is None:
        raise NotData(f"data: {name} has no rows; every data file must hold some text")
    return DataFile(path, name, kind, path.stat().st_size)


def suffix_of(name: str) -> str:
    """The end of a name that says what a file is, without .gz or .zst after it.

    >>> suffix_of("data/a.JSONL.gz")
    '.jsonl'
    """
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED_NAMES else path.suffix


def _read_head(content: io.BufferedIOBase) -> bytes:
    """The first mebibyte, and more while it is blank."""
    head = content.read(_HEAD)
    while not head.removeprefix(BOM).strip() and (more := content.read(_HEAD)):
        head = head[: len(BOM)] + more
    return head


def _binary_kind(head: bytes, name: str, *, inside: bool) -> str | None:
    """Parquet or Arrow, or None for what looks like text."""
    if hint := pointer_hint(head[:200]):
        raise ValueError(f"data: {name} cannot be read: {hint}")
    for start, kind in ((b"PAR1", "Parquet"), (b"ARROW1", "Arrow"), (b"\xff\xff\xff\xff", "Arrow")):
        if head.startswith(start):
            if inside:
                raise ValueError(f"data: {name} is {kind} that is compressed once more; decompress it first")
            return kind
    if inside and is_compressed(head):
        raise ValueError(f"data: {name} is compressed twice; decompress it once")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        width = 32 if head.startswith(b"\xff\xfe\0\0") else 16
        raise NotData(
            f"data: {name} is UTF-{width} text; `iconv -f UTF-{width} -t UTF-8 FILE > NEW` makes it UTF-8"
        )
    for start, what in _STARTS.items():
        if head.startswith(start):
            raise _not_read(name, what)
    if head[257:262] == b"ustar":
        raise _not_read(name, "a tar archive; unpack it")
    if head.startswith(_PICKLES):
        raise _not_read(name, "a pickle, which can run code")
    return None


def _text_kind(head: bytes, content: io.BufferedIOBase, path: Path, name: str) -> str:
    text = head.removeprefix(BOM).lstrip()
    if not text:
        raise NotData(f"data: {name} is empty; every data file must hold some text")
    says_json = suffix_of(name) in JSON_NAMES
    reason = None
    if text.startswith(b"["):
        kind, reason = _as_list(path, name, says_json)
        if kind:
            return kind
    if (text.startswith(b"{") or says_json) and (kind := _as_lines(text, content, name, says_json)):
        return kind
    if says_json:
        # By the line ends of JSON lines: what has those of old Macs is one line.
        reason = reason or parse_line(text.split(b"\n")[0]).problem or "is no row"
        raise ValueError(
            f"data: {name} is named as JSON, but its beginning {reason}; rename it if it is text, and "
            f"mend it if it is not; {READ}"
        )
    _check_text(head, name)
    return "text"


def _as_list(path: Path, name: str, says_json: bool) -> tuple[str | None, str]:
    """ "JSON list" if the first element is an object and the list goes on or ends there; else why not."""
    with open_bytes(path, name) as (content, _):
        elements = iter(ListReader(content))
        try:
            first = next(elements, None)
            if first is not None and not isinstance(first.value, dict):
                return None, "is a JSON list of something else than objects"
            second = next(elements, None)
        except ValueError as error:
            return None, f"is not valid JSON ({error})"
    if first is None and second is None:
        if says_json:
            raise NotData(f"data: {name} is empty, a list without rows; every data file must hold some text")
        return None, "is an empty list"
    return "JSON list", ""


def _as_lines(text: bytes, content: io.BufferedIOBase, name: str, says_json: bool) -> str | None:
    """ "JSON lines" if most lines are objects, or any where the name says so; None for other text."""
    if b"\n" not in text:
        text += content.readline()
    lines = text.split(b"\n")
    more = content.read(1) != b""
    if more and len(lines) > 1:
        lines.pop()  # it may go on
    parsed = [parse_line(line) for line in lines if line.strip()]
    objects = [value for value, _ in parsed if isinstance(value, dict) and value]
    if len(parsed) == 1 and objects and not more:
        _refuse_container(objects[0], name)
    if objects and (says_json or (parsed[0].value and 2 * len(objects) > len(parsed))):
        return "JSON lines"
    _refuse_spread_out(text, more, name, says_json)
    return None


def _refuse_container(fields: dict[str, Any], name: str) -> None:
    lists = [
        key
        for key in _CONTAINERS
        if isinstance(rows := fields.get(key), list) and rows and isinstance(rows[0], dict)
    ]
    if lists:
        raise NotData(
            f'data: {name} is one JSON object, with rows under "{lists[0]}"; '
            f"`jq -c '.{lists[0]}[]' FILE > NEW.jsonl` writes one row per line"
        )


def _refuse_spread_out(text: bytes, more: bool, name: str, says_json: bool) -> None:
    """Objects that are written over several lines are neither lines nor text."""
    if not text.startswith(b"{"):
        return
    try:
        decoded = codecs.getincrementaldecoder("utf-8")().decode(text, final=not more)
        fields, end = json.JSONDecoder().raw_decode(decoded)
    except json.JSONDecodeError as error:
        if not (more and is_cut_off(error)):
            return
        fields, end = {}, len(error.doc)
    except (ValueError, RecursionError):
        return
    rest = decoded[end:].lstrip()
    if "\n" not in decoded[:end] or (rest and not (says_json or rest.startswith("{"))):
        return
    if not rest:
        _refuse_container(fields, name)
    raise NotData(
        f"data: {name} holds JSON objects that spread over several lines; "
        "`jq -c . FILE > NEW.jsonl` writes one per line"
    )


def _check_text(head: bytes, name: str) -> None:
    suffix = suffix_of(name)
    if suffix in _SEPARATORS:
        raise NotData(
            f"data: {name} is a table of text ({suffix[1:]}); "
            "python -c \"import pyarrow.csv as c, pyarrow.parquet as p; p.write_table(c.read_csv('FILE', "
            f"parse_options=c.ParseOptions(delimiter='{_SEPARATORS[suffix]}', newlines_in_values=True)), "
            "'NEW.parquet')\" makes it Parquet"
        )
    if suffix in _OTHER_NAMES or suffix in TABLE_NAMES:
        what, kind = (_OTHER_NAMES[suffix], NotData) if suffix in _OTHER_NAMES else ("a table", ValueError)
        raise kind(
            f"data: {name} is named as {what}, and does not begin as one; if it is text, name it .txt; {READ}"
        )
    try:
        _decode_head(head)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {name} is not UTF-8 text: byte {head[error.start]:#04x} at offset {error.start}; {READ}"
        ) from error
    if b"\0" in head:
        raise _not_read(name, f"binary (byte 0x00 at offset {head.index(0)})")


def _decode_head(head: bytes) -> str:
    """The text of a file's beginning, which may end within a character."""
    return codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD)


def _not_read(name: str, what: str) -> NotData:
    return NotData(f"data: {name} is {what}; {READ}")
