"""How many samples two sets of windows share, by digests of their tokens."""

import hashlib

import numpy as np
from jaxtyping import UInt, UInt64

from jsparse.train.data.windows import Windows


def count_shared(held_out: Windows, training: Windows) -> tuple[int, int]:
    """How many samples of ``held_out`` are in ``training`` too, and how many it has.

    A sample is a document, or a prompt with its completion. Two are the same if all their tokens are: a
    document that is only a part of another is not found. Reads both from disk, and holds 8 bytes per sample.

    - held_out, training: windows of one vocabulary, so that their tokens have the same type.

    >>> flags = np.array([[1, 2, 2, 1], [2, 1, 4, 4]], np.uint8)  # three samples, and padding
    >>> some = Windows(np.array([[5, 6, 7, 5], [6, 9, 0, 0]], np.uint16), flags)
    >>> other = Windows(np.array([[5, 6, 8, 5], [6, 7, 0, 0]], np.uint16), flags)
    >>> count_shared(some, other)
    (1, 3)
    """
    wanted = _digests(held_out)
    return int(np.isin(wanted, _digests(training)).sum()), len(wanted)


def _digests(windows: Windows) -> UInt64[np.ndarray, " _"]:
    return np.fromiter(map(_digest, windows.samples()), np.uint64)


def _digest(tokens: UInt[np.ndarray, " _"]) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest())
