"""Next-token cross-entropy for packed windows, a stretch of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32

PADDING = 0  # the segment id of what fills a window up; documents and prompts count from 1
_LOGITS_AT_ONCE = 2**26  # float32 logits of one sequence: 256 MiB


def next_targets(
    tokens: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
    scored: Bool[Array, "B T"] | None = None,
) -> tuple[Int32[Array, "B T"], Bool[Array, "B T"]]:
    """The token that follows each position, and whether it counts.

    A position t counts where token t + 1 belongs to the same document and is ``scored`` (None: all are). The
    last token of a document or window, a token before a prompt's token, and padding do not count; there the
    target is defined, but means nothing.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    counts = (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != PADDING)
    if scored is not None:
        counts &= jnp.roll(scored, -1, axis=1)
    return targets, counts.at[:, -1].set(False)


def token_nll(
    hidden: Float[Array, "B T E"],
    logits_of: Callable[..., Array],
    targets: Int32[Array, "B T"],
    *,
    key: jax.Array | None = None,
    parts: int = 1,
    logits_at_once: int = _LOGITS_AT_ONCE,
) -> Float32[Array, "B T"]:
    """``-log softmax(logits_of(hidden[t]))[targets[t]]`` for every t, in float32.

    The logits of all tokens are never in memory at once: with 100,000 tokens and a vocabulary of 128,256 they
    would take 51 GB. They are computed for one stretch of each sequence at a time, and again in the backward
    pass.

    - key: ``logits_of(hidden, key)`` gets a random key made from this one, another for each stretch.
    - parts: how many devices share each sequence; a stretch takes equally many tokens from each device.
    - logits_at_once: at most this many numbers of a sequence at a time.

    >>> hidden = jnp.eye(4)[None]
    >>> nll = token_nll(hidden, lambda h: 100 * h, jnp.array([[0, 1, 2, 0]]), logits_at_once=8)
    >>> nll.tolist()
    [[0.0, 0.0, 0.0, 100.0]]
    """
    batch, length, _ = hidden.shape
    whole = () if key is None else (key,)
    vocab = jax.eval_shape(logits_of, hidden, *whole).shape[-1]
    part = length // parts
    stretches = -(-part // max(1, logits_at_once // vocab))

    @jax.checkpoint
    def nll(hidden, targets, *key):
        logits = logits_of(hidden, *key).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    if stretches == 1:
        return nll(hidden, targets, *whole)
    size = -(-part // stretches)

    def stretched(x):  # [B, T, ...] to [stretches, B, parts, size, ...]
        x = x.reshape(batch, parts, part, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, stretches * size - part), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(batch, parts, stretches, size, *x.shape[3:]), 2, 0)

    keys = [jax.random.split(one, stretches) for one in whole]
    out = jax.lax.map(lambda x: nll(*x), (stretched(hidden), stretched(targets), *keys))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, parts, stretches * size)
    return out[:, :, :part].reshape(batch, length)
