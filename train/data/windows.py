"""From tokens to windows: samples packed into rows of ``context`` tokens on disk, and mapped from there."""

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt, UInt8
from rich.progress import Progress
from tokenizers import Tokenizer

from jsparse.models.loss import PADDING
from jsparse.reports.progress import progress_bar
from jsparse.texts.chat_template import ChatTemplate
from jsparse.texts.documents import Sample, Sources, read_samples, refuse_bad_rows
from jsparse.texts.files.data_files import Found, find_data
from jsparse.texts.findings import LIMIT, Findings
from jsparse.texts.reading import Reading

HEADER, TOKENS, FLAGS = "windows.json", "tokens.bin", "flags.bin"
_FORMAT = 1
# The bits of a token's flags: first of a sample; a target; padding; a target in the answer to a prompt.
_STARTS, _SCORED, _FILLS, _ANSWERS = 1, 2, 4, 8
_TOKENS_A_WRITE = 1 << 20


class TrainBatch(NamedTuple):
    """Rows of training data.

    - tokens: [B, T], int32.
    - segment_ids: [B, T], int32. Tokens of one document, or of one prompt and its completion, share an id
      (1, 2, ... within a window). Padding has 0.
    - scored: [B, T]. Whether token t is a target, predicted from token t - 1 of its own segment. The first
      token of a segment, a prompt's tokens and padding never are.
    """

    tokens: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    scored: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Packed training data, mapped from a folder: ``windows[rows]`` reads those rows from disk.

    There are ``len(windows)`` windows of ``windows.context`` tokens each.

    - tokens: [N, T], unsigned.
    - flags: [N, T], uint8: whether a token is the first of a document or prompt (bit 0), scored (bit 1),
      padding (bit 2), or scored and part of the answer to a prompt (bit 3).
    """

    tokens: UInt[np.ndarray, "N T"]
    flags: UInt8[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    def __getitem__(self, rows: slice | list[int] | Integer[np.ndarray, " B"]) -> TrainBatch:
        """Windows by their numbers, in the order asked for, as arrays in memory."""
        flags = np.array(self.flags[rows])
        starts = flags & _STARTS != 0
        starts[:, :1] = True  # what continues from the previous window is a segment of its own
        fills = flags & _FILLS != 0
        segment_ids = np.where(fills, np.int32(PADDING), starts.cumsum(axis=1, dtype=np.int32))
        return TrainBatch(np.array(self.tokens[rows], np.int32), segment_ids, _targets(flags))

    def answers(self, rows: slice | list[int] | Integer[np.ndarray, " B"]) -> Bool[np.ndarray, "B T"]:
        """Which scored tokens of windows answer a prompt; the others are of documents."""
        return np.array(self.flags[rows]) & _ANSWERS != 0

    def with_targets(self) -> Integer[np.ndarray, " M"]:
        """The numbers of the windows that have a target. One that holds a single token of a text has none.

        Reads all flags, a stretch of windows at a time.

        >>> windows = Windows(np.zeros((2, 3), np.uint16), flags=np.array([[1, 2, 2], [2, 4, 4]], np.uint8))
        >>> windows.with_targets()
        array([0])
        """
        found = [_targets(self.flags[rows]).any(axis=1) for rows in self._stretches()]
        return np.flatnonzero(np.concatenate(found))

    def samples(self) -> Iterator[UInt[np.ndarray, " _"]]:
        """The tokens of every document, and of every prompt with its completion, whole and in order.

        >>> flags = np.array([[1, 2, 1], [2, 2, 4], [1, 2, 4]], np.uint8)
        >>> windows = Windows(np.arange(9, dtype=np.uint8).reshape(3, 3), flags)
        >>> [sample.tolist() for sample in windows.samples()]
        [[0, 1], [2, 3, 4], [6, 7]]
        """
        parts = []  # of the sample that has not ended yet
        for rows in self._stretches():
            kept = self.flags[rows] & _FILLS == 0
            tokens, flags = self.tokens[rows][kept], self.flags[rows][kept]
            rest, *samples = np.split(tokens, np.flatnonzero(flags & _STARTS))
            parts.append(rest)
            for sample in samples:
                if sum(map(len, parts)):
                    yield np.concatenate(parts)
                parts = [sample]
        yield np.concatenate(parts)

    def _stretches(self) -> Iterator[slice]:
        """Windows in order, as many as are read at a time."""
        at_a_time = max(1, _TOKENS_A_WRITE // self.context)
        return (slice(first, first + at_a_time) for first in range(0, len(self), at_a_time))


def write_windows(
    files: Sources,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    context: int,
    eos_token_id: int | None,
    vocab_size: int,
    chat_template: ChatTemplate | None = None,
    reading: Reading | None = None,
    progress: bool = False,
    may_be_short: bool = False,
) -> Windows:
    """Tokenise files, pack them into windows of ``context`` tokens, and store the windows in ``folder``.

    Samples lie one after another, in the order of the files. A document that is longer than the rest of a
    window continues in the next one, as a segment of its own. A prompt and its answer are not cut: if they do
    not fit in the rest of a window, the rest is padded and they begin the next one. The last window is
    padded. Nothing is dropped, unless ``reading`` asks for it, and then it is counted.

    Neither the text nor the tokens need to fit in memory: tokens are written as they come, 3 bytes each (5 if
    the vocabulary has more than 65,536 entries). windows.json is written last, so what a crash leaves does
    not open. Earlier windows in the folder are replaced. After an error nothing is left.

    - files: what to read; ``read_samples`` says which kinds there are. Each file is read whole.
    - folder: where the windows go.
    - context: tokens per window, at least 2.
    - eos_token_id, vocab_size, chat_template, reading: as for ``read_samples``.
    - progress: show a progress bar over the bytes of the files, if stderr is a terminal.
    - may_be_short: pad data that does not fill one window, instead of refusing it.

    Returns the windows, mapped from ``folder``. ``read_findings`` says what was found in the files.

    Raises FileNotFoundError or ValueError as ``read_samples`` does, naming file and line. Raises ValueError
    for prompts with answers that are longer than ``context``, and for data that does not fill one window;
    FileExistsError if ``folder`` is a file; and OSError, naming the folder, if it cannot be written, for
    instance because the disk is full.

    >>> import tempfile
    >>> from jsparse.models import byte_tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = [Path(folder, name) for name in ("a.txt", "b.txt")]
    ...     _ = [file.write_text(text) for file, text in zip(files, ["abc", "d"])]
    ...     windows = write_windows(
    ...         files, byte_tokenizer(), Path(folder, "windows"), context=5, eos_token_id=256, vocab_size=257
    ...     )
    ...     batch = windows[:]
    >>> batch.tokens
    array([[ 97,  98,  99, 256, 100],
           [256,   0,   0,   0,   0]], dtype=int32)
    >>> batch.segment_ids
    array([[1, 1, 1, 1, 2],
           [1, 0, 0, 0, 0]], dtype=int32)
    >>> batch.scored[0]
    array([False,  True,  True,  True, False])
    """
    folder = Path(folder)
    if context < 2:
        raise ValueError(f"context={context} must be at least 2: a token, and one to predict from it")
    token_type = _token_type(vocab_size)
    reading, findings = Reading() if reading is None else reading, Findings()
    data = files if isinstance(files, Found) else find_data(files)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; it must be a folder, or not exist")

    samples = read_samples(
        data,
        tokenizer,
        eos_token_id=eos_token_id,
        vocab_size=vocab_size,
        chat_template=chat_template,
        reading=reading,
        findings=findings,
    )
    with _undone_on_failure(folder), progress_bar(progress) as bar:
        watched = _watch(samples, bar, total=sum(file.size for file in data.files))
        fitting = _fit(watched, context, reading.too_long, findings)
        written, padding = _store(_gather(_lay_out(fitting, context)), folder, token_type)
        _refuse(findings, reading, context)
        kept = written - padding
        if kept < context and not may_be_short:
            raise ValueError(
                f"data: {len(data.files)} file(s) with {kept} tokens in all do not fill one window of "
                f"context={context} tokens; give more text or a shorter context"
            )
        _store_header(
            folder,
            windows=written // context,
            context=context,
            token_type=token_type.name,
            findings=findings.to_json(),
        )
    return open_windows(folder)


def open_windows(folder: str | Path) -> Windows:
    """Map the windows that ``write_windows`` stored in ``folder``.

    Raises FileNotFoundError if there are none or if writing them was interrupted, and ValueError if the files
    do not belong together.
    """
    folder = Path(folder)
    if not (folder / HEADER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no training windows: {HEADER}, which is written last, is not there"
        )
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        shape = int(header["windows"]), int(header["context"])
        token_type = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[header["token_type"]]
        is_known = header["format"] == _FORMAT and min(shape) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / HEADER} is not a description of training windows: {error!r}") from error
    if not is_known:
        raise ValueError(f"{folder / HEADER} describes windows that this version cannot read: {header}")
    return Windows(_map(folder / TOKENS, token_type, shape), _map(folder / FLAGS, np.dtype(np.uint8), shape))


def read_findings(folder: str | Path) -> Findings:
    """What ``write_windows`` found in the files that it made the windows in ``folder`` of."""
    return Findings.from_json(json.loads((Path(folder) / HEADER).read_text(encoding="utf-8"))["findings"])


class _Piece(NamedTuple):
    """Tokens that lie one after another in the windows, and their flags."""

    tokens: Integer[np.ndarray, " T"]
    flags: UInt8[np.ndarray, " T"]


def _lay_out(samples: Iterable[Sample], context: int) -> Iterator[_Piece]:
    """The windows, end to end, in pieces: their lengths add up to a multiple of ``context``."""
    used = 0  # of the window that is being filled
    for sample in samples:
        length = len(sample.tokens)
        if sample.scored is not None and length > context - used:
            yield _padding(context - used)
            used = 0
        flags = np.full(length, _SCORED, np.uint8)
        if sample.scored is not None:
            flags = np.where(sample.scored, np.uint8(_SCORED | _ANSWERS), np.uint8(0))
        flags[0] |= _STARTS
        if sample.second is not None:
            flags[sample.second] |= _STARTS
        yield _Piece(sample.tokens, flags)
        used = (used + length) % context
    if used:
        yield _padding(context - used)


def _targets(flags: UInt8[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Scored tokens with a token of their own segment before them."""
    targets = (flags & _SCORED != 0) & (flags & _STARTS == 0)
    targets[:, :1] = False
    return targets


