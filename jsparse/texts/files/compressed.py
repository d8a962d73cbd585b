"""Bytes of files that may be compressed: gzip and zstd, known by how they begin."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from jsparse.extras import require_extra

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def is_compressed(start: bytes) -> bool:
    """Whether a file that begins with ``start`` is read through gzip or zstd."""
    return start.startswith((GZIP, ZSTD))


@contextlib.contextmanager
def open_bytes(path: Path, name: str) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """The content of a file, decompressed as it is read, and the file itself, which knows how far it is.

    - name: what errors call the file.

    Raises ValueError if the compressed data are damaged or cut off, then or while they are read.
    """
    with path.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        if not is_compressed(start):
            yield raw, raw
            return
        with _damage_named(f"data: {name}"), _decompressed(raw, start) as content:
            yield content, raw


def decompress(content: bytes, place: str) -> bytes:
    """As :func:`open_bytes`, for content that is in memory. Errors begin with ``place``."""
    if not is_compressed(content):
        return content
    with _damage_named(place), _decompressed(io.BytesIO(content), content) as stream:
        return stream.read()


def _decompressed(raw: io.BufferedIOBase, start: bytes) -> io.BufferedIOBase:
    if start.startswith(GZIP):
        return gzip.GzipFile(fileobj=raw, mode="rb")
    require_extra("pyarrow", "data", "a file that is compressed with zstd needs pyarrow")
    import pyarrow

    # Unlike zstandard's reader, it goes on to further frames, and says so if the last is cut off.
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return io.BufferedReader(_Readable(stream))


class _Readable(io.RawIOBase):
    """pyarrow's stream, which has no readinto of its own that io.BufferedReader could use."""

    def __init__(self, stream):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        read = self._stream.read(len(buffer))
        buffer[: len(read)] = read
        return len(read)


@contextlib.contextmanager
def _damage_named(place: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place} is compressed, and damaged or cut off ({reason})") from error
