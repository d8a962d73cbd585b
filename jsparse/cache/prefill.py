"""Attention of a chunk of a prompt over a KV cache: the chunk beside what the cache holds, as one sequence.

The keys of a chunk follow the cached ones in one array. So :func:`jsparse.attention` does the work, with
lists of blocks, on whatever implementation is best. A prompt in chunks gets what it would get in one piece.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jsparse.attention import attention
from jsparse.cache.decode import paged_attention
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.ring import StreamingKVCache
from jsparse.cache.tokens import Tokens
from jsparse.device import hopper
from jsparse.implementations.merge import merge
from jsparse.integers import cdiv
from jsparse.masks.estimate import Estimate, all_blocks
from jsparse.masks.token_mask import sliding_window

_BLOCK = 128  # tokens per block, unless an estimate says how many


def paged_prefill(
    q: Float[Array, "B C Hq D"],
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    cache: PagedKVCache,
    tokens: Tokens,
    *,
    estimate: Estimate | None = None,
) -> Float[Array, "B C Hq D"]:
    """Causal attention of a chunk to the tokens in the pages before it, and to itself.

    ``tokens.before[b]`` must be a multiple of ``C`` if ``tokens.added[b] > 0``; queries beyond ``added`` get
    anything. ``estimate`` lists the blocks that each head visits; None visits all. Keys and values are read
    as the cache stores them, those of the chunk too, so it makes no difference how a prompt is cut.
    """
    page_table, lengths, counts = tokens
    assert page_table is not None
    if estimate is None and not (hopper() and k.shape[1] % _BLOCK == 0):
        # This copies nothing and takes time for the tokens held, not the capacity. Kernels make up for both.
        return paged_attention(q, cache, page_table, lengths, tokens.after)
    batch, chunk, kv_heads, _ = k.shape
    block = _BLOCK if estimate is None else estimate.block
    most = page_table.shape[1] * cache.page_size
    cached = cdiv(most, block) * block
    pages = jnp.broadcast_to(page_table[:, None], (batch, kv_heads, page_table.shape[1]))
    held = cache.read(pages, jnp.arange(kv_heads), q.dtype)

    def beside(held, new):
        held = held.reshape(batch, kv_heads, most, -1).swapaxes(1, 2)
        held = jnp.pad(held, ((0, 0), (0, cached - most), (0, 0), (0, 0)))
        return jnp.concatenate([held, cache.restored(cache.stored(new), q.dtype)], axis=1)

    valid = (jnp.arange(chunk) < counts[:, None])[:, :, None, None]
    # Slots without a token may be NaN, and 0 * NaN is NaN.
    k, v = beside(held[0], k), beside(held[1], jnp.where(valid, v, 0))
    if estimate is None:
        mask = all_blocks(batch, chunk, cached=cached, held=lengths, block=block)
    else:
        mask = estimate.block_mask(q, k, cached=cached, held=lengths, counts=counts)
    return attention(q, k, v, mask)


def streaming_prefill(
    q: Float[Array, "B C Hq D"],
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    before: StreamingKVCache,
    after: StreamingKVCache,
    tokens: Tokens,
) -> Float[Array, "B C Hq D"]:
    """Attention of a chunk in streaming heads to the ring before it, to itself, and to the sink.

    ``before`` and ``after`` are the cache without and with the chunk. Every query sees exactly what
    ``streaming(sink, window)`` shows it: the window, merged with the part of the sink before the window.
    """
    _, lengths, counts = tokens
    window, dtype = before.window, before.k.dtype
    position = lengths[:, None] - window + jnp.arange(window)
    k, v = (
        jnp.concatenate([old.swapaxes(1, 2), new.astype(dtype)], axis=1).astype(q.dtype)
        for old, new in zip(before.take(position), (k, v), strict=True)
    )
    # Segment 1 is the sequence; slots without a token (in a short one's ring, in the last chunk) are 0.
    new = jnp.arange(q.shape[1]) < counts[:, None]
    ids = jnp.concatenate([position >= 0, new], axis=1).astype(jnp.int32)
    v = jnp.where(ids[:, :, None, None] > 0, v, 0)  # they may hold NaN, and 0 * NaN is NaN
    out, lse = attention(
        q,
        k,
        v,
        sliding_window(window),
        q_segment_ids=jnp.ones(q.shape[:2], jnp.int32),
        kv_segment_ids=ids,
        return_lse=True,
    )
    if before.sink == 0:
        return out
    sink_out, sink_lse = _attend_to_sink(q, after, tokens)
    merged, _ = merge(out, lse, sink_out, sink_lse)
    return merged.astype(q.dtype)


def _attend_to_sink(q, cache: StreamingKVCache, tokens: Tokens):
    """Attention to the tokens of the sink that the window does not show, and lse; float32, dense, small."""
    batch, chunk, q_heads, dim = q.shape
    kv_heads = cache.k.shape[1]
    k, v = cache.k[:, :, : cache.sink], cache.v[:, :, : cache.sink]
    token = jnp.arange(cache.sink)
    held = token < tokens.after[:, None]
    v = jnp.where(held[:, None, :, None], v, 0)
    grouped = q.reshape(batch, chunk, kv_heads, -1, dim)
    scores = jnp.einsum("bchgd,bhsd->bhgcs", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
    position = tokens.before[:, None] + jnp.arange(chunk)
    visible = (token <= (position - cache.window)[..., None]) & held[:, None]
    scores = jnp.where(visible[:, None, None], scores * dim**-0.5, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1), jnp.finfo(jnp.float32).min)  # finite where nothing is visible
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    out = jnp.einsum("bhgcs,bhsd->bchgd", weights, v.astype(jnp.float32))
    lse = (top + jnp.log(total)).transpose(0, 3, 1, 2).reshape(batch, chunk, q_heads)
    total = jnp.where(total == 0, 1, total).transpose(0, 3, 1, 2)[..., None]
    return (out / total).reshape(q.shape), lse
