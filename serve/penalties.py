"""Which tokens a sequence has had, and penalties on having them again."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse.arrays import AnyArray, DeviceArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of each row, by id. A step adds one token per row, whatever the size of the vocabulary."""

    in_prompt: DeviceArray  # bool [B, vocab]
    counts: DeviceArray  # int32 [B, vocab]: how often each was generated

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> "History":
        return cls(jnp.zeros((rows, vocab_size), bool), jnp.zeros((rows, vocab_size), jnp.int32))


def with_prompt(history: History, tokens: Int[Array, "B C"], counts: Int[Array, " B"]) -> History:
    """The history with the first ``counts[b]`` of the prompt tokens of each row."""
    padding = jnp.arange(tokens.shape[1]) >= counts[:, None]
    ids = jnp.where(padding, history.in_prompt.shape[1], tokens)  # beyond the vocabulary: dropped
    mark = jax.vmap(lambda row, at: row.at[at].set(True, mode="drop"))
    return dataclasses.replace(history, in_prompt=mark(history.in_prompt, ids))


def with_token(history: History, token: Int[Array, " B"], given: Bool[Array, " B"]) -> History:
    """The history with one generated token more in the rows where it is ``given``."""
    add = jax.vmap(lambda row, at, more: row.at[at].add(more))
    return dataclasses.replace(history, counts=add(history.counts, token, given.astype(jnp.int32)))


def penalize(
    logits: Float[Array, "B vocab"],
    history: History,
    repetition: Float[AnyArray, " B"],
    frequency: Float[AnyArray, " B"],
    presence: Float[AnyArray, " B"],
) -> Float[Array, "B vocab"]:
    """Logits less likely for tokens that were there before.

    - repetition: of a token in the prompt or among the new ones, a logit above 0 is divided by it, one below
      is multiplied; 1 changes nothing.
    - frequency: taken from a logit for each time that the token was generated; 0 changes nothing.
    - presence: taken once if it was generated; 0 changes nothing.

    Source: Keskar et al., arXiv 1909.05858, section 4.1, for repetition; OpenAI's API for the others.
    """
    generated = history.counts > 0
    factor = repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(history.in_prompt | generated, repeated, logits)
    return logits - frequency[:, None] * history.counts - presence[:, None] * generated
