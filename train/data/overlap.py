"""How many samples two sets of windows share, by digests of their tokens."""

import hashlib

import numpy as np
from jaxtyping import UInt, UInt64

from jsparse.train.data.windows import Windows


def count_shared(held_out: Windows, training: Windows, *, pairs: bool = False) -> tuple[int, int]:
    """How many samples of ``held_out`` are in ``training`` too, and how many it has.

    A sample is a document, a prompt with its completion, or a pair of answers, each with the question. Two
    are the same if all their tokens are: a document that is only a part of another is not found. Reads both
    from disk, and holds 8 bytes per sample.

    - held_out, training: windows of one vocabulary, so that their tokens have the same type.
    - pairs: whether both hold nothing but pairs.

    >>> flags = np.array([[1, 2, 2, 1], [2, 1, 4, 4]], np.uint8)  # three samples, and padding
    >>> some = Windows(np.array([[5, 6, 7, 5], [6, 9, 0, 0]], np.uint16), flags)
    >>> other = Windows(np.array([[5, 6, 8, 5], [6, 7, 0, 0]], np.uint16), flags)
    >>> count_shared(some, other)
    (1, 3)
    """
    wanted = _digests(held_out, pairs)
    return int(np.isin(wanted, _digests(training, pairs)).sum()), len(wanted)


def _digests(windows: Windows, pairs: bool) -> UInt64[np.ndarray, " _"]:
    samples = windows.samples()
    # In the windows the answers of a pair, each with its question, follow one another as samples do.
    whole = zip(samples, samples, strict=True) if pairs else ((sample,) for sample in samples)
    return np.fromiter((_digest(*parts) for parts in whole), np.uint64)


def _digest(*parts: UInt[np.ndarray, " _"]) -> int:
    lengths = np.array([len(part) for part in parts])  # which tell where the second begins
    content = b"".join(each.tobytes() for each in (lengths, *parts))
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
