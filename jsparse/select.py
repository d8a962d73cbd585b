"""Which pages of the KV cache a query should read: min/max bounds of the keys, and the best pages by them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

AnyArray = Array | np.ndarray


def page_bounds(
    k: Num[AnyArray, "*batch S D"], logical_page_size: int
) -> tuple[Num[Array, "*batch P D"], Num[Array, "*batch P D"]]:
    """The smallest and the largest value of each channel in every page of keys.

    ``k`` is ``[..., S, D]``, after RoPE; the result ``(k_min, k_max)`` has ``P = S / logical_page_size``
    pages. Raises ``ValueError`` where ``S`` is no multiple of the page. (Quest, arXiv 2406.10774, §3.3.)

    >>> k_min, k_max = page_bounds(jnp.array([[1.0, 5.0], [2.0, 4.0], [0.0, 0.0], [3.0, -3.0]]), 2)
    >>> k_min.tolist(), k_max.tolist()
    ([[1.0, 4.0], [0.0, -3.0]], [[2.0, 5.0], [3.0, 0.0]])
    """
    *batch, length, dim = k.shape
    if logical_page_size < 1 or length % logical_page_size:
        raise ValueError(
            f"logical_page_size={logical_page_size} must divide the {length} keys of k {k.shape}"
        )
    pages = jnp.asarray(k).reshape(*batch, length // logical_page_size, logical_page_size, dim)
    return pages.min(axis=-2), pages.max(axis=-2)


def page_scores(
    q: Num[AnyArray, "*#batch D"], k_min: Num[AnyArray, "*#batch P D"], k_max: Num[AnyArray, "*#batch P D"]
) -> Float[Array, "*batch P"]:
    """An upper bound of ``q @ k`` over all keys ``k`` of each page::

        score[p] = sum over channels d of max(q[d] * k_min[p, d], q[d] * k_max[p, d])

    ``q`` is ``[..., D]``, the bounds ``[..., P, D]`` with ``k_min <= k_max``; leading axes broadcast. The
    score is float32 and not divided by ``sqrt(D)``. (Quest, §3.3; LServe, arXiv 2502.14866, equation 2.)

    >>> page_scores(jnp.array([1.0, -2.0]), jnp.array([[-1.0, -3.0]]), jnp.array([[4.0, 2.0]])).tolist()
    [10.0]
    """
    # max(a * low, a * high) is a * high where a > 0 and a * low elsewhere, so two products do it.
    q, k_min, k_max = (jnp.asarray(x, jnp.float32) for x in (q, k_min, k_max))

    def product(x, bounds):
        return jnp.einsum("...d,...pd->...p", x, bounds, precision=jax.lax.Precision.HIGHEST)

    return product(jnp.maximum(q, 0), k_max) + product(jnp.minimum(q, 0), k_min)


def select_pages(
    q: Float[Array, "B Hq D"],
    k_min: Float[Array, "B Hk P L D"],
    k_max: Float[Array, "B Hk P L D"],
    lengths: Int[Array, " B"],
    *,
    budget: int,
    page_size: int,
) -> Int[Array, "B Hk n"]:
    """The pages that each KV head should read for one query a sequence, at most ``budget`` tokens of them.

    ``k_min`` and ``k_max`` bound the ``L`` logical pages inside each of a sequence's ``P`` pages of
    ``page_size`` tokens; ``lengths`` are the tokens held. The score of a page is the largest over its logical
    pages (LServe's hierarchical paging) and over the query heads that share the KV head. The last page, which
    the newest token is in, is always chosen and counts in the budget; the rest are the best by score, of
    equals the earlier page. A context within the budget selects all its pages.

    Returns ``n = min(budget / page_size, P)`` page indices, ascending; where a sequence has fewer pages, the
    end of its list is -1. What pages beyond ``lengths`` hold has no effect, NaN included.

    Raises ``ValueError`` where the budget is not a whole number of pages, at least one.

    >>> k = jnp.array([[1.0], [9.0], [2.0], [3.0]]).reshape(1, 1, 4, 1, 1)  # four pages of one token
    >>> select_pages(jnp.ones((1, 1, 1)), k, k, jnp.array([4]), budget=2, page_size=1).tolist()
    [[[1, 3]]]
    """
    if budget < page_size or budget % page_size:
        raise ValueError(f"budget={budget} must be a multiple of page_size={page_size}, at least one page")
    batch, q_heads, dim = q.shape
    _, kv_heads, pages, logical, _ = k_min.shape
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, dim)
    flat = (batch, kv_heads, 1, pages * logical, dim)
    scores = page_scores(grouped, k_min.reshape(flat), k_max.reshape(flat)).max(axis=2)

    # The newest page is usually filled in part: its later logical pages hold nothing, or another's keys.
    logical_starts = jnp.arange(pages * logical) * (page_size // logical)
    scores = jnp.where(logical_starts < lengths[:, None, None], scores, -jnp.inf)
    scores = scores.reshape(batch, kv_heads, pages, logical).max(axis=-1)

    page = jnp.arange(pages)
    last = (lengths[:, None, None] - 1) // page_size
    scores = jnp.where(page == last, jnp.inf, scores)
    _, chosen = jax.lax.top_k(
        scores, min(budget // page_size, pages)
    )  # top_k takes the lower index of equals
    chosen = jnp.sort(jnp.where(chosen <= last, chosen, pages), axis=-1)
    return jnp.where(chosen < pages, chosen, -1)
