"""Parquet and Arrow files (IPC, as a file and as a stream), a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsparse.extras import require_extra

_BATCH_ROWS = 64  # at a time: rows may be books


def read_batches(path: Path, kind: str, name: str) -> Iterator[tuple[Any, int, int]]:
    """The record batches of a file, each of 1 to 64 rows, with the bytes where it begins and ends, about.

    - kind: "Parquet" or "Arrow".
    - name: what errors call the file.

    Raises ValueError for what is damaged, or has two columns of one name; MissingExtra without pyarrow.
    """
    require_extra("pyarrow", "data", f"data: {name} is {kind}, which needs pyarrow")
    import pyarrow

    try:
        for batch, start, end in (_parquet if kind == "Parquet" else _arrow)(path):
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise ValueError(f"data: {name} has two columns of one name: {batch.schema.names}")
            for first in range(0, batch.num_rows, _BATCH_ROWS):
                part = batch.slice(first, _BATCH_ROWS)
                ends = [start + (end - start) * n // batch.num_rows for n in (first, first + part.num_rows)]
                yield part, *ends
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data: {name} begins as {kind}, and is damaged ({reason})") from error


def _parquet(path: Path) -> Iterator[tuple[Any, int, int]]:
    import pyarrow.parquet

    size, done = path.stat().st_size, 0
    with pyarrow.parquet.ParquetFile(path) as table:
        rows = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            ends = [size * n // rows for n in (done, done + batch.num_rows)]
            done += batch.num_rows
            yield batch, *ends


def _arrow(path: Path) -> Iterator[tuple[Any, int, int]]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            size, count = path.stat().st_size, reader.num_record_batches
            for n in range(count):
                yield reader.get_batch(n), size * n // count, size * (n + 1) // count
        else:
            source.seek(0)
            start = 0
            for batch in pyarrow.ipc.open_stream(source):
                yield batch, start, source.tell()
                start = source.tell()
