"""Lists for the prefill of long prompts, estimated from the queries and keys themselves.

A prompt is computed whole or in chunks. The keys of a chunk are laid out in two parts: first room for
``cached`` tokens that were computed before, of which sequence ``b`` has ``held[b]``, then the chunk's own. So
query ``t`` stands at position ``held[b] + t`` of its sequence, and its key in slot ``cached + t``. Of the
chunk's tokens the first ``counts[b]`` are the sequence's. The lists of a prompt computed in chunks are those
of the whole prompt, up to the rounding of scores.

Slots without a token may hold anything, NaN included: no list of a query depends on them. No list has a block
of the room that is not held. A block of queries in which no token is left lists itself alone. (Attention
multiplies what it hides inside a listed block by 0, so the values in the chunk's own slots must be finite.)

The estimates count blocks by position, as if no room were left over; the finished lists count them by slot.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jsparse.block_mask import BlockMask
from jsparse.masks import causal
from jsparse.select import page_scores

AnyArray = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class PooledBlocks:
    """The blocks of keys that score best against the mean query of each block of queries.

    For block ``i`` of the queries of a head, with ``mean(q)`` the mean of the block's queries, the score of
    KV block ``j < i`` is, over the keys of block ``j`` and in float32::

        pool="mean":    mean(q) · mean(k)
        pool="bounds":  sum over channels d of max(mean(q)[d] * k_min[d], mean(q)[d] * k_max[d])

    Listed are the ``budget / block`` best blocks, of equals the earlier. Block ``i`` itself and block 0, the
    attention sink, are always among them.

    - budget: tokens that a block of queries reads, a multiple of ``block``, at least two blocks.
    - block: tokens of a block, of queries and of keys.

    Sources: "mean" is the block-sparse pattern of MInference (arXiv 2407.02490, §3.2); "bounds" scores blocks
    as Quest and LServe score pages (``jsparse.page_scores``). Raises ValueError for fields that do not fit.

    >>> k = jnp.array([1.0, 0.0, 9.0, 2.0]).reshape(1, 4, 1, 1)  # one token a block
    >>> mask = PooledBlocks(budget=3, block=1).block_mask(jnp.ones((1, 4, 1, 1)), k)
    >>> mask.kv_index.reshape(4, 3).tolist()  # by score, 9 before 0, but blocks 0 and 3 in any case
    [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 2, 3]]
    """

    budget: int
    pool: Literal["mean", "bounds"] = "mean"
    block: int = 128

    def __post_init__(self):
        _require_multiple("block", self.block)
        _require_multiple("budget", self.budget, self.block, least=2 * self.block)
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
        """Lists for ``jsparse.attention(q, k, v, lists)``, one a sequence, query head and block of queries.

        q [B, T, Hq, D] and k [B, S, Hk, D], after RoPE, S = cached + T. ``cached``, ``held`` (``cached``, if
        None) and ``counts`` (T, if None) are what the head of this file says. ``cached`` is static, the other
        two may be traced; ``cached`` and ``held`` are multiples of ``block``, and T may be any length.

        A list ascends, and all of its blocks but the last, the query's own, are wholly visible. No gradient
        flows through the choice.

        Raises ValueError for shapes and lengths that do not fit; traced ``held`` and ``counts`` are the
        caller's to answer for.
        """
        chunk = _chunk(q, k, cached, held, counts, self.block, unit=self.block)
        q, k = lax.stop_gradient((jnp.asarray(q), jnp.asarray(k)))
        batch, _, q_heads, dim = q.shape
        kv_heads = k.shape[2]

        # A sum in place of the mean: the scores of one block of queries rank the same.
        valid = jnp.arange(chunk.q_len) < chunk.counts[:, None]
        queries = _split(jnp.where(valid[..., None, None], q, 0), self.block).sum(axis=2, dtype=jnp.float32)
        queries = jnp.swapaxes(queries, 1, 2).reshape(batch, kv_heads, -1, dim)
        # Only a query's own block may be full in part, and its score is not looked at.
        keys = _split(k, self.block)
        if self.pool == "bounds":
            bounds = keys.min(axis=2), keys.max(axis=2)
        else:
            bounds = (keys.mean(axis=2, dtype=jnp.float32),) * 2  # bounds that meet in the mean
        bounds = (_by_position(x, chunk, self.block) for x in bounds)
        low, high = (jnp.swapaxes(x, 1, 2)[:, :, None] for x in bounds)
        scores = page_scores(queries, low, high).reshape(batch, q_heads, -1, chunk.num_kv_blocks)

        j, own = jnp.arange(chunk.num_kv_blocks), chunk.own_block[:, None, :, None]
        scores = jnp.where(j == own, jnp.inf, jnp.where(j < own, scores, -jnp.inf))
        return _listed(_top(scores, self.budget // self.block), chunk)


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals of the score matrix to which the last queries of each segment attend most.

    The queries are cut into segments. With ``p[t, s]`` the softmax weights, in float32, of the last
    ``last_queries`` queries ``t`` of a segment over all keys ``s`` up to their own, for each query head::

        column[s] = sum over t of p[t, s]         score of KV block j       = max of column over block j
        slash[n]  = sum over t of p[t, t - n]     score of block-diagonal d = max of slash over block d

    where block ``b`` is ``b * block .. b * block + block - 1``. The ``vertical / block`` best KV blocks (of
    equals, the earlier) and the ``slash / block`` best block-diagonals (of equals, the nearer) make the lists
    of all query blocks of the segment. For query block ``i``, block-diagonal ``d`` is KV blocks ``i - d`` and
    ``i - d - 1``, in which all keys at those distances lie. A list is the union of all these blocks up to
    ``i``. KV block 0, the attention sink, and block-diagonal 0 are always among the best.

    - vertical, slash: tokens, multiples of ``block``, at least one block. A list has at most
      ``(vertical + 2 * slash) / block`` blocks.
    - last_queries: at most ``segment``. The last segment of a prompt, if it has fewer tokens, takes them all.
    - block: tokens of a block, of queries and of keys. segment: tokens, a multiple of ``block``.

    Scores are divided by ``sqrt(D)``. Time is that of ``last_queries / segment`` of all scores, and an array
    [B, last_queries, S] of them is held at a time.

    Source: the vertical-slash pattern of MInference (arXiv 2407.02490, §3.2), which estimates once, from the
    last queries of the whole prompt, and chooses columns and diagonals of single tokens. Raises ValueError
    for fields that do not fit.

    >>> k = jnp.array([0.0, 9.0, 0.0, 0.0, 0.0]).reshape(1, 5, 1, 1)  # one token a block; key 1 draws all
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
        _require_multiple("block", self.block)
        for name in ("vertical", "slash", "segment"):
            _require_multiple(name, getattr(self, name), self.block, least=self.block)
        _require_multiple("last_queries", self.last_queries)
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
        """Lists for ``jsparse.attention(q, k, v, lists)``, one a sequence, query head and block of queries.

        Arguments, result and errors are those of ``PooledBlocks.block_mask``, but ``held`` is a multiple of
        ``segment``.
        """
        chunk = _chunk(q, k, cached, held, counts, self.block, unit=self.segment)
        q, k = lax.stop_gradient((jnp.asarray(q), jnp.asarray(k)))
        group = q.shape[2] // k.shape[2]
        segments = -(-chunk.q_len // self.segment)

        # One head at a time: the weights of all do not fit into a CPU's cache, and may not fit into memory.
        def of_head(head):
            queries = lax.dynamic_index_in_dim(q, head, axis=2, keepdims=False)
            keys = lax.dynamic_index_in_dim(k, head // group, axis=2, keepdims=False)
            keys = _by_position(keys, chunk, 1)
            return lax.map(lambda segment: of_segment(queries, keys, segment), jnp.arange(segments))

        def of_segment(queries, keys, segment):
            start = segment * self.segment
            end = jnp.minimum(start + self.segment, chunk.counts)
            t = end[:, None] - self.last_queries + jnp.arange(self.last_queries)
            rows = jnp.take_along_axis(queries, jnp.clip(t, 0, chunk.q_len - 1)[..., None], axis=1)
            weights = _weights(rows, keys, jnp.where(t >= start, chunk.held[:, None] + t, -1))
            vertical = _best_of_blocks(weights.sum(axis=1), self.block)
            slash = _best_of_blocks(_diagonal_sums(weights, chunk.held + end - 1), self.block)
            return _top(vertical, self.vertical // self.block), _top(slash, self.slash // self.block)

        best = lax.map(of_head, jnp.arange(q.shape[2]))
        segment_of_block = np.arange(chunk.num_q_blocks) * self.block // self.segment
        # [Hq, segments, B, n] to [B, Hq, nq, n]
        vertical, slash = (jnp.moveaxis(x[:, segment_of_block], 2, 0) for x in best)
        diagonal = chunk.own_block[:, None, :, None] - slash
        return _listed(jnp.concatenate([vertical, diagonal, diagonal - 1], axis=-1), chunk)


def all_blocks(
    batch: int,
    q_len: int,
    *,
    block: int = 128,
    cached: int = 0,
    held: Int[AnyArray, " B"] | None = None,
    counts: Int[AnyArray, " B"] | None = None,
) -> BlockMask:
    """Lists of every block up to a query's own, one a sequence and block of queries: dense causal attention.

    For a chunk of ``q_len`` tokens; arguments and errors as of ``PooledBlocks.block_mask``.

    >>> mask = all_blocks(2, 2, block=1, cached=2, held=np.array([0, 1]))
    >>> mask.kv_index.reshape(2, 2, 4).tolist()
    [[[2, -1, -1, -1], [2, 3, -1, -1]], [[0, 2, -1, -1], [0, 2, 3, -1]]]
    """
    _require_multiple("batch", batch)
    _require_multiple("q_len", q_len)
    _require_multiple("block", block)
    chunk = _layout(batch, q_len, cached, held, counts, block, unit=block)
    return _listed(jnp.arange(chunk.num_kv_blocks), chunk)


class _Chunk(NamedTuple):
    """Where queries and keys stand."""

    q_len: int
    cached: int
    block: int
    held: Any  # int32 [B]
    counts: Any  # int32 [B]
    gap: bool  # held may be less than cached

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block)

    @property
    def num_kv_blocks(self) -> int:
        return self.cached // self.block + self.num_q_blocks

    @property
    def own_block(self):
        """[B, nq]: the number, by position, of each block of queries."""
        return self.held[:, None] // self.block + jnp.arange(self.num_q_blocks)


def _listed(blocks, chunk: _Chunk) -> BlockMask:
    """The lists of the blocks given, [B, R, nq, M] by position, or of a shape that broadcasts to it.

    In any order. Those before block 0 or after a query's own do not count, nor does a block's second mention.
    A query's own block must be among them.
    """
    none = np.iinfo(np.int32).max
    own = chunk.own_block[:, None, :, None]
    begun = jnp.arange(chunk.num_q_blocks) * chunk.block < chunk.counts[:, None]
    blocks = jnp.where(begun[:, None, :, None], blocks, own)  # the least work for queries that are not there
    blocks = jnp.sort(jnp.where((blocks >= 0) & (blocks <= own), blocks, none), axis=-1)
    again = blocks[..., 1:] == blocks[..., :-1]
    blocks = jnp.sort(blocks.at[..., 1:].set(jnp.where(again, none, blocks[..., 1:])), axis=-1)
    blocks = blocks[..., : chunk.num_kv_blocks]

    listed = blocks < none
    count = jnp.sum(listed, axis=-1, dtype=jnp.int32)
    held = chunk.held[:, None, None, None] // chunk.block
    slots = jnp.where(blocks < held, blocks, blocks + chunk.cached // chunk.block - held)
    return BlockMask.from_indices(
        jnp.where(listed, slots, -1),
        count,
        q_len=chunk.q_len,
        kv_len=chunk.cached + chunk.q_len,
        block_q=chunk.block,
        block_kv=chunk.block,
        token_mask=causal(),
        kv_full_count=count - 1,
    )


def _top(scores, n: int):
    """The n blocks (or all) of the highest scores [..., blocks], of equals the earlier; always block 0."""
    return lax.top_k(scores.at[..., 0].set(jnp.inf), min(n, scores.shape[-1]))[1]


def _best_of_blocks(scores, block: int):
    """The highest score of each block: [B, S] to [B, blocks]. Scores are not negative."""
    return _split(scores, block).max(axis=2)


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
    # Not -inf: a row of nothing else would be NaN.
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    return jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)


def _diagonal_sums(weights, last):
    """Sums over the diagonals of weights [B, R, S]: [B, S] by distance from query to key.

    The queries stand one after another, the last at position ``last`` [B].
    """
    batch, rows, kv_len = weights.shape

    # Row after row into sums that stay in the cache: a skewed copy of all takes longer. Key s of row r is
    # added at s + rows - 1 - r, which is ``last`` less the distance.
    def add_row(row, sums):
        terms = lax.dynamic_index_in_dim(weights, row, axis=1, keepdims=False)
        terms = terms + lax.dynamic_slice_in_dim(sums, rows - 1 - row, kv_len, axis=1)
        return lax.dynamic_update_slice_in_dim(sums, terms, rows - 1 - row, axis=1)

    sums = lax.fori_loop(0, rows, add_row, jnp.zeros((batch, kv_len + rows - 1), weights.dtype))
    # Backwards from ``last``, and 0 for the distances that are no key's.
    sums = jnp.pad(sums[:, ::-1], [(0, 0), (0, kv_len)])
    cut = jax.vmap(lambda x, first: lax.dynamic_slice_in_dim(x, first, kv_len))
    return cut(sums, kv_len + rows - 2 - last)


def _split(x, block: int):
    """[B, T, ...] to [B, blocks, block, ...], the last block filled up with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _by_position(x, chunk: _Chunk, unit: int):
    """Slots [B, S, ...], each of ``unit`` tokens, at their positions; after the chunk's, anything."""
    if not chunk.gap:
        return x
    cached, held = chunk.cached // unit, chunk.held // unit
    return jax.vmap(lambda x, n: lax.dynamic_update_slice_in_dim(x, x[cached:], n, axis=0))(x, held)


