"""Patterns of other papers as lists of blocks, one short function each.

All are causal: jsparse never shows a later token, so this is the half of a paper's bidirectional pattern at
and below the diagonal. A grid of blocks is drawn first and turned into lists. Such a grid has (tokens /
block)² entries, which is fine for examples; ``BlockMask.from_token_masks`` makes none.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jsparse import BlockMask


def lists_from_grid(grid: Bool[Array | np.ndarray, "*R n n"], block: int) -> BlockMask:
    """Lists of the key blocks that a grid marks for each block of queries, at and below the diagonal.

    - grid: [R, n, n] or [B, R, n, n], True where query block i (the second axis from the right) visits KV
      block j. R rows: one for all heads, one per KV head or one per query head.
    - block: tokens per block. All blocks except a query's own are wholly visible and skip the mask.

    >>> mask = lists_from_grid(np.array([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], bool), block=2)
    >>> mask.kv_index.reshape(3, 3)[2, :2].tolist(), mask.kv_count.tolist(), mask.kv_full_count.tolist()
    ([0, 2], [[1, 1, 2]], [[0, 0, 1]])
    """
    n = grid.shape[-1]
    grid = jnp.asarray(grid) & np.tri(n, dtype=bool)
    return BlockMask.from_indices(
        jnp.argsort(~grid, axis=-1, stable=True),  # the marked blocks first, in ascending order
        grid.sum(axis=-1),
        kv_full_count=(grid & np.tri(n, k=-1, dtype=bool)).sum(axis=-1),
        q_len=n * block,
        kv_len=n * block,
        block_q=block,
        block_kv=block,
    )


def routed_regions(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hk D"], *, region: int, top: int
) -> BlockMask:
    """BiFormer's bi-level routing (arXiv 2303.08810): each region reads the ``top`` regions that fit best.

    The affinity of two regions is the product of their mean query and mean key, summed over heads; all heads
    share the choice. A region's own is always among the chosen, so every query sees something.
    """
    batch, tokens, heads, dim = q.shape
    n = tokens // region
    queries = q.reshape(batch, n, region, heads, dim).mean(axis=2)
    keys = jnp.repeat(k, heads // k.shape[2], axis=2).reshape(batch, n, region, heads, dim).mean(axis=2)
    affinity = jnp.einsum("bihd,bjhd->bij", queries, keys)
    affinity = jnp.where(np.eye(n, dtype=bool), jnp.inf, jnp.where(np.tri(n, dtype=bool), affinity, -jnp.inf))
    _, chosen = jax.lax.top_k(affinity, top)
    return lists_from_grid(jax.nn.one_hot(chosen, n, dtype=bool).any(axis=-2)[:, None], region)


def criss_cross(height: int, width: int, *, block: int = 1) -> BlockMask:
    """CCNet's criss-cross attention (arXiv 1811.11721): a pixel sees its row and its column.

    The pixels of an image come row by row, ``block`` tokens each.
    """
    row, column = np.divmod(np.arange(height * width), width)
    grid = (row[:, None] == row) | (column[:, None] == column)
    return lists_from_grid(grid[None], block)


def arrow(num_blocks: int, *, window: int, block: int) -> BlockMask:
    """SeNER's arrow attention (arXiv 2502.07286): a sliding window, and one global end that sees everything.

    In the paper ``[CLS]`` is seen by all tokens and sees them all. A causal token is seen by all only if it
    comes first, and sees all only if it comes last, so here the first block is one and the last the other.
    ``window`` counts blocks, a query's own included. Without the last block, and by tokens instead of blocks,
    it is ``jsparse.streaming(sink, window)``.
    """
    i, j = np.arange(num_blocks)[:, None], np.arange(num_blocks)
    grid = (i - j < window) | (j == 0) | (i == num_blocks - 1)
    return lists_from_grid(grid[None], block)


def local_and_global(num_anchors: int, num_local: int, *, window: int, block: int) -> BlockMask:
    """Scale-DiT's attention (arXiv 2510.16325): tokens see their own window, and anchors of low resolution.

    The anchors come first, and see each other. Then come the tokens of high resolution, cut into windows that
    do not overlap. All three numbers count blocks.
    """
    part = np.arange(num_anchors + num_local) - num_anchors
    window_of = np.where(part < 0, -1, part // window)  # the anchors are a window of their own
    grid = (window_of[:, None] == window_of) | (window_of == -1)
    return lists_from_grid(grid[None], block)
