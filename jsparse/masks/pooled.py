"""Prompts that read the blocks of keys that score best against the mean query (MInference, Quest)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jsparse.arrays import AnyArray
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.bounds import page_scores
from jsparse.masks.estimate import (
    best_blocks,
    by_position,
    chunk_of,
    lists_of_blocks,
    require_multiple,
    split_in_blocks,
)


@dataclasses.dataclass(frozen=True)
class PooledBlocks:
    """The blocks of keys that score best against the mean query of each block of queries.

    Let ``mean(q)`` be the mean of the queries in query block ``i`` of a head. The score of KV block ``j < i``
    is, over the keys of block ``j`` and in float32::

        pool="mean":    mean(q) · mean(k)
        pool="bounds":  sum over channels d of max(mean(q)[d] * k_min[d], mean(q)[d] * k_max[d])

    The ``budget / block`` best blocks (the earlier of equals) are listed. Block ``i`` itself and block 0, the
    attention sink, are always among them.

    - budget: tokens that a block of queries reads, a multiple of ``block``, at least two blocks.
    - pool: how a block of keys is summed up, "mean" or "bounds".
    - block: tokens per block, of queries and of keys.

    Raises ValueError for fields that do not fit.

    Source: "mean" is the block-sparse pattern of MInference (arXiv 2407.02490, §3.2); "bounds" scores blocks
    as Quest and LServe score pages (:func:`jsparse.page_scores`).

    >>> k = jnp.array([1.0, 0.0, 9.0, 2.0]).reshape(1, 4, 1, 1)  # one token per block
    >>> mask = PooledBlocks(budget=3, block=1).block_mask(jnp.ones((1, 4, 1, 1)), k)
    >>> mask.kv_index.reshape(4, 3).tolist()  # by score, 9 before 0, but blocks 0 and 3 in any case
    [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 2, 3]]
    """

    budget: int
    pool: Literal["mean", "bounds"] = "mean"
    block: int = 128

    def __post_init__(self):
        require_multiple("block", self.block)
        require_multiple("budget", self.budget, self.block, least=2 * self.block)
        if self.pool not in ("mean", "bounds"):
            raise ValueError(f"pool must be 'mean' or 'bounds', not {self.pool!r}")

    def block_mask(
        self,
        q: Float[AnyArray, "B T Hq D"],
        k: Float[AnyArray, "B S Hk D"],
        *,
        cached: int = 0,
        held: Int[AnyArray, " B"] | None = None,
        counts: Int[AnyArray, " B"] | None = None,
    ) -> BlockMask:
        """Lists for ``jsparse.attention(q, k, v, lists)``: one per sequence, query head and block of queries.

        A chunk of a prompt has queries for its own T tokens. Its keys are S = cached + T: first room for
        ``cached`` earlier tokens, then its own.

        - q: [B, T, Hq, D], after RoPE. T may be any length.
        - k: [B, S, Hk, D], after RoPE.
        - cached: room for earlier tokens, a multiple of ``block``; static.
        - held: [B], how many earlier tokens each sequence has, multiples of ``block``; ``cached`` if None.
        - counts: [B], how many of the chunk's tokens each sequence has; T if None.

        Returns ascending lists. All blocks of a list but the last, the query's own, are wholly visible. No
        gradient flows through the choice.

        Raises ValueError for shapes and lengths that do not fit. Traced ``held`` and ``counts`` cannot be
        checked: they are the caller's responsibility.
        """
        chunk = chunk_of(q, k, cached, held, counts, self.block, unit=self.block)
        q, k = lax.stop_gradient((jnp.asarray(q), jnp.asarray(k)))
        batch, _, q_heads, dim = q.shape
        kv_heads = k.shape[2]

        # A sum in place of the mean: the scores of one block of queries rank the same.
        valid = jnp.arange(chunk.q_len) < chunk.counts[:, None]
        queries = split_in_blocks(jnp.where(valid[..., None, None], q, 0), self.block).sum(
            axis=2, dtype=jnp.float32
        )
        queries = jnp.swapaxes(queries, 1, 2).reshape(batch, kv_heads, -1, dim)
        # Only a query's own block may be partly filled, and its score is not used.
        keys = split_in_blocks(k, self.block)
        if self.pool == "bounds":
            bounds = keys.min(axis=2), keys.max(axis=2)
        else:
            bounds = (keys.mean(axis=2, dtype=jnp.float32),) * 2  # bounds that meet in the mean
        bounds = (by_position(x, chunk, self.block) for x in bounds)
        low, high = (jnp.swapaxes(x, 1, 2)[:, :, None] for x in bounds)
        scores = page_scores(queries, low, high).reshape(batch, q_heads, -1, chunk.num_kv_blocks)

        j, own = jnp.arange(chunk.num_kv_blocks), chunk.own_block[:, None, :, None]
        scores = jnp.where(j == own, jnp.inf, jnp.where(j < own, scores, -jnp.inf))
        return lists_of_blocks(best_blocks(scores, self.budget // self.block), chunk)