def _chunk(q, k, cached, held, counts, block, unit) -> _Chunk:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating, [batch, tokens, heads, head_dim] with no empty axis, "
                f"not {x.dtype} {list(x.shape)}"
            )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head_dim, "
            "and the query heads must be a multiple of the KV heads"
        )
    chunk = _layout(q.shape[0], q.shape[1], cached, held, counts, block, unit)
    if k.shape[1] != cached + q.shape[1]:
        raise ValueError(f"k must have cached + T = {cached} + {q.shape[1]} keys, not {k.shape[1]}")
    return chunk


def _layout(batch, q_len, cached, held, counts, block, unit) -> _Chunk:
    _require_multiple("cached", cached, block, least=0)
    gap = cached > 0 and held is not None
    if held is None:
        _require_multiple("held", cached, unit, least=0)
        held = np.full(batch, cached)
    counts = np.full(batch, q_len) if counts is None else counts
    for name, x, most, of in (("held", held, cached, unit), ("counts", counts, q_len, 1)):
        if tuple(x.shape) != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers [{batch}], not {x.dtype} {list(x.shape)}")
        if isinstance(x, Tracer):
            continue  # the caller answers for it
        values = np.asarray(x)
        wrong = values[(values < 0) | (values > most) | (values % of != 0)]
        if wrong.size:
            multiples = f" and be a multiple of {of}" if of > 1 else ""
            raise ValueError(f"{name} must lie in 0..{most}{multiples}, not {wrong[0]}")
    held, counts = (jnp.asarray(x, jnp.int32) for x in (held, counts))
    return _Chunk(q_len, cached, block, held, counts, gap)


def _require_multiple(name: str, value: object, of: int = 1, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least or value % of:
        kind = "an integer" if of == 1 else f"a multiple of {of}"
        raise ValueError(f"{name} must be {kind}, at least {least}, not {value!r}")
