"""From logits to tokens: greedy, temperature, top-k and top-p, with parameters for each row."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse.arrays import AnyArray, HostOrDevice
from jsparse.integers import is_integer

_MIN_TEMPERATURE = 1e-4  # logits divided by less are all infinite or zero in float32, which is greedy


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are chosen and when it stops; fields as in vLLM and Hugging Face.

    - temperature: 0 takes the most likely token; otherwise logits are divided by it (at least 1e-4).
    - top_k: sample among the k most likely tokens only; 0 for all.
    - top_p: of these, only the most likely tokens that together reach this probability, in (0, 1].
    - stop_token_ids: tokens that end the sequence, besides the model's own ``eos_token_ids``. They are
      returned.
    - ignore_eos: whether the sequence continues after the model's own end tokens.

    Tokens exactly as likely as the last one kept are kept too.

    Raises ValueError, naming the field and its range.

    >>> SamplingParams(top_p=0.0)
    Traceback (most recent call last):
        ...
    ValueError: top_p must be a number in (0, 1], not 0.0
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if not _is_number(self.temperature) or not (
            self.temperature == 0 or _MIN_TEMPERATURE <= self.temperature < math.inf
        ):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {_MIN_TEMPERATURE}, not {self.temperature!r}"
            )
        if not is_integer(self.top_k) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be an integer >= 0 (0: all tokens), not {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number in (0, 1], not {self.top_p!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        try:
            stop_token_ids = tuple(self.stop_token_ids)
        except TypeError:
            raise ValueError(
                f"stop_token_ids must be a sequence of ids, not {self.stop_token_ids!r}"
            ) from None
        for token in stop_token_ids:
            if not is_integer(token) or token < 0:
                raise ValueError(f"stop_token_ids must be integers >= 0, not {token!r}")
        object.__setattr__(self, "stop_token_ids", stop_token_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """The sampling parameters of a batch as arrays, one entry per row: new values compile nothing."""

    temperature: HostOrDevice  # float32 [B]
    top_k: HostOrDevice  # int32 [B]
    top_p: HostOrDevice  # float32 [B]
    seed: HostOrDevice  # uint32 [B]
    stops: HostOrDevice  # bool [B, vocab]: the tokens that end the row
    max_new: HostOrDevice  # int32 [B], 0 in a row without a prompt

    @classmethod
    def of(
        cls,
        sampling: list[SamplingParams],
        seeds: list[int],
        max_new: list[int],
        *,
        batch: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> "RowParams":
        """NumPy arrays of ``batch`` rows; those beyond the sequences are greedy and never used."""
        rows = [*sampling, *[SamplingParams()] * (batch - len(sampling))]
        stops = np.zeros((batch, vocab_size), bool)
        for row, params in enumerate(rows):
            stops[row, list(params.stop_token_ids)] = True
            if not params.ignore_eos:
                stops[row, list(eos_token_ids)] = True
        return cls(
            temperature=np.array([params.temperature for params in rows], np.float32),
            top_k=np.array([params.top_k for params in rows], np.int32),
            top_p=np.array([params.top_p for params in rows], np.float32),
            seed=np.array([*seeds, *[0] * (batch - len(seeds))], np.uint32),
            stops=stops,
            max_new=np.array([*max_new, *[0] * (batch - len(max_new))], np.int32),
        )


def sample(
    logits: Float[Array, "B vocab"], rows: RowParams, positions: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """One token per row, and whether the row's logits were all finite (if not, the token means nothing).

    The random numbers of a row depend only on its seed and on the absolute position of the new token,
    not on the other rows or on how the decoding is cut into calls.
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = scale_logits(logits, rows.temperature)
        restricted = jax.lax.cond(
            ((rows.top_k > 0) | (rows.top_p < 1)).any(),
            lambda: restrict(scaled, rows.top_k, rows.top_p),
            lambda: scaled,  # spares the sort
        )
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
            rows.seed, positions
        )
        drawn = jax.vmap(jax.random.categorical)(keys, restricted).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, greedy)

    return jax.lax.cond((rows.temperature > 0).any(), draw, lambda: greedy), finite


def scale_logits(
    logits: Float[Array, "B vocab"], temperature: Float[AnyArray, " B"]
) -> Float[Array, "B vocab"]:
    """Logits divided by the temperature, with the largest moved to 0 so nothing overflows."""
    largest = logits.max(axis=-1, keepdims=True)
    return (logits - largest) / jnp.where(temperature > 0, temperature, 1)[:, None]


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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


GREEDY = SamplingParams(temperature=0.0)  # always the most likely token
