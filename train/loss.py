"""Next-token cross-entropy for packed windows."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jsparse.train.data import PADDING


def next_token_nll(
    logits: Float[Array, "B T V"], tokens: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"]
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """``-log softmax(logits[t])[tokens[t + 1]]`` for every t, in float32, and which of them count.

    One counts where token t + 1 is of the same document: the last token of a document, of the window, and all
    padding do not. (Their values are defined, but mean nothing.)
    """
    # Rolling the few integers and masking the last position spares a copy of logits[:, :-1].
    targets = jnp.roll(tokens, -1, axis=1)
    same_document = (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != PADDING)
    counts = same_document.at[:, -1].set(False)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets), counts
