"""Attention over a KV cache: one token or a chunk a sequence, by online softmax over blocks of cached keys.

How far the loops run follows the longest sequence at hand, not the capacity of the cache. Lengths are traced:
a new length compiles nothing. On a Hopper GPU a kernel attends for single tokens; all else is portable XLA.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse import mosaic_decode
from jsparse.cache import LayerKVCache, PagedKVCache, StreamingKVCache, append_paged, append_streaming
from jsparse.device import hopper
from jsparse.masks import TokenMask, causal, streaming
from jsparse.select import select_pages

_IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_gpu_interpret", "xla")
_BLOCK_TOKENS = 512  # keys a step of the loop over pages: large enough for efficient products, small to hold


def decode_attention(
    q: Float[Array, "B Hq D"],
    cache: PagedKVCache | StreamingKVCache,
    lengths: Int[Array, " B"],
    page_table: Int[Array, "B max_pages"] | None = None,
    *,
    pages: Int[Array, "B Hk n"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Hq D"]:
    """Attention of the newest token of each sequence to the keys in its cache::

        out = softmax(scale * q @ k.T) @ v        scale = 1 / sqrt(D) by default

    over all ``lengths[b]`` tokens of a paged cache, or those in the listed ``pages`` only; over the sink and
    the window of a streaming cache. The newest token's own key is in the cache already. Consecutive query
    heads share a KV head. ``pages`` are indices into the sequence's row of ``page_table``, a list for each KV
    head, -1 for no page, as :func:`jsparse.select.select_pages` makes them; other pages are not touched. A
    sequence of length 0 gives 0.

    ``implementation``: "mosaic_gpu" is the kernel for Hopper GPUs (bfloat16 or float16; head_dim 64, 128 or
    256; pages and rings of 8, 16, 32 or a multiple of 8 from 64 tokens; up to 16 query heads a KV head),
    "mosaic_gpu_interpret" the same on a CPU, for tests (jax >= 0.12; float32 too), "xla" runs everywhere.
    None takes the kernel where it can run, else XLA.

    Raises ``ValueError`` where query heads do not divide by KV heads, or where ``page_table`` and ``pages``
    do not go with the kind of cache, and ``NotImplementedError`` where the implementation asked for cannot
    take them, naming the limit.

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
    _check_heads(q.shape[1], cache.k.shape[1])
    if _takes_kernel(implementation, q, cache):
        interpret = implementation == "mosaic_gpu_interpret"
        return mosaic_decode.decode(q, cache, lengths, page_table, pages, scale, interpret=interpret)
    if isinstance(cache, StreamingKVCache):
        k_position = cache.positions(lengths)[:, None]
        # The ring holds what the mask shows and nothing more.
        return _attend(
            q[:, None],
            lengths[:, None] - 1,
            cache.k.shape[1],
            lambda _: (cache.k, cache.v, k_position),
            num_blocks=1,
            mask=causal(),
            scale=scale,
        )[:, 0]
    assert page_table is not None
    out = paged_attention(q[:, None], cache, page_table, lengths - 1, lengths, pages=pages, scale=scale)
    return out[:, 0]


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
    """Causal attention of a chunk of queries to the keys in the pages, which hold the chunk's own already.

    Query ``t`` of sequence ``b`` stands at position ``offsets[b] + t`` and sees the keys up to its own that
    are before ``lengths[b]``. ``pages`` as in :func:`decode_attention`; None visits every page.
    """
    batch, max_pages = page_table.shape
    kv_heads, page_size = cache.k.shape[1], cache.page_size
    if pages is None:
        pages = jnp.broadcast_to(jnp.arange(max_pages), (batch, kv_heads, max_pages))
    count = pages.shape[2]
    block = min(max(_BLOCK_TOKENS // page_size, 1), count)
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, -count % block)), constant_values=-1)
    head = jnp.arange(kv_heads)[:, None]

    def load(i):
        listed = jax.lax.dynamic_slice_in_dim(pages, i * block, block, axis=2)
        physical = jnp.take_along_axis(page_table[:, None], listed, axis=2, mode="clip")
        position = listed[..., None] * page_size + jnp.arange(page_size)
        # Position -1: no page listed here, or a slot beyond the sequence's end.
        position = jnp.where(
            (listed[..., None] >= 0) & (position < lengths[:, None, None, None]), position, -1
        )
        k, v = (
            pool.at[physical, head].get(mode="clip").reshape(batch, kv_heads, block * page_size, -1)
            for pool in (cache.k, cache.v)
        )
        return k, v, position.reshape(batch, kv_heads, -1)

    longest = jnp.minimum(jnp.max(lengths), count * page_size)
    return _attend(
        q,
        offsets[:, None] + jnp.arange(q.shape[1]),
        kv_heads,
        load,
        num_blocks=(longest + block * page_size - 1) // (block * page_size),
        mask=causal(),
        scale=scale,
    )


