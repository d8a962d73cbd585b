"""Log-probabilities of tokens under the model, and of the most likely tokens in their places."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse.arrays import HostOrDevice

MAX_LOGPROBS = 20  # most likely tokens that can be asked for; so many are always computed


class TokenLogprobs(NamedTuple):
    """What the model gave for one token, and for the most likely ones in its place.

    They are of the model's own distribution: no parameter of the sampling changes them.

    - logprob: the natural logarithm of the token's probability.
    - top: pairs of an id and its log-probability, most likely first, as many as were asked for.
    """

    logprob: float
    top: list[tuple[int, float]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of ``n`` tokens of each row, and the most likely tokens there."""

    logprob: HostOrDevice  # float32 [B, n]
    top: HostOrDevice  # float32 [B, n, MAX_LOGPROBS]
    top_ids: HostOrDevice  # int32 [B, n, MAX_LOGPROBS]

    @classmethod
    def zeros(cls, rows: int, tokens: int, vocab_size: int) -> "Scores":
        most = min(MAX_LOGPROBS, vocab_size)
        return cls(
            jnp.zeros((rows, tokens)),
            jnp.zeros((rows, tokens, most)),
            jnp.zeros((rows, tokens, most), jnp.int32),
        )


def score(logits: Float[Array, "B n vocab"], tokens: Int[Array, "B n"]) -> Scores:
    """The scores of ``tokens``, each under the logits in its place."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return Scores(own, *jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1])))


def token_logprobs(scores: Scores, row: int, place: int, top: int) -> TokenLogprobs:
    """One token's scores, of NumPy arrays, with the ``top`` most likely tokens."""
    ids, values = scores.top_ids[row, place, :top], scores.top[row, place, :top]
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(float(scores.logprob[row, place]), list(pairs))


def on_host(scores: Scores) -> Scores:
    return jax.tree.map(np.asarray, scores)
