"""Attention over a KV cache: one token or a chunk per sequence, by online softmax over blocks of cached keys.

The loop runs as far as the longest sequence at hand, not to the capacity of the cache. Lengths are traced: a
new length compiles nothing. On a Hopper GPU a kernel computes single tokens; everything else is portable XLA.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse.arrays import DeviceArray
from jsparse.cache import hopper
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.ring import StreamingKVCache
from jsparse.device import product_dtype
from jsparse.implementations.interface import always, choose, never, no_limit

# Keys per step of the loop over pages: enough for efficient products, and few enough to hold at once.
_BLOCK_TOKENS = 512
_BLOCK_NUMBERS = 2**19  # in the keys of a large step for single queries: they should fit a core's cache
_NEAR_TOKENS = 4096  # tokens visited in small steps; also the most that a large step visits


class DecodeImplementation(NamedTuple):
    """One way to attend over a cache: a row of the table.

    - name: what users call it.
    - decode: ``decode(q, cache, lengths, page_table, pages, scale)`` computes :func:`decode_attention`, with
      one list of pages per KV head.
    - limit: ``limit(q, cache)`` says why it cannot take a call, or returns None.
    - by_default: ``by_default(q, cache)`` says whether it is tried for calls that name no implementation.
    """

    name: str
    decode: Callable
    limit: Callable[..., str | None] = no_limit
    by_default: Callable[..., bool] = always


def decode_attention(
    q: Float[Array, "B Hq D"],
    cache: PagedKVCache | StreamingKVCache,
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B max_pages"] | None = None,
    *,
    pages: Int[Array, "B H n"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Hq D"]:
    """Attention of the newest token of each sequence to the keys in its cache::

        out = softmax(scale * q @ k.T) @ v        scale = 1 / sqrt(D) by default

    Of a paged cache, all tokens count, or only those in the listed pages; of a streaming cache, the sink and
    the window. The cache already holds the newest token's own key.

    - q: [B, Hq, D], the query of the newest token of each sequence. Consecutive query heads share a KV head.
    - cache: the keys and values. Pages of int8 or int4 codes are read as the values that they stand for.
    - lengths: [B], tokens per sequence, the newest included.
    - page_table: [B, max_pages], the physical page of each page of a sequence; None for a streaming cache.
    - pages: [B, H, n], the pages to read, as indices into the sequence's row of ``page_table``, -1 for no
      page: one list per KV head or per query head, as ``jsparse.cache.select.select_pages`` makes them. Other
      pages are not touched. None reads every page.
    - scale: of the scores; 1 / sqrt(D) if None.
    - implementation: "mosaic_gpu" is the kernel for Hopper GPUs (bfloat16 or float16; head_dim 64, 128 or
      256; pages of 8, 16 or 32 tokens, or of a multiple of 8 from 64 on; streaming caches of as many slots,
      none of them spare; up to 16 query heads per KV head). "xla" runs everywhere. "mosaic_gpu_interpret"
      runs the kernel on a CPU, for tests (jax >= 0.12; float32 too). None takes the kernel if it can run,
      else XLA.

    Returns out [B, Hq, D] in q's dtype; 0 for a sequence of length 0.

    Raises ValueError if the query heads are not a multiple of the KV heads, or if ``page_table`` and
    ``pages`` do not fit the kind of cache. Raises NotImplementedError, which names the limit, if the
    implementation asked for cannot take the call.

    Source: PagedAttention (arXiv 2309.06180, §4.1) for pages; Quest (arXiv 2406.10774) and LServe (arXiv
    2502.14866) for lists of them.

    >>> from jsparse.cache import StreamingKVCache
    >>> cache = StreamingKVCache.zeros(1, 1, 4, sink=1, window=2, dtype=jnp.float32)
    >>> decode_attention(jnp.ones((1, 2, 4)), cache, jnp.array([3])).shape
    (1, 2, 4)
    """
    if isinstance(cache, StreamingKVCache):
        if page_table is not None or pages is not None:
            raise ValueError("a StreamingKVCache has no pages: page_table and pages must be None")
    elif page_table is None:
        raise ValueError("a PagedKVCache needs page_table")
    kv_heads = cache.num_heads if isinstance(cache, PagedKVCache) else cache.k.shape[1]
    if q.shape[1] % kv_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads, which is not a multiple of the {kv_heads} KV heads of the cache"
        )
    if pages is not None and pages.shape[1] not in (kv_heads, q.shape[1]):
        raise ValueError(
            f"pages has lists for {pages.shape[1]} heads; allowed is one for each of the {kv_heads} KV heads "
            f"or one for each of the {q.shape[1]} query heads"
        )
    if pages is not None and pages.shape[1] > kv_heads:
        return _by_query_head(q, cache, lengths, page_table, pages, scale, implementation)
    chosen = choose(IMPLEMENTATIONS, implementation, q, cache)
    return chosen.decode(q, cache, lengths, page_table, pages, scale)


def _portable(q, cache: PagedKVCache | StreamingKVCache, lengths, page_table, pages, scale):
    """``decode_attention`` in XLA, for every device."""
    if isinstance(cache, StreamingKVCache):
        kv_heads = cache.k.shape[1]
        position = cache.positions(lengths)[:, None]  # the sink and the window, nothing else
        ring = (cache.k, cache.v, position)
        out = _attend(q[:, None], lengths[:, None] - 1, kv_heads, [_Steps(lambda _: ring, 0, 1)], scale=scale)
        return out[:, 0]
    out = paged_attention(q[:, None], cache, page_table, lengths - 1, lengths, pages=pages, scale=scale)
    return out[:, 0]


def _by_query_head(q, cache, lengths, page_table, pages, scale, implementation):
    """Treats the query heads of a group as separate sequences, which share pages but not lists."""
    batch, q_heads, dim = q.shape
    kv_heads = cache.num_heads
    group = q_heads // kv_heads

    def apart(x):
        x = x.reshape(batch, kv_heads, group, -1)
        return x.swapaxes(1, 2).reshape(batch * group, kv_heads, -1)

    out = decode_attention(
        apart(q),
        cache,
        jnp.repeat(lengths, group),
        jnp.repeat(page_table, group, axis=0),
        pages=apart(pages),
        scale=scale,
        implementation=implementation,
    )
    return out.reshape(batch, group, kv_heads, dim).swapaxes(1, 2).reshape(q.shape)


def paged_attention(
    q: Float[Array, "B C Hq D"],
    cache: PagedKVCache,
    page_table: Int[Array, "B max_pages"],
    offsets: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    pages: Int[Array, "B Hk n"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B C Hq D"]:
    """Causal attention of a chunk of queries to the keys in the pages, which already hold the chunk's own.

    Query ``t`` of sequence ``b`` stands at position ``offsets[b] + t``. It sees the keys up to its own that
    are before ``lengths[b]``. ``pages`` and ``scale`` are as in :func:`decode_attention`.
    """
    batch, max_pages = page_table.shape
    kv_heads, page_size = cache.num_heads, cache.page_size
    unlisted = pages is None
    if pages is None:
        pages = jnp.broadcast_to(jnp.arange(max_pages), (batch, kv_heads, max_pages))
    count = pages.shape[2]
    heads = jnp.arange(kv_heads)
    longest = jnp.minimum(jnp.max(lengths), count * page_size)

    # Blocks do not depend on what is listed: listing all pages gives the same bits as no list.
    def steps(first: int, last: int, tokens: int) -> _Steps:
        """The pages from ``first`` to ``last`` of the lists, in blocks of ``tokens`` tokens."""
        block = max(tokens // page_size, 1)
        part = jnp.pad(
            pages[:, :, first:last], ((0, 0), (0, 0), (0, -(last - first) % block)), constant_values=-1
        )

        def load(i):
            listed = jax.lax.dynamic_slice_in_dim(part, i * block, block, axis=2)
            physical = jnp.take_along_axis(page_table[:, None], listed, axis=2, mode="clip")
            position = listed[..., None] * page_size + jnp.arange(page_size)
            # Position -1: no page is listed here, or the slot lies beyond the sequence's end.
            position = jnp.where(
                (listed[..., None] >= 0) & (position < lengths[:, None, None, None]), position, -1
            )
            k, v = cache.read(physical, heads, q.dtype)
            shape = (batch, kv_heads, block * page_size)
            return k.reshape(*shape, -1), v.reshape(*shape, -1), position.reshape(shape)

        rest = jnp.clip(longest - first * page_size, 0, (last - first) * page_size)
        size = block * page_size
        # Every query of a prompt sees all blocks before the chunk, so they need no mask.
        full = jnp.min(jnp.minimum(offsets, lengths)) // size if unlisted and q.shape[1] > 1 else 0
        return _Steps(load, full, (rest + size - 1) // size)

    small, large = _block_tokens(q.shape[1], kv_heads * q.shape[3])
    near = count if large == small else min(count, max(_NEAR_TOKENS // page_size, 1))
    return _attend(
        q,
        offsets[:, None] + jnp.arange(q.shape[1]),
        kv_heads,
        [steps(0, near, small), *([steps(near, count, large)] if count > near else [])],
        scale=scale,
    )


def _block_tokens(queries: int, width: int) -> tuple[int, int]:
    """How many keys of ``width`` numbers a step visits, at the beginning of a long list and in its rest.

    For single queries, a step does little more than read its keys. Larger steps cost less, as long as what is
    read stays in the caches of a CPU and the last step is not mostly empty.
    """
    if queries > 1:
        return _BLOCK_TOKENS, _BLOCK_TOKENS
    return _BLOCK_TOKENS, min(max(_BLOCK_NUMBERS // width, _BLOCK_TOKENS), _NEAR_TOKENS)


class _Steps(NamedTuple):
    """Blocks of keys to visit one after the other.

    - load: ``load(i)`` returns k, v [B, Hk, S, D] and positions [B, Hk or 1, S] of block ``i``; position -1
      is a slot without a token.
    - full: how many blocks, from the first on, every query sees whole.
    - count: the number of blocks.
    """

    load: Callable
    full: DeviceArray | int
    count: DeviceArray | int


def _attend(
    q: Float[Array, "B C Hq D"],
    q_position: Int[Array, "B C"],
    kv_heads: int,
    loops: list[_Steps],
    *,
    scale: float | None,
) -> Float[Array, "B C Hq D"]:
    """Online softmax over the blocks of keys that the loops load, one after the other."""
    batch, chunk, q_heads, dim = q.shape
    group = q_heads // kv_heads
    factor = dim**-0.5 if scale is None else scale
    # The query heads of a KV head are rows of one product: [B, Hk, group * C, D].
    grouped = q.reshape(batch, chunk, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    dtype = product_dtype(q.dtype)
    grouped = grouped.reshape(batch, kv_heads, group * chunk, dim).astype(dtype)
    keys_first = chunk == 1 and dtype == jnp.float32  # bfloat16 gains nothing by it

    # Queries are scaled first if nothing is lost by it. Blocks then differ only in whether they are masked.
    if dtype == jnp.float32:
        grouped, factor = grouped * factor, 1

    def visit(load, masked, i, carry):
        out, largest, total = carry
        k, v, k_position = load(i)
        scores = _scores(grouped, k.astype(dtype), keys_first=keys_first) * factor
        if masked:
            # Computed once: XLA would compute the masks again for each number that they hide.
            held = jax.lax.optimization_barrier(k_position >= 0)
            visible = held[:, :, None] & (k_position[:, :, None] <= q_position[:, None, :, None])
            visible = jax.lax.optimization_barrier(visible)
            # An empty slot may hold anything, and 0 * NaN is NaN.
            v = jnp.where(held[..., None], v, 0)
            scores = scores.reshape(batch, kv_heads, group, chunk, -1)
            scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
            scores = scores.reshape(batch, kv_heads, group * chunk, -1)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        weights = jnp.exp(scores - new_largest[..., None])
        decay = jnp.exp(largest - new_largest)
        product = jnp.einsum(
            "bhqs,bhsd->bhqd", weights.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32
        )
        return (
            out * decay[..., None] + product,
            new_largest,
            total * decay + weights.sum(axis=-1),
        )

    rows = (batch, kv_heads, group * chunk)
    start = (
        jnp.zeros((*rows, dim), jnp.float32),
        jnp.full(rows, jnp.finfo(jnp.float32).min),  # not -inf, so exp(-inf - this) = 0
        jnp.zeros(rows),
    )
    for load, full, count in loops:
        if not isinstance(full, int):
            start = jax.lax.fori_loop(0, full, functools.partial(visit, load, False), start)
        start = jax.lax.fori_loop(full, count, functools.partial(visit, load, True), start)
    out, _, total = start
    out = out / jnp.where(total == 0, 1, total)[..., None]
    out = out.reshape(batch, kv_heads, group, chunk, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, chunk, q_heads, dim).astype(q.dtype)


def _scores(q: Float[Array, "B H Q D"], k: Float[Array, "B H S D"], *, keys_first: bool):
    """Products of queries and keys, float32 [B, H, Q, S].

    With ``keys_first``, keys are the rows of the product and the few queries of one token its columns. In
    float32, a CPU takes as little as half the time of the other order.
    """
    if keys_first:
        return jnp.einsum("bhsd,bhqd->bhsq", k, q, preferred_element_type=jnp.float32).swapaxes(2, 3)
    return jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32)


def _hopper(name: str, *, interpret: bool, **options) -> DecodeImplementation:
    decode = functools.partial(hopper.decode, interpret=interpret)
    limit = functools.partial(hopper.limit, interpret=interpret)
    return DecodeImplementation(name, decode, limit, **options)


# In order of preference. A new device is one file and one row.
IMPLEMENTATIONS = (
    _hopper("mosaic_gpu", interpret=False),
    DecodeImplementation("xla", _portable),
    _hopper("mosaic_gpu_interpret", interpret=True, by_default=never),
)