def streaming_attention(
    q: Float[Array, "B C Hq D"],
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    cache: StreamingKVCache,
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    scale: float | None = None,
) -> Float[Array, "B C Hq D"]:
    """Attention of a chunk of streaming heads to the sink, the ring and the chunk itself, not yet appended.

    ``lengths`` are the tokens before the chunk, of which ``counts[b]`` are valid. Every query sees exactly
    what ``streaming(sink, window)`` shows it, however the prompt is cut into chunks.
    """
    position = lengths[:, None] + jnp.arange(q.shape[1])
    valid = jnp.arange(q.shape[1]) < counts[:, None]
    k_position = jnp.concatenate([cache.positions(lengths), jnp.where(valid, position, -1)], axis=1)
    k, v = (
        jnp.concatenate([old, new.swapaxes(1, 2).astype(old.dtype)], axis=2)
        for old, new in ((cache.k, k), (cache.v, v))
    )
    total = k.shape[2]
    block = min(total, _BLOCK_TOKENS + _BLOCK_TOKENS // 2)
    padding = -total % block
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (k, v))
    k_position = jnp.pad(k_position, ((0, 0), (0, padding)), constant_values=-1)[:, None]

    def load(i):
        return tuple(jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=2) for x in (k, v, k_position))

    return _attend(
        q,
        position,
        k.shape[1],
        load,
        num_blocks=(total + padding) // block,
        mask=streaming(cache.sink, cache.window),
        scale=scale,
    )


def attend_and_append(
    q: Float[Array, "B C Hq D"],
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    cache: LayerKVCache,
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    budget: int | None = None,
) -> tuple[Float[Array, "B C Hq D"], LayerKVCache]:
    """What a layer does with its cache: appends ``counts[b]`` tokens a sequence, attends with their queries.

    ``lengths`` are the tokens held before. Retrieval heads see every earlier key; when one token comes (``C =
    1``) and ``budget`` is not None, they read at most so many tokens, in the pages that :func:`select_pages`
    chooses. Streaming heads see their sink and window.
    """
    group = q.shape[2] // k.shape[2]
    parts, order = [], []
    if cache.paged is not None:
        heads = [h for h in range(k.shape[2]) if h not in cache.streaming_heads]
        q_part, k_part, v_part = _take_heads(q, heads, group), _take_heads(k, heads), _take_heads(v, heads)
        paged = append_paged(cache.paged, k_part, v_part, page_table, lengths, counts)
        after, pages = lengths + counts, None
        if budget is not None and q.shape[1] == 1:
            # [B, max_pages, Hk, L, D]: the bounds of a sequence's pages, in its own order
            k_min, k_max = (bounds[page_table].swapaxes(1, 2) for bounds in (paged.k_min, paged.k_max))
            pages = select_pages(q_part[:, 0], k_min, k_max, after, budget=budget, page_size=paged.page_size)
        if q.shape[1] == 1:
            parts.append(decode_attention(q_part[:, 0], paged, after, page_table, pages=pages)[:, None])
        else:
            parts.append(paged_attention(q_part, paged, page_table, lengths, after))
        order += heads
        cache = LayerKVCache(paged, cache.streaming, cache.streaming_heads)
    if cache.streaming is not None:
        heads = list(cache.streaming_heads)
        q_part, k_part, v_part = _take_heads(q, heads, group), _take_heads(k, heads), _take_heads(v, heads)
        ring = append_streaming(cache.streaming, k_part, v_part, lengths, counts)
        if q.shape[1] == 1:
            parts.append(decode_attention(q_part[:, 0], ring, lengths + counts)[:, None])
        else:
            parts.append(streaming_attention(q_part, k_part, v_part, cache.streaming, lengths, counts))
        order += heads
        cache = LayerKVCache(cache.paged, ring, cache.streaming_heads)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    return _take_heads(out, [order.index(h) for h in range(len(order))], group), cache