def _fit(samples: Iterable[Sample], context: int, too_long: str, findings: Findings) -> Iterator[Sample]:
    """The samples that fit a window. Others are cut or left out, as ``too_long`` says, and noted."""
    for sample in samples:
        length = len(sample.tokens)
        if sample.scored is None or length <= context:
            yield sample
            continue
        cut = sample._replace(tokens=sample.tokens[:context], scored=sample.scored[:context])
        findings.tokens -= length
        findings.targets -= sample.targets
        if too_long == "truncate" and cut.targets and sample.second is None:
            findings.tokens += context
            findings.targets += cut.targets
            findings.truncated += 1
            yield cut
            continue
        findings.samples -= 1
        findings.long.add(sample.place, _told_length(sample))
        if too_long == "error" and findings.long.count == LIMIT:
            return


def _told_length(sample: Sample) -> str:
    length, prompt = len(sample.tokens), sample.prompt_tokens or 0
    if sample.second is not None:
        return f" has {length} tokens, the question with each of its answers"
    return (
        f" has {length} tokens, {prompt} of the prompt and {length - prompt} of the completion with its end"
    )


def _refuse(findings: Findings, reading: Reading, context: int) -> None:
    """Raise ValueError for rows that may not be there, before anything is trained on the others."""
    if reading.bad_rows == "error":
        refuse_bad_rows(findings)
    if findings.long and reading.too_long == "error":
        raise ValueError(
            f"data: {findings.long}: more than context={context}, and never cut; shorten them, choose a "
            "longer context, or give --too-long skip or truncate"
        )
    if not findings.samples:
        raise ValueError(f"data: no sample is left with {context=}; {findings.bad or findings.long}")
    mixed = None if reading.mixed else findings.mixed_file()
    if mixed is not None:
        raise ValueError(f"data: {mixed}")


