"""What an attention layer does with its cache: append new tokens, and attend with them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jsparse.arrays import DeviceArray, take_heads
from jsparse.cache.decode import decode_attention
from jsparse.cache.pages import PagedKVCache, append_paged
from jsparse.cache.prefill import paged_prefill, streaming_prefill
from jsparse.cache.ring import StreamingKVCache, append_streaming
from jsparse.cache.select.choose import pages_to_read
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens
from jsparse.masks.estimate import Estimate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKVCache:
    """The cache of one attention layer, split by KV head: ``streaming_heads`` stream, all others are paged.

    - paged: the pages; None in a layer that only streams.
    - streaming: the sink and the ring; None in a layer that never streams.
    - streaming_heads: the KV heads that stream.
    - selected: [B, H, n], the pages that were chosen last; None if no choice is kept.
    """

    paged: PagedKVCache | None
    streaming: StreamingKVCache | None
    streaming_heads: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    selected: DeviceArray | None = None


def attend_and_append(
    q: Float[Array, "B C Hq D"],
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    cache: LayerKVCache,
    tokens: Tokens,
    *,
    selection: Selection | None = None,
    select: Bool[Array, " B"] | None = None,
    estimate: Estimate | None = None,
) -> tuple[Float[Array, "B C Hq D"], LayerKVCache]:
    """Appends tokens to a layer's cache, and attends with their queries.

    Streaming heads see their sink and window. Retrieval heads see every earlier key, unless ``selection`` or
    ``estimate`` says otherwise.

    - tokens: what the cache holds, and how many of the ``C`` tokens are added to each sequence. For a chunk
      (``C > 1``), ``tokens.before`` must be a multiple of ``C`` in every sequence that gets some of it.
    - selection: how retrieval heads choose the pages that the query of a single token reads.
    - select: the sequences that choose again (None: all); the others read what ``cache.selected`` holds.
    - estimate: which blocks of a chunk retrieval heads visit; None visits all of them.

    Returns the attention, and the cache with the tokens in it.
    """
    group = q.shape[2] // k.shape[2]
    one = q.shape[1] == 1 and estimate is None
    paged, ring, selected = cache.paged, cache.streaming, cache.selected
    parts, order = [], []
    if paged is not None:
        heads = [h for h in range(k.shape[2]) if h not in cache.streaming_heads]
        q_part, k_part, v_part = _take(q, heads, group), _take(k, heads), _take(v, heads)
        paged = append_paged(paged, k_part, v_part, tokens)
        if one:
            pages = None
            if selection is not None:
                pages, selected = pages_to_read(
                    q_part[:, 0], paged, tokens, selection, selected=selected, select=select
                )
            out = decode_attention(q_part[:, 0], paged, tokens.after, tokens.page_table, pages=pages)[:, None]
        else:
            out = paged_prefill(q_part, k_part, v_part, paged, tokens, estimate=estimate)
        parts.append(out)
        order += heads
    if ring is not None:
        heads = list(cache.streaming_heads)
        q_part, k_part, v_part = _take(q, heads, group), _take(k, heads), _take(v, heads)
        before, ring = ring, append_streaming(ring, k_part, v_part, tokens)
        if one:
            parts.append(decode_attention(q_part[:, 0], ring, tokens.after)[:, None])
        else:
            parts.append(streaming_prefill(q_part, k_part, v_part, before, ring, tokens))
        order += heads
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    out = _take(out, [order.index(h) for h in range(len(order))], group)
    return out, LayerKVCache(paged, ring, cache.streaming_heads, selected)


def _take(x, kv_heads: list[int], group: int = 1):
    """KV heads of ``[B, C, H, D]``, or the ``group`` query heads of each."""
    return take_heads(x, [head * group + i for head in kv_heads for i in range(group)])
