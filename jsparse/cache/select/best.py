"""The pages of the KV cache that score best, and the lists of pages to read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse.cache.select.selection import SelectHeads


def select_pages(
    q: Float[Array, "B Hq D"],
    bounds: Float[Array, "B Hk P L 2*D"],
    lengths: Int[Array, " B"],
    *,
    budget: int,
    page_size: int,
    heads: SelectHeads = "max",
) -> Int[Array, "B H n"]:
    """The pages to read for one query per sequence, chosen by the bounds of their keys.

    The score of a page is the largest :func:`jsparse.page_scores` of its logical pages. :func:`best_pages`
    chooses by these scores.

    - q: [B, Hq, D], the queries.
    - bounds: [B, Hk, P, L, 2 D], :func:`jsparse.page_bounds` of the ``L`` logical pages in each of a
      sequence's ``P`` pages, the smallest values and then the largest.
    - lengths: [B], the tokens held.
    - budget: the most tokens in a list, in whole pages.
    - page_size: tokens per page.
    - heads: as in :class:`Selection`.

    Returns what :func:`best_pages` returns, and raises what it raises.

    Source: LServe's hierarchical paging (arXiv 2502.14866).

    >>> k = jnp.array([[1.0], [9.0], [2.0], [3.0]])  # four pages of one token
    >>> bounds = jnp.concatenate([k, k], axis=-1).reshape(1, 1, 4, 1, 2)
    >>> select_pages(jnp.ones((1, 1, 1)), bounds, jnp.array([4]), budget=2, page_size=1).tolist()
    [[[1, 3]]]
    """
    batch, q_heads, dim = q.shape
    _, kv_heads, pages, logical, _ = bounds.shape
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, dim).astype(jnp.float32)
    # As in page_scores: smallest values count where q is negative, largest where it is positive. The bounds
    # are the rows of the product: on a CPU this is up to twice as fast as the other order.
    sides = jnp.concatenate([jnp.minimum(grouped, 0), jnp.maximum(grouped, 0)], axis=-1)
    rows = bounds.astype(jnp.float32).reshape(batch, kv_heads, pages * logical, 2 * dim)
    scores = jnp.einsum("bhnd,bhgd->bhng", rows, sides, precision=jax.lax.Precision.HIGHEST)
    if heads == "max":
        scores = scores.max(axis=-1, keepdims=True)
    # The newest page is usually partly filled: its later logical pages hold nothing, or another's keys.
    logical_starts = jnp.arange(pages * logical) * (page_size // logical)
    scores = jnp.where(logical_starts[:, None] < lengths[:, None, None, None], scores, -jnp.inf)
    scores = scores.reshape(batch, kv_heads, pages, logical, -1).max(axis=3).swapaxes(2, 3)
    return best_pages(scores, lengths, budget=budget, page_size=page_size, heads=heads)


def best_pages(
    scores: Float[Array, "B Hk G P"],
    lengths: Int[Array, " B"],
    *,
    budget: int,
    page_size: int,
    heads: SelectHeads = "max",
) -> Int[Array, "B H n"]:
    """The pages with the largest scores.

    The last page, which holds the newest token, is always chosen and counts in the budget. The rest are the
    best by score, the earlier of equals. A context within the budget selects all its pages.

    - scores: [B, Hk, G, P], for each of the ``G`` query heads of a KV head. Those of pages beyond ``lengths``
      have no effect, NaN included.
    - lengths, budget, page_size, heads: as in :func:`select_pages`.

    Returns ascending page indices, one list per KV head ("max", "union") or per query head ("query"), filled
    up with -1. ``n = min(budget / page_size, P)``; for "union", ``G`` times that, at most ``P``.

    Raises ValueError if the budget is not a whole number of pages, at least one.
    """
    if budget < page_size or budget % page_size:
        raise ValueError(f"budget={budget} must be a multiple of page_size={page_size}, at least one page")
    batch, kv_heads, group, pages = scores.shape
    if heads == "max":
        scores = scores.max(axis=2, keepdims=True)
    page = jnp.arange(pages)
    last = (lengths[:, None, None, None] - 1) // page_size
    scores = jnp.where(page < last, scores, jnp.where(page == last, jnp.inf, -jnp.inf))
    # top_k takes the lower index of equals.
    _, chosen = jax.lax.top_k(scores, min(budget // page_size, pages))
    chosen = jnp.where(chosen <= last, chosen, pages)
    if heads == "union":
        marked = jnp.zeros((batch, kv_heads, pages + 1), bool)
        row = jnp.arange(batch * kv_heads).reshape(batch, kv_heads)
        marked = marked.reshape(-1, pages + 1).at[row[..., None, None], chosen].set(True)
        listed = jnp.where(marked[:, :-1], page, pages).reshape(batch, kv_heads, pages)
        chosen = jnp.sort(listed, axis=-1)[..., : min(group * chosen.shape[-1], pages)]
    else:
        chosen = jnp.sort(chosen.reshape(batch, -1, chosen.shape[-1]), axis=-1)
    return jnp.where(chosen < pages, chosen, -1)


def with_newest_pages(
    pages: Int[Array, "B H n"], lengths: Int[Array, " B"], *, page_size: int, budget: int, every: int
) -> Int[Array, "B H m"]:
    """Lists chosen up to ``every - 1`` tokens ago, and the pages that have begun since then.

    A list ends with the page that was last when it was made, so all later pages are new. If the context is
    within the budget, all its pages are listed, whatever was chosen. ``m`` is ``n`` plus the pages that
    ``every - 1`` tokens can begin.

    >>> with_newest_pages(jnp.array([[[1, 3]]]), jnp.array([9]), page_size=2, budget=4, every=4).tolist()
    [[[1, 3, 4, -1]]]
    """
    last = (lengths[:, None, None] - 1) // page_size
    begun = pages.max(axis=-1, keepdims=True) + 1 + jnp.arange(-(-(every - 1) // page_size))
    listed = jnp.concatenate([pages, jnp.where(begun <= last, begun, -1)], axis=-1)
    everything = jnp.arange(listed.shape[-1])
    everything = jnp.where(everything <= last, everything, -1)
    return jnp.where(lengths[:, None, None] <= budget, everything, listed)


def random_scores(
    lengths: Int[Array, " B"], seed: int, shape: tuple[int, int, int]
) -> Float[Array, "B Hk G P"]:
    """Scores that depend only on the seed and on each sequence's length."""
    key = jax.random.key(seed)
    *heads, pages = shape

    def of(length):
        # Pages come first: a longer cache then does not change the numbers of the first ones.
        return jnp.moveaxis(jax.random.uniform(jax.random.fold_in(key, length), (pages, *heads)), 0, -1)

    return jax.vmap(of)(lengths)
