"""The pages of the KV cache that score best, and the lists that are read."""

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
    """The pages to read for one query a sequence, lists of at most ``budget`` tokens, by bounds of the keys.

    ``bounds`` are :func:`page_bounds` of the ``L`` logical pages inside each of a sequence's ``P`` pages of
    ``page_size`` tokens, the smallest values and then the largest in one array; ``lengths`` are the tokens
    held. The score of a page is the largest :func:`page_scores` of its logical pages (LServe's hierarchical
    paging); what follows is :func:`best_pages`.

    >>> k = jnp.array([[1.0], [9.0], [2.0], [3.0]])  # four pages of one token
    >>> bounds = jnp.concatenate([k, k], axis=-1).reshape(1, 1, 4, 1, 2)
    >>> select_pages(jnp.ones((1, 1, 1)), bounds, jnp.array([4]), budget=2, page_size=1).tolist()
    [[[1, 3]]]
    """
    batch, q_heads, dim = q.shape
    _, kv_heads, pages, logical, _ = bounds.shape
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, dim).astype(jnp.float32)
    # As in page_scores: smallest values count where q is negative, largest where it is positive. Bounds are
    # the rows of the product, which a CPU does up to twice as fast as the other order.
    sides = jnp.concatenate([jnp.minimum(grouped, 0), jnp.maximum(grouped, 0)], axis=-1)
    rows = bounds.astype(jnp.float32).reshape(batch, kv_heads, pages * logical, 2 * dim)
    scores = jnp.einsum("bhnd,bhgd->bhng", rows, sides, precision=jax.lax.Precision.HIGHEST)
    if heads == "max":
        scores = scores.max(axis=-1, keepdims=True)
    # The newest page is usually filled in part: its later logical pages hold nothing, or another's keys.
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
    """The pages of the largest scores, of each KV head and each of its ``G`` query heads.

    The last page, which the newest token is in, is always chosen and counts in the budget; the rest are the
    best by score, of equals the earlier page. A context within the budget selects all its pages. ``heads`` as
    in :class:`Selection`: lists are one a KV head ("max", "union") or one a query head ("query").

    Returns page indices, ascending; where a sequence has fewer pages, the end of its list is -1. ``n =
    min(budget / page_size, P)``; for the union ``G`` times that, ``P`` at most. Scores of pages beyond
    ``lengths`` have no effect, NaN included.

    Raises ``ValueError`` where the budget is not a whole number of pages, at least one.
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

    A list ends with the page that was the last when it was made: what begins after it is all new. Where the
    context is within the budget, all its pages are listed, whatever was chosen. ``m`` is ``n`` and the pages
    that ``every - 1`` tokens can begin.

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
    """Scores that depend on the seed and on each sequence's length alone."""
    key = jax.random.key(seed)
    *heads, pages = shape

    def of(length):
        # Pages come first, for then a longer cache does not change the numbers of the first ones.
        return jnp.moveaxis(jax.random.uniform(jax.random.fold_in(key, length), (pages, *heads)), 0, -1)

    return jax.vmap(of)(lengths)