def _takes_kernel(implementation: str | None, q, cache: PagedKVCache | StreamingKVCache) -> bool:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {_IMPLEMENTATIONS}, not {implementation!r}")
    if implementation == "xla" or (implementation is None and not hopper()):
        return False
    reason = mosaic_decode.limit(q, cache, interpret=implementation == "mosaic_gpu_interpret")
    if reason is not None and implementation is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {reason}")
    return reason is None


def _check_heads(q_heads: int, kv_heads: int) -> None:
    if q_heads % kv_heads:
        raise ValueError(
            f"q has {q_heads} heads, which is no multiple of the {kv_heads} KV heads of the cache"
        )


def _take_heads(x, heads: list[int], group: int = 1):
    """KV heads ``heads`` of ``[B, C, H, D]``, or the ``group`` query heads of each."""
    if heads == list(range(x.shape[2] // group)):
        return x
    index = [h * group + i for h in heads for i in range(group)]
    return x[:, :, jnp.array(index)]


def _attend(
    q: Float[Array, "B C Hq D"],
    q_position: Int[Array, "B C"],
    kv_heads: int,
    load: Callable,
    *,
    num_blocks,
    mask: TokenMask,
    scale: float | None,
) -> Float[Array, "B C Hq D"]:
    """Online softmax over blocks ``load(i)``: k, v [B, Hk, S, D], positions [B, Hk or 1, S], -1: none."""
    batch, chunk, q_heads, dim = q.shape
    _check_heads(q_heads, kv_heads)
    group = q_heads // kv_heads
    factor = dim**-0.5 if scale is None else scale
    # The query heads of a KV head are rows of one product: [B, Hk, group * C, D].
    grouped = q.reshape(batch, chunk, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, group * chunk, dim)

    def visit(i, carry):
        out, largest, total = carry
        k, v, k_position = load(i)
        held = k_position >= 0
        # An empty slot may hold anything, and 0 * NaN is NaN.
        v = jnp.where(held[..., None], v, 0)
        visible = held[:, :, None] & mask(q_position[:, None, :, None], k_position[:, :, None])
        scores = jnp.einsum("bhqd,bhsd->bhqs", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, group, chunk, -1) * factor
        scores = jnp.where(visible[:, :, None], scores, -jnp.inf).reshape(batch, kv_heads, group * chunk, -1)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        shift = jnp.where(new_largest == -jnp.inf, 0, new_largest)  # nothing seen yet: exp(-inf - 0) = 0
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(largest - shift)
        product = jnp.einsum(
            "bhqs,bhsd->bhqd", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
        )
        return (
            out * decay[..., None] + product,
            new_largest,
            total * decay + weights.sum(axis=-1),
        )

    rows = (batch, kv_heads, group * chunk)
    start = (
        jnp.zeros((*rows, dim), jnp.float32),
        jnp.full(rows, -jnp.inf),
        jnp.zeros(rows),
    )
    out, _, total = jax.lax.fori_loop(0, num_blocks, visit, start)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    out = out.reshape(batch, kv_heads, group, chunk, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, chunk, q_heads, dim).astype(q.dtype)
