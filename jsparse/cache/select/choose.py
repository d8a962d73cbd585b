"""Which pages a decode step reads of a paged cache: a choice by scores, kept for several tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse.cache.pages import PagedKVCache
from jsparse.cache.select.best import best_pages, random_scores, select_pages, with_newest_pages
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens


def pages_to_read(
    q: Float[Array, "B Hq D"],
    cache: PagedKVCache,
    tokens: Tokens,
    selection: Selection,
    *,
    selected: Int[Array, "B H n"] | None = None,
    select: Bool[Array, " B"] | None = None,
) -> tuple[Int[Array, "B H m"], Int[Array, "B H n"] | None]:
    """The pages that a decode step reads, and the choice that the next step starts from.

    - q: the queries of the newest tokens, which the cache holds already.
    - selected: the choice of an earlier step, [B, H, n]. None chooses in every sequence and keeps nothing.
    - select: the sequences that choose now (None: all); the others read what ``selected`` holds.

    Returns ``(pages, selected)``: the choice with the pages that have begun since then, and the choice alone.
    """
    reuse = selected is not None
    if selected is None:
        chosen = choose_pages(q, cache, tokens, selection)
    else:
        select = jnp.ones(q.shape[0], bool) if select is None else select

        def choose():
            return jnp.where(select[:, None, None], choose_pages(q, cache, tokens, selection), selected)

        chosen = jax.lax.cond(select.any(), choose, lambda: selected)
    pages = with_newest_pages(
        chosen,
        tokens.after,
        page_size=cache.page_size,
        budget=selection.budget,
        every=selection.every if reuse else 1,
    )
    return pages, chosen if reuse else None


def choose_pages(
    q: Float[Array, "B Hq D"], cache: PagedKVCache, tokens: Tokens, selection: Selection
) -> Int[Array, "B H n"]:
    """The pages that score best for the newest tokens, by the score that ``selection`` names."""
    page_table, lengths = tokens.page_table, tokens.after
    assert page_table is not None
    options = {"budget": selection.budget, "page_size": cache.page_size, "heads": selection.heads}
    if selection.score == "bounds":
        assert cache.bounds is not None
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
        # The last page, which may be partly filled, is chosen whatever its score.
        if selection.score == "mean":
            scores = jnp.einsum("bhgd,bhpd->bhgp", grouped, k.mean(axis=3))
        else:
            assert selection.score == "exact"
            scores = jnp.einsum("bhgd,bhpsd->bhgps", grouped, k).max(axis=-1)
    return best_pages(scores, lengths, **options)
