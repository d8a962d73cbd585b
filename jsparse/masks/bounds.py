"""Bounds of the keys in a page, and a query's score from them: how Quest and LServe rank pages."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jsparse.arrays import AnyArray


def page_bounds(
    k: Num[AnyArray, "*batch S D"], logical_page_size: int
) -> tuple[Num[Array, "*batch P D"], Num[Array, "*batch P D"]]:
    """The smallest and the largest value of each channel in every page of keys.

    - k: [..., S, D], keys after RoPE.
    - logical_page_size: keys per page.

    Returns ``(k_min, k_max)``, each [..., P, D] with ``P = S / logical_page_size`` pages.

    Raises ValueError if ``S`` is not a multiple of the page size.

    Source: Quest (arXiv 2406.10774, §3.3).

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

    - q: [..., D], queries after RoPE. Leading axes broadcast against those of the bounds.
    - k_min, k_max: [..., P, D], with ``k_min <= k_max``, as :func:`page_bounds` returns them.

    Returns the scores [..., P], float32, not divided by ``sqrt(D)``.

    Source: Quest (arXiv 2406.10774, §3.3); LServe (arXiv 2502.14866, equation 2).

    >>> page_scores(jnp.array([1.0, -2.0]), jnp.array([[-1.0, -3.0]]), jnp.array([[4.0, 2.0]])).tolist()
    [10.0]
    """
    # max(a * low, a * high) is a * high where a > 0 and a * low elsewhere, so two products do it.
    q, k_min, k_max = (jnp.asarray(x, jnp.float32) for x in (q, k_min, k_max))

    def product(x, bounds):
        return jnp.einsum("...d,...pd->...p", x, bounds, precision=jax.lax.Precision.HIGHEST)

    return product(jnp.maximum(q, 0), k_max) + product(jnp.minimum(q, 0), k_min)
