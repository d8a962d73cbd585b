"""The inputs of the CPU benchmark, in NumPy and by seed: each worker makes the same ones for itself."""

import functools

import numpy as np

from cpu.rows import BLOCK, Sizes


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def sequences(length: int, of: Sizes) -> list[np.ndarray]:
    """q, k, v and the gradient of the output, each [1, T, H, D]."""
    return [normal(seed, 1, length, of.heads, of.dim) for seed in range(4)]


def token_of(of: Sizes) -> np.ndarray:
    """The one query, [1, Hq, D]."""
    return normal(4, 1, of.q_heads, of.cache_dim)


def cache(length: int, of: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one sequence, [Hk, S, D]."""
    return _keys_and_values(of.kv_heads, length, of.cache_dim)


@functools.lru_cache(maxsize=1)  # gigabytes, which several contenders read and nobody changes
def _keys_and_values(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(5, *shape), normal(6, *shape)


def page_lists(length: int, of: Sizes) -> np.ndarray:
    """int32 [lists, Hk, pages]: ascending lists that share no page, as many as there are, but at most eight.

    >>> from cpu.rows import SMALL
    >>> lists = page_lists(1024, SMALL)
    >>> lists.shape, [len(np.unique(lists[:, head])) for head in range(2)]
    ((8, 2, 8), [64, 64])
    """
    total = length // of.page
    count = min(total // of.pages, 8)
    random = np.random.default_rng(7)
    order = np.stack([random.permutation(total)[: count * of.pages] for _ in range(of.kv_heads)])
    lists = order.reshape(of.kv_heads, count, of.pages).swapaxes(0, 1)
    return np.sort(lists, axis=-1).astype(np.int32)


def top_blocks(length: int, of: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """(kv_index [1, nq, M], kv_count [1, nq]): for each block of queries its own block, and random earlier
    ones, M at most.
    """
    random, blocks = np.random.default_rng(8), length // BLOCK
    index = np.zeros((1, blocks, of.listed), np.int32)
    count = np.minimum(np.arange(1, blocks + 1), of.listed).astype(np.int32)[None]
    for i in range(blocks):
        earlier = random.permutation(i)[: of.listed - 1]
        index[0, i, : count[0, i]] = np.sort([*earlier, i])
    return index, count


def tokens(length: int, of: Sizes) -> np.ndarray:
    """A random prompt, int32 [T]."""
    return np.random.default_rng(9).integers(0, of.vocabulary, length).astype(np.int32)


def visible_blocks(length: int, sink: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays, bool [blocks, blocks]: the blocks of keys in which a block of queries sees something, and
    those that it sees whole. Without a window: causal.

    This is what ``create_block_mask`` finds by looking at all T x T elements.

    >>> some, whole = visible_blocks(512, 64, 256)
    >>> int(some.sum()), whole.astype(int).tolist()
    (10, [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    """
    start = np.arange(0, length, BLOCK)
    first_q, first_k = start[:, None], start[None]
    last_q, last_k = first_q + BLOCK - 1, first_k + BLOCK - 1
    reach = length if window is None else window
    some = (first_k <= last_q) & ((first_k < sink) | (last_k > first_q - reach))
    every = last_q - reach  # keys after it are in the windows of all queries
    whole = (last_k <= first_q) & ((last_k < sink) | (first_k > every) | (sink > every))
    return some, whole
