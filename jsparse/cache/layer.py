"""What an attention layer does with its cache: append new tokens, and attend with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse.cache.decode import decode_attention
from jsparse.cache.pages import PagedKVCache, append_paged
from jsparse.cache.prefill import paged_prefill, streaming_prefill
from jsparse.cache.ring import StreamingKVCache, append_streaming
from jsparse.cache.select.best import best_pages, random_scores, select_pages, with_newest_pages
from jsparse.cache.select.selection import Selection
from jsparse.masks.pooled import PooledBlocks
from jsparse.masks.vertical_slash import VerticalSlash


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKVCache:
    """The cache of one attention layer, split by KV head: ``streaming_heads`` stream, all others are paged.

    ``paged`` is None in a layer that only streams, ``streaming`` is None in a layer that never does.
    ``selected`` are the pages that were chosen last, ``[B, H, n]``, None where none are.
    """

    paged: PagedKVCache | None
    streaming: StreamingKVCache | None
    streaming_heads: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    selected: Any = None


def attend_and_append(
    q: Float[Array, "B C Hq D"],
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    cache: LayerKVCache,
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    selection: Selection | None = None,
    select: Bool[Array, " B"] | None = None,
    estimate: PooledBlocks | VerticalSlash | None = None,
) -> tuple[Float[Array, "B C Hq D"], LayerKVCache]:
    """Appends ``counts[b]`` tokens a sequence to a layer's cache and attends with their queries.

    ``lengths`` are the tokens held before; where a chunk comes (``C > 1``), multiples of ``C`` in every
    sequence that gets some of it. Streaming heads see their sink and window. Retrieval heads see every
    earlier key, or of a chunk the blocks that ``estimate`` lists; of a single token the pages that
    ``selection`` chooses: anew in the sequences that ``select`` marks (None: in all), else those that
    ``cache.selected`` holds.
    """
    group = q.shape[2] // k.shape[2]
    one = q.shape[1] == 1 and estimate is None
    after = lengths + counts
    paged, ring, selected = cache.paged, cache.streaming, cache.selected
    parts, order = [], []
    if paged is not None:
        heads = [h for h in range(k.shape[2]) if h not in cache.streaming_heads]
        q_part, k_part, v_part = _take_heads(q, heads, group), _take_heads(k, heads), _take_heads(v, heads)
        paged = append_paged(paged, k_part, v_part, page_table, lengths, counts)
        if one:
            pages = None
            if selection is not None:
                chosen = _selected(q_part[:, 0], paged, page_table, after, selection, selected, select)
                selected = None if selected is None else chosen
                pages = with_newest_pages(
                    chosen,
                    after,
                    page_size=paged.page_size,
                    budget=selection.budget,
                    every=1 if selected is None else selection.every,
                )
            out = decode_attention(q_part[:, 0], paged, after, page_table, pages=pages)[:, None]
        else:
            out = paged_prefill(q_part, k_part, v_part, paged, page_table, lengths, counts, estimate=estimate)
        parts.append(out)
        order += heads
    if ring is not None:
        heads = list(cache.streaming_heads)
        q_part, k_part, v_part = _take_heads(q, heads, group), _take_heads(k, heads), _take_heads(v, heads)
        before, ring = ring, append_streaming(ring, k_part, v_part, lengths, counts)
        if one:
            parts.append(decode_attention(q_part[:, 0], ring, after)[:, None])
        else:
            parts.append(streaming_prefill(q_part, k_part, v_part, before, ring, lengths, counts))
        order += heads
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    out = _take_heads(out, [order.index(h) for h in range(len(order))], group)
    return out, LayerKVCache(paged, ring, cache.streaming_heads, selected)


def choose_pages(
    q: Float[Array, "B Hq D"],
    cache: PagedKVCache,
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    selection: Selection,
) -> Int[Array, "B H n"]:
    """The pages that the heads should read, by the scores that ``selection`` names."""
    options = {"budget": selection.budget, "page_size": cache.page_size, "heads": selection.heads}
    if selection.score == "bounds":
        # [B, Hk, max_pages, L, 2 D]: the bounds of a sequence's pages, in its own order
        bounds = cache.bounds.at[page_table].get(mode="clip").swapaxes(1, 2)
        return select_pages(q, bounds, lengths, **options)
    batch, max_pages = page_table.shape
    kv_heads, group = cache.num_heads, q.shape[1] // cache.num_heads
    if selection.score == "random":
        scores = random_scores(lengths, selection.seed, (kv_heads, group, max_pages))
    else:
        pages = jnp.broadcast_to(page_table[:, None], (batch, kv_heads, max_pages))
        k, _ = cache.read(pages, jnp.arange(kv_heads), jnp.float32)
        grouped = q.reshape(batch, kv_heads, group, -1).astype(jnp.float32)
        # The last page, which holds less than a page of this sequence's keys, is chosen whatever its score.
        if selection.score == "mean":
            scores = jnp.einsum("bhgd,bhpd->bhgp", grouped, k.mean(axis=3))
        else:
            scores = jnp.einsum("bhgd,bhpsd->bhgps", grouped, k).max(axis=-1)
    return best_pages(scores, lengths, **options)


def _selected(q, cache, page_table, lengths, selection, selected, select):
    """The lists in force: chosen now in the sequences that select, kept in the others."""
    if selected is None:
        return choose_pages(q, cache, page_table, lengths, selection)
    select = jnp.ones(q.shape[0], bool) if select is None else select

    def choose():
        return jnp.where(
            select[:, None, None], choose_pages(q, cache, page_table, lengths, selection), selected
        )

    return jax.lax.cond(select.any(), choose, lambda: selected)


def _take_heads(x, heads: list[int], group: int = 1):
    """KV heads ``heads`` of ``[B, C, H, D]``, or the ``group`` query heads of each."""
    first, last = heads[0] * group, (heads[-1] + 1) * group
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x if last - first == x.shape[2] else x[:, :, first:last]
    return x[:, :, jnp.array([h * group + i for h in heads for i in range(group)])]
