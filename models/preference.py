"""Direct preference optimisation (DPO, arXiv 2305.18290): which answer a model prefers, and the loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


class Pairs(NamedTuple):
    """The pairs of answers in rows of tokens.

    - margins: [B, P], the log-probability of the chosen answer minus that of the rejected one.
    - exist: [B, P], whether a row has so many pairs.
    """

    margins: Float32[Array, "B P"]
    exist: Bool[Array, "B P"]


def most_pairs(context: int) -> int:
    """How many pairs a row of ``context`` tokens can have: an answer and its question take two tokens."""
    return max(1, context // 4)


def pair_margins(
    nll: Float32[Array, "B T"], counts: Bool[Array, "B T"], segment_ids: Int32[Array, "B T"]
) -> Pairs:
    """By how much each pair's chosen answer is more probable, of rows that hold nothing but pairs.

    Segments 1 and 2 of a row are the chosen and the rejected answer of its first pair, each after the
    question, 3 and 4 those of its second, and so on; 0 is padding.

    - nll, counts: of every token, the negative log-likelihood of its target, and whether that is scored
      (``token_nll`` and ``next_targets`` give them).

    >>> nll, counts = jnp.array([[9.0, 1.0, 9.0, 3.0, 9.0]]), jnp.array([[False, True, False, True, False]])
    >>> margins, exist = pair_margins(nll, counts, jnp.array([[1, 1, 2, 2, 0]]))
    >>> margins.tolist(), exist.tolist()
    ([[2.0]], [[True]])
    """
    exist = pairs_exist(counts, segment_ids)
    logps = -_by_answer(jnp.where(counts, nll, 0.0), segment_ids)
    return Pairs(jnp.where(exist, logps[..., 0] - logps[..., 1], 0.0), exist)


def pairs_exist(counts: Bool[Array, "B T"], segment_ids: Int32[Array, "B T"]) -> Bool[Array, "B P"]:
    """Which of the pairs that rows may have they have: both of its answers are scored."""
    return (_by_answer(counts.astype(jnp.int32), segment_ids) > 0).all(axis=-1)


def _by_answer(values: Array, segment_ids: Int32[Array, "B T"]) -> Array:
    """The sums [B, P, 2] of values [B, T] over the answers of pairs."""
    pairs = most_pairs(segment_ids.shape[1])

    def sums(row, ids):
        return jax.ops.segment_sum(row, ids, num_segments=2 * pairs + 1)

    return jax.vmap(sums)(values, segment_ids)[:, 1:].reshape(-1, pairs, 2)


class PreferenceSums(NamedTuple):
    """Sums over pairs: DPO's loss, by how much the chosen answer gained, and how often it did."""

    loss: Float32[Array, ""]
    margin: Float32[Array, ""]
    right: Float32[Array, ""]


def preference_sums(pairs: Pairs, reference: Float32[Array, "B P"], beta: float) -> PreferenceSums:
    """The sums over pairs of ``-log sigmoid(m)``, of ``m`` and of ``m > 0`` (equation 7 of the paper).

    ``m = beta (margin - reference)`` is the difference of the rewards of a pair's answers.

    - reference: the margins under the model before training.

    >>> pairs = Pairs(jnp.array([[2.0, 0.0]]), jnp.array([[True, False]]))
    >>> f"{preference_sums(pairs, jnp.array([[2.0, 0.0]]), beta=0.1).loss:.4f}"
    '0.6931'
    """
    rewards = beta * (pairs.margins - reference)

    def total(values):
        return jnp.where(pairs.exist, values, 0.0).sum()

    return PreferenceSums(total(jax.nn.softplus(-rewards)), total(rewards), total(rewards > 0))
