"""Text files to windows of tokens: each file a document, documents packed and cut apart by segment ids."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

PADDING = 0  # the segment id of the padded tail; documents count from 1


@dataclasses.dataclass(frozen=True)
class Windows:
    """Packed training data: ``tokens`` and ``segment_ids``, int32 ``[windows, context]``.

    Tokens of one document share a segment id (1, 2, ... within a window); padding has segment id 0. A
    document that is longer than what is left of a window goes on in the next one, as a segment of its own.
    """

    tokens: Int32[np.ndarray, "N T"]
    segment_ids: Int32[np.ndarray, "N T"]

    def digest(self) -> str:
        """SHA-256 of the content: two runs have the same data when it is the same."""
        sha = hashlib.sha256(repr(self.tokens.shape).encode())
        sha.update(self.tokens.tobytes())
        sha.update(self.segment_ids.tobytes())
        return sha.hexdigest()


def check_files(files: Sequence[str | Path]) -> None:
    """Raise for the first of ``files`` that is missing or a directory, without reading any."""
    for file in map(Path, files):
        if file.is_dir():
            raise ValueError(f"data: {file} is a directory; name the text files themselves")
        if not file.is_file():
            raise FileNotFoundError(f"data: {file} does not exist")


def read_documents(
    files: Sequence[str | Path], tokenizer: Tokenizer, *, eos_token_id: int | None, vocab_size: int
) -> list[Int32[np.ndarray, " T"]]:
    """Tokens of each UTF-8 text file: one int32 array a file, with the end-of-sequence token last.

    The tokenizer adds whatever else it adds by itself (Llama's begin-of-sequence token), and reads the text
    as text: a literal ``<|endoftext|>`` in a file does not become the special token, and a truncation length
    saved in tokenizer.json is not applied. Line ends are kept as they are. With ``eos_token_id=None`` nothing
    is appended.

    Raises FileNotFoundError or ValueError, naming the file: missing, a directory, not UTF-8, empty, or with
    ids that the model's vocabulary does not have.
    """
    check_files(files)
    plain = _plain_text_tokenizer(tokenizer)
    documents = []
    for file in map(Path, files):
        ids = plain.encode(_read_text(file)).ids
        if eos_token_id is not None and (not ids or ids[-1] != eos_token_id):
            ids.append(eos_token_id)
        if not ids:
            raise ValueError(f"data: {file} has no tokens for this tokenizer")
        tokens = np.asarray(ids, np.int32)
        if tokens.max() >= vocab_size:
            raise ValueError(
                f"data: {file} has token id {tokens.max()}, but the model's vocabulary has {vocab_size} "
                "entries: the tokenizer is not this model's"
            )
        documents.append(tokens)
    return documents


def pack(documents: Sequence[Int32[np.ndarray, " _"]], context: int) -> Windows:
    """Lay documents one after another and cut the row into windows of ``context`` tokens.

    The last window is filled up with token 0 and segment id 0, which no loss counts. Nothing is dropped.

    >>> windows = pack([np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)], context=4)
    >>> windows.tokens
    array([[5, 6, 7, 8],
           [9, 0, 0, 0]], dtype=int32)
    >>> windows.segment_ids
    array([[1, 1, 1, 2],
           [1, 0, 0, 0]], dtype=int32)
    """
    lengths = [len(document) for document in documents]
    if sum(lengths) < context:
        raise ValueError(
            f"data: {len(lengths)} file(s) with {sum(lengths)} tokens in all do not fill one window of "
            f"context={context} tokens; give more text or a shorter context"
        )
    windows = -(-sum(lengths) // context)
    tokens = np.zeros(windows * context, np.int32)
    tokens[: sum(lengths)] = np.concatenate(documents)
    document_ids = np.full(windows * context, -1, np.int32)
    document_ids[: sum(lengths)] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    document_ids = document_ids.reshape(windows, context)
    segment_ids = np.where(document_ids < 0, PADDING, document_ids - document_ids[:, :1] + 1)
    return Windows(tokens.reshape(windows, context), segment_ids)


def batch_at(
    windows: Windows, step: int, *, batch_size: int, seed: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Tokens and segment ids of batch number ``step`` (from 0): a pure function, so a step number is the
    position.

    Every epoch is a permutation of all windows, drawn from ``(seed, epoch)``; epochs follow one another
    without a gap, so a batch may hold the end of one and the start of the next.
    """
    count = len(windows.tokens)
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = [_permutation(seed, int(p) // count, count)[int(p) % count] for p in positions]
    return windows.tokens[rows], windows.segment_ids[rows]


@functools.lru_cache(maxsize=2)  # a batch touches one epoch, or two where it straddles their border
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _plain_text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that never truncates or pads and takes the names of special tokens for text."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    return plain


def _read_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {file} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}"
        ) from error
    if not text.strip():
        raise ValueError(f"data: {file} is empty; every data file must hold some text")
    return text
