"""Attention to two sets of keys, from the attention to each."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
    out: Float[Array, "*rows D"],
    lse: Float[Array, "*rows"],
    other_out: Float[Array, "*rows D"],
    other_lse: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Attention to the keys of two disjoint sets, from the attention to each::

        lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

    - out, other_out: attention to each set, [..., D].
    - lse, other_lse: natural logarithms of the sums of exponents [...], -inf for a row that sees nothing.

    Returns out and lse. A row that sees nothing in either set has out 0 (if the parts have) and lse -inf.

    Source: FlashAttention's rescaling (arXiv 2205.14135, §3.1), applied to whole parts.

    >>> out, lse = merge(jnp.ones((1, 2)), jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros(1))
    >>> out.tolist(), bool(jnp.allclose(lse, jnp.log(2)))
    ([[0.5, 0.5]], True)
    """
    top = jnp.maximum(lse, other_lse)
    top = jnp.where(top == -jnp.inf, 0, top)  # nothing seen: -inf - -inf is not a number
    weight, other_weight = jnp.exp(lse - top), jnp.exp(other_lse - top)
    total = jnp.maximum(weight + other_weight, jnp.finfo(jnp.float32).tiny)
    merged = out * (weight / total)[..., None] + other_out * (other_weight / total)[..., None]
    return merged, jnp.logaddexp(lse, other_lse)
