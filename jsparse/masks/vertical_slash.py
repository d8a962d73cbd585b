"""Prompts that read the columns and diagonals to which their last queries attend most (MInference)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from jsparse.arrays import AnyArray
from jsparse.integers import cdiv
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.estimate import (
    best_blocks,
    by_position,
    chunk_of,
    lists_of_blocks,
    require_multiple,
    split_in_blocks,
)


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals of the score matrix to which the last queries of each segment attend most.

    The queries are cut into segments. For each query head, let ``p[t, s]`` be the softmax weights, in
    float32, of the last ``last_queries`` queries ``t`` of a segment over all keys ``s`` up to their own::

        column[s] = sum over t of p[t, s]         score of KV block j       = max of column over block j
        slash[n]  = sum over t of p[t, t - n]     score of block-diagonal d = max of slash over block d

    where block ``b`` is ``b * block .. b * block + block - 1``. The ``vertical / block`` best KV blocks (the
    earlier of equals) and the ``slash / block`` best block-diagonals (the nearer of equals) make the lists of
    all query blocks of the segment. For query block ``i``, block-diagonal ``d`` is KV blocks ``i - d`` and
    ``i - d - 1``, which hold all keys at those distances. A list is the union of all these blocks up to
    ``i``. KV block 0, the attention sink, and block-diagonal 0 are always among the best.

    Scores are divided by ``sqrt(D)``. A fraction ``last_queries / segment`` of all scores is computed, and an
    array [B, last_queries, S] of them is held at a time.

    - vertical, slash: tokens, multiples of ``block``, at least one block. A list has at most
      ``(vertical + 2 * slash) / block`` blocks.
    - last_queries: at most ``segment``. If the last segment of a prompt has fewer tokens, all are used.
    - block: tokens per block, of queries and of keys.
    - segment: tokens per segment, a multiple of ``block``.

    Raises ValueError for fields that do not fit.

    Source: the vertical-slash pattern of MInference (arXiv 2407.02490, §3.2), which estimates once, from the
    last queries of the whole prompt, and chooses columns and diagonals of single tokens.

    >>> k = jnp.array([0.0, 9.0, 0.0, 0.0, 0.0]).reshape(1, 5, 1, 1)  # one token per block; key 1 draws all
    >>> estimate = VerticalSlash(vertical=2, slash=1, last_queries=1, block=1, segment=5)
    >>> mask = estimate.block_mask(jnp.ones((1, 5, 1, 1)), k)
    >>> mask.kv_index.reshape(5, 4).tolist()
    [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3], [0, 1, 3, 4]]
    """

    vertical: int
    slash: int
    last_queries: int = 64
    block: int = 128
    segment: int = 512

    def __post_init__(self):
        require_multiple("block", self.block)
        for name in ("vertical", "slash", "segment"):
            require_multiple(name, getattr(self, name), self.block, least=self.block)
        require_multiple("last_queries", self.last_queries)
        if self.last_queries > self.segment:
            raise ValueError(f"last_queries must be at most segment={self.segment}, not {self.last_queries}")

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

        Arguments, result and errors are those of ``PooledBlocks.block_mask``, except that ``held`` must be
        multiples of ``segment``.
        """
        chunk = chunk_of(q, k, cached, held, counts, self.block, unit=self.segment)
        q, k = lax.stop_gradient((jnp.asarray(q), jnp.asarray(k)))
        group = q.shape[2] // k.shape[2]
        segments = cdiv(chunk.q_len, self.segment)

        # One head at a time: the weights of all do not fit into a CPU's cache, and may not fit into memory.
        def of_head(head):
            queries = lax.dynamic_index_in_dim(q, head, axis=2, keepdims=False)
            keys = lax.dynamic_index_in_dim(k, head // group, axis=2, keepdims=False)
            keys = by_position(keys, chunk, 1)
            return lax.map(lambda segment: of_segment(queries, keys, segment), jnp.arange(segments))

        def of_segment(queries, keys, segment):
            start = segment * self.segment
            end = jnp.minimum(start + self.segment, chunk.counts)
            t = end[:, None] - self.last_queries + jnp.arange(self.last_queries)
            rows = jnp.take_along_axis(queries, jnp.clip(t, 0, chunk.q_len - 1)[..., None], axis=1)
            weights = _weights(rows, keys, jnp.where(t >= start, chunk.held[:, None] + t, -1))
            vertical = _best_of_blocks(weights.sum(axis=1), self.block)
            slash = _best_of_blocks(_diagonal_sums(weights, chunk.held + end - 1), self.block)
            return best_blocks(vertical, self.vertical // self.block), best_blocks(
                slash, self.slash // self.block
            )

        best = lax.map(of_head, jnp.arange(q.shape[2]))
        segment_of_block = np.arange(chunk.num_q_blocks) * self.block // self.segment
        # [Hq, segments, B, n] to [B, Hq, nq, n]
        vertical, slash = (jnp.moveaxis(x[:, segment_of_block], 2, 0) for x in best)
        diagonal = chunk.own_block[:, None, :, None] - slash
        return lists_of_blocks(jnp.concatenate([vertical, diagonal, diagonal - 1], axis=-1), chunk)


def _best_of_blocks(scores, block: int):
    """The highest score of each block: [B, S] to [B, blocks]. Scores are not negative."""
    return split_in_blocks(scores, block).max(axis=2)


def _weights(queries, keys, position):
    """Softmax weights [B, R, S] of queries [B, R, D] at position [B, R] over keys [B, S, D] up to their own.

    A query at position -1 has no weights.
    """
    scores = jnp.einsum(
        "brd,bsd->brs",
        queries,
        keys,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(queries.dtype, jnp.float32),
    )
    scores = scores * queries.shape[-1] ** -0.5
    visible = jnp.arange(keys.shape[1]) <= position[..., None]
    # Not -inf: a row with nothing else would become NaN.
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    return jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)


def _diagonal_sums(weights, last):
    """Sums over the diagonals of weights [B, R, S]: [B, S] by distance from query to key.

    The queries stand one after another, the last at position ``last`` [B].
    """
    batch, rows, kv_len = weights.shape

    # Adding row after row to sums that stay in the cache is faster than a skewed copy of everything. Key s of
    # row r is added at s + rows - 1 - r, which is ``last`` minus the distance.
    def add_row(row, sums):
        terms = lax.dynamic_index_in_dim(weights, row, axis=1, keepdims=False)
        terms = terms + lax.dynamic_slice_in_dim(sums, rows - 1 - row, kv_len, axis=1)
        return lax.dynamic_update_slice_in_dim(sums, terms, rows - 1 - row, axis=1)

    sums = lax.fori_loop(0, rows, add_row, jnp.zeros((batch, kv_len + rows - 1), weights.dtype))
    # Backwards from ``last``, and 0 for distances at which there is no key.
    sums = jnp.pad(sums[:, ::-1], [(0, 0), (0, kv_len)])
    cut = jax.vmap(lambda x, first: lax.dynamic_slice_in_dim(x, first, kv_len))
    return cut(sums, kv_len + rows - 2 - last)
