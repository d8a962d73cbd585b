"""From logits to tokens: what each row's parameters make of its logits, and the draw."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse.arrays import AnyArray
from jsparse.serve.penalties import History, penalize
from jsparse.serve.sampling import RowParams


def sample(
    logits: Float[Array, "B vocab"],
    rows: RowParams,
    history: History,
    *,
    generated: Int[Array, " B"],
    positions: Int[Array, " B"],
    running: Bool[Array, " B"],
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """One token per row, and whether the row's logits were all finite (if not, the token means nothing).

    The order is vLLM's: end tokens are forbidden before ``min_tokens``, ``logit_bias`` is added, penalties on
    repetition, frequency and presence follow. A greedy row takes the most likely token then. For the others
    come temperature, ``min_p``, ``top_k`` and ``top_p``, and the draw. What no running row asks for is not
    computed.

    The random numbers of a row depend only on its seed, its prompt and the absolute position of the new
    token, not on the other rows or on how the decoding is cut into calls.

    - generated: how many new tokens each row has.
    - positions: where the new token will be.
    - running: the rows whose token matters.

    Source: vLLM, vllm/v1/sample/sampler.py.
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    waiting = generated < rows.min_tokens
    adjusts = running & (
        waiting
        | rows.biased
        | (rows.repetition_penalty != 1)
        | (rows.frequency_penalty != 0)
        | (rows.presence_penalty != 0)
    )
    draws = running & (rows.temperature > 0)

    def choose():
        adjusted = jax.lax.cond(adjusts.any(), lambda: adjust(logits, rows, history, waiting), lambda: logits)
        greedy = _most_likely(adjusted)
        return jax.lax.cond(
            draws.any(),
            lambda: jnp.where(rows.temperature > 0, _draw(adjusted, rows, positions, draws), greedy),
            lambda: greedy,
        )

    return jax.lax.cond((adjusts | draws).any(), choose, lambda: _most_likely(logits)), finite


def adjust(
    logits: Float[Array, "B vocab"], rows: RowParams, history: History, waiting: Bool[Array, " B"]
) -> Float[Array, "B vocab"]:
    """What changes even a greedy choice: end tokens while ``waiting`` for more tokens, biases, penalties."""
    logits = jnp.where(rows.stops & waiting[:, None], -jnp.inf, logits)
    add = jax.vmap(lambda row, ids, biases: row.at[ids].add(biases, mode="drop"))
    logits = add(logits, rows.bias_ids, rows.biases)
    return penalize(logits, history, rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty)


def _most_likely(logits: Float[Array, "B vocab"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draw(
    logits: Float[Array, "B vocab"], rows: RowParams, positions: Int[Array, " B"], draws: Bool[Array, " B"]
) -> Int[Array, " B"]:
    scaled = drop_unlikely(scale_logits(logits, rows.temperature), rows.min_p)
    restricted = jax.lax.cond(
        (draws & ((rows.top_k > 0) | (rows.top_p < 1))).any(),
        lambda: restrict(scaled, rows.top_k, rows.top_p),
        lambda: scaled,  # spares the sort
    )

    def key(seed, prompt, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), position)

    keys = jax.vmap(key)(rows.seed, rows.prompt_hash, positions)
    return jax.vmap(jax.random.categorical)(keys, restricted).astype(jnp.int32)


def scale_logits(
    logits: Float[Array, "B vocab"], temperature: Float[AnyArray, " B"]
) -> Float[Array, "B vocab"]:
    """Logits divided by the temperature, with the largest moved to 0 so nothing overflows."""
    largest = logits.max(axis=-1, keepdims=True)
    return (logits - largest) / jnp.where(temperature > 0, temperature, 1)[:, None]


def drop_unlikely(logits: Float[Array, "B vocab"], min_p: Float[AnyArray, " B"]) -> Float[Array, "B vocab"]:
    """Logits whose largest is 0, with -inf for tokens less likely than ``min_p`` times the most likely one.

    0 keeps all, 1 the most likely tokens alone.

    Source: Nguyen et al., arXiv 2407.01082.
    """
    return jnp.where(logits >= jnp.log(min_p)[:, None], logits, -jnp.inf)


def restrict(
    logits: Float[Array, "B vocab"], top_k: Int[AnyArray, " B"], top_p: Float[AnyArray, " B"]
) -> Float[Array, "B vocab"]:
    """The logits with all but the top-k, then all but the top-p tokens of each row set to -inf.

    ``top_k`` 0 and ``top_p`` 1 keep all. Of the tokens that top-k left, top-p keeps the fewest most likely
    ones that together reach ``top_p``: a token stays if those before it sum to less.

    Source: Holtzman et al., arXiv 1904.09751.
    """
    vocab = logits.shape[-1]
    descending = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]
    kept = jnp.where(jnp.arange(vocab) < k, descending, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    count = jnp.where(top_p < 1, (before < top_p[:, None]).sum(axis=-1), vocab)[:, None]
    # The smallest logit that stays; the first is before every cut, so at least one does.
    least = jnp.take_along_axis(descending, jnp.minimum(jnp.maximum(count, 1), k) - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)