def _padding(length: int) -> _Piece:
    return _Piece(np.zeros(length, np.int32), np.full(length, _FILLS, np.uint8))


def _gather(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """The same tokens in fewer pieces: one piece per document would write once per short document."""
    held, length = [], 0
    for piece in pieces:
        held.append(piece)
        length += len(piece.tokens)
        if length >= _TOKENS_A_WRITE:
            yield _Piece(*map(np.concatenate, zip(*held, strict=True)))
            held, length = [], 0
    if held:
        yield _Piece(*map(np.concatenate, zip(*held, strict=True)))


def _watch(samples: Iterable[Sample], bar: Progress, *, total: int) -> Iterator[Sample]:
    """The same samples; the bar counts the bytes that they took in their files."""
    task = bar.add_task("tokenising (bytes)", total=total, note="")
    began, tokens = time.perf_counter(), 0
    for sample in samples:
        yield sample
        tokens += len(sample.tokens)
        note = f"{tokens / (time.perf_counter() - began):,.0f} tokens/s"
        bar.update(task, advance=sample.size, note=note)


def _store(pieces: Iterable[_Piece], folder: Path, token_type: np.dtype) -> tuple[int, int]:
    """Write pieces to files and sync them. Returns how many tokens there are, and how many are padding."""
    written, padding = 0, 0
    with contextlib.ExitStack() as stack:
        with _explained(folder):
            # Unbuffered: a buffer that cannot be written would fail again, without explanation, on close.
            tokens_file = stack.enter_context(open(folder / TOKENS, "xb", buffering=0))
            flags_file = stack.enter_context(open(folder / FLAGS, "xb", buffering=0))
        for piece in pieces:  # errors in reading are not the folder's
            with _explained(folder):
                _write_all(tokens_file, piece.tokens.astype(token_type).tobytes())
                _write_all(flags_file, piece.flags.tobytes())
            written += len(piece.flags)
            padding += int(np.count_nonzero(piece.flags & _FILLS))
        with _explained(folder):
            os.fsync(tokens_file.fileno())
            os.fsync(flags_file.fileno())
    return written, padding


def _store_header(folder: Path, **fields) -> None:
    """The header, whole or not at all."""
    partial = folder / f"{HEADER}.partial"
    with _explained(folder):
        with open(partial, "xb", buffering=0) as file:
            _write_all(file, (json.dumps({"format": _FORMAT} | fields, indent=1) + "\n").encode())
            os.fsync(file.fileno())
        partial.replace(folder / HEADER)


def _write_all(file: io.FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:  # an unbuffered write may take only a part
        left = left[file.write(left) :]


@contextlib.contextmanager
def _undone_on_failure(folder: Path) -> Iterator[None]:
    """Make ``folder``, without windows in it. On any error, remove all that was made and written."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder)
    try:
        yield
    except BaseException:
        _remove(folder)
        for path in made:
            with contextlib.suppress(OSError):  # it holds something else by now
                path.rmdir()
        raise


def _remove(folder: Path) -> None:
    """Remove the header first, so that what is left at any moment does not open.

    Removed, not written over: a process that still maps the old files keeps them.
    """
    for name in (HEADER, f"{HEADER}.partial", TOKENS, FLAGS):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the training windows cannot be written to {folder}: {error.strerror}; "
            "make room there (3 to 5 bytes per token), or choose another folder",
        ) from error


def _token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type for every token id, in the byte order of the files."""
    if not 1 <= vocab_size <= 2**31:
        raise ValueError(f"{vocab_size=} must be from 1 to 2**31, for a batch's token ids are int32")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _map(file: Path, element: np.dtype, shape: tuple[int, int]) -> np.memmap:
    expected = shape[0] * shape[1] * element.itemsize
    size = file.stat().st_size
    if size != expected:
        raise ValueError(
            f"{file} has {size} bytes, but its {HEADER} speaks of {shape[0]} windows of {shape[1]} tokens, "
            f"{expected} bytes; one of the two was changed"
        )
    return np.memmap(file, element, mode="r", shape=shape)
