"""The order of the windows in training, and a digest of what they depend on.

Files become samples (``jsparse.texts.documents``), samples become windows on disk (``windows.py``), and
windows become batches.
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jsparse.texts.chat_template import ChatTemplate
from jsparse.texts.documents import Sources
from jsparse.texts.files.data_files import Found, find_data
from jsparse.texts.reading import Reading
from jsparse.texts.tokenizer import whole_text_tokenizer
from jsparse.train.data.windows import TrainBatch, Windows

_PACKING = 2  # increase this when the same files are packed into windows differently


def batch_at(
    windows: Windows,
    step: int,
    *,
    batch_size: int,
    seed: int,
    among: Integer[np.ndarray, " M"] | None = None,
) -> TrainBatch:
    """Batch number ``step``: a pure function, so the step number alone is a run's position in the data.

    Every epoch is a permutation of all windows, drawn from ``(seed, epoch)``. Epochs follow one another
    without a gap, so a batch may hold the end of one and the start of the next.

    - windows: the training data.
    - step: from 0.
    - batch_size: windows per batch.
    - seed: seed of the order.
    - among: the numbers of the windows to take (``Windows.with_targets``), in place of all.

    Returns the ``batch_size`` windows in memory.

    >>> tokens = np.arange(12, dtype=np.uint16).reshape(4, 3)
    >>> windows = Windows(tokens, flags=np.full((4, 3), 2, np.uint8))
    >>> [batch_at(windows, step, batch_size=2, seed=0).tokens[:, 0].tolist() for step in range(3)]
    [[6, 0], [3, 9], [9, 0]]
    """
    rows = np.arange(len(windows)) if among is None else among
    return windows[rows_at(rows, step, batch_size=batch_size, seed=seed)]


def rows_at(
    rows: Integer[np.ndarray, " M"], step: int, *, batch_size: int, seed: int
) -> Integer[np.ndarray, " B"]:
    """Which of ``rows`` the batch number ``step`` has, in their order there."""
    count = len(rows)
    positions = range(step * batch_size, (step + 1) * batch_size)
    return rows[[_permutation(seed, position // count, count)[position % count] for position in positions]]


def position_at(windows_count: int, step: int, batch_size: int) -> dict[str, int]:
    """Where batch number ``step`` begins: the epoch, from 0, and how many of its windows came before.

    >>> position_at(windows_count=10, step=3, batch_size=4)
    {'epoch': 1, 'window': 2}
    """
    epoch, window = divmod(step * batch_size, windows_count)
    return {"epoch": epoch, "window": window}


def digest_data(
    files: Sources,
    tokenizer: Tokenizer,
    *,
    context: int,
    eos_token_id: int | None,
    chat_template: ChatTemplate | None = None,
    reading: Reading | None = None,
) -> str:
    """SHA-256 of all that windows are made of: if digests are equal, ``write_windows`` stores equal windows.

    It covers the bytes of the files, in their order, and what kind they are; the tokenizer and the chat
    template; and how rows are read and samples cut. Names of files do not count, nor do the truncation and
    padding in tokenizer.json, which ``write_windows`` does not apply. Files are read in pieces, and nothing
    is tokenised.

    Raises FileNotFoundError or ValueError for what is missing or no file of data.
    """
    sha = hashlib.sha256(f"packing {_PACKING}, {context=}, {eos_token_id=}\n".encode())
    sha.update(hashlib.sha256(whole_text_tokenizer(tokenizer).to_str().encode()).digest())
    template = None if chat_template is None else chat_template.digest()
    settings = dataclasses.asdict(Reading() if reading is None else reading)
    sha.update(json.dumps([template, tokenizer.encode_special_tokens, settings], sort_keys=True).encode())
    data = files if isinstance(files, Found) else find_data(files)
    for file in data.files:
        sha.update(file.digest())
    return sha.hexdigest()


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch, or straddles two
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
