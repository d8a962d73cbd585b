"""Rotary position embeddings (RoPE, arXiv 2104.09864): frequencies on the host, rotation on the device."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_LARGEST = 1e18  # far above any field of a model, and below what its products cannot hold


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn into rotation angles.

    ``kind`` is Hugging Face's ``rope_type``; the other fields have their names there too, and a kind reads
    only its own:

    - ``default``: frequency ``i`` is ``theta ** (-2i / head_dim)``.
    - ``linear``: those, divided by ``factor`` (position interpolation, arXiv 2306.15595).
    - ``llama3``: long wavelengths divided by ``factor``, short ones kept, a ramp between the two
      ``*_freq_factor`` bounds (Llama 3.1).
    - ``yarn``: a ramp between ``beta_fast`` and ``beta_slow`` rotations over the original context, and
      cosines and sines multiplied by an attention factor (arXiv 2309.00071).

    Raises ValueError for an unknown kind, for a factor below 1 and for a missing field.

    >>> RopeConfig(kind="linear", theta=10000.0, factor=4.0).factor
    4.0
    """

    kind: str = "default"
    theta: float | int = 10000.0
    factor: float | int | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | int | None = None
    high_freq_factor: float | int | None = None
    attention_factor: float | int | None = None
    beta_fast: float | int = 32.0
    beta_slow: float | int = 1.0
    mscale: float | int | None = None
    mscale_all_dim: float | int | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"RoPE type {self.kind!r} is not supported; allowed are {', '.join(ROPE_KINDS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("kind", "truncate") or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
                raise ValueError(
                    f"the RoPE field {field.name} must be a number of at most {_LARGEST:g}, not {value!r}"
                )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"the RoPE field truncate must be true or false, not {self.truncate!r}")
        if not self.theta > 1:
            raise ValueError(f"rope_theta must be a number > 1, not {self.theta!r}")
        for field in FIELDS_OF_KIND[self.kind].required:
            if getattr(self, field) is None:
                raise ValueError(f"RoPE type {self.kind!r} needs the field {field}")
        read = {"kind", "theta", *FIELDS_OF_KIND[self.kind].required, *FIELDS_OF_KIND[self.kind].optional}
        for field in dataclasses.fields(self):
            if field.name not in read and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"RoPE type {self.kind!r} does not read {field.name}={getattr(self, field.name)!r}"
                )
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"the RoPE factor must be a number >= 1, not {self.factor!r}")
        original = self.original_max_position_embeddings
        if original is not None and original < 1:
            raise ValueError(f"original_max_position_embeddings must be a positive integer, not {original!r}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and not (low and high and 0 < low < high):
            raise ValueError(
                f"RoPE type 'llama3' needs 0 < low_freq_factor < high_freq_factor, not {low!r} and {high!r}"
            )
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                "RoPE type 'yarn' needs beta_fast > beta_slow > 0, not "
                f"{self.beta_fast!r} and {self.beta_slow!r}"
            )


@dataclasses.dataclass(frozen=True)
class _Fields:
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


# What a kind reads besides theta. Anything else in a checkpoint's RoPE entry is refused: it would be ignored.
FIELDS_OF_KIND = {
    "default": _Fields(),
    "linear": _Fields(required=("factor",)),
    "llama3": _Fields(
        required=("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
    "yarn": _Fields(
        required=("factor", "original_max_position_embeddings"),
        optional=("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Float[np.ndarray, " half"], float]:
    """Angle per position of each pair of dimensions, and the factor on cosines and sines.

    Returns ``head_dim / 2`` frequencies, computed in float64 and rounded once to float32, and 1.0 for every
    kind but yarn.

    >>> frequencies, factor = rope_frequencies(RopeConfig(theta=10000.0), head_dim=4)
    >>> frequencies.tolist(), factor
    ([1.0, 0.009999999776482582], 1.0)
    """
    inverse = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    attention_factor = 1.0
    if rope.kind == "linear":
        inverse = inverse / (rope.factor or 1.0)
    elif rope.kind == "llama3":
        inverse = _llama3_frequencies(inverse, rope)
    elif rope.kind == "yarn":
        inverse = _yarn_frequencies(inverse, rope, head_dim)
        attention_factor = _yarn_attention_factor(rope)
    return inverse.astype(np.float32), attention_factor


def _llama3_frequencies(inverse, rope):
    # rotations over the original context, in units of the two bounds: < 0 is a long wave, > 1 is a short one
    rotations = rope.original_max_position_embeddings * inverse / (2 * np.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return inverse * kept + inverse / rope.factor * (1 - kept)


def _yarn_frequencies(inverse, rope, head_dim):
    def dimension_that_rotates(rotations):
        period = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = dimension_that_rotates(rope.beta_fast), dimension_that_rotates(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the published code's way around a division by zero
    interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return inverse / rope.factor * interpolated + inverse * (1 - interpolated)


def _yarn_attention_factor(rope):
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def scale(mscale):
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of every position, float32, with the kind's attention factor in them."""
    frequencies, attention_factor = rope_frequencies(rope, head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T H D"]:
    """Rotate each head's pairs ``(x[i], x[i + D/2])`` by their angle, in float32, and return the dtype of x.

    This is Hugging Face's "rotate half" order. Meta's own checkpoints pair neighbours instead, and must be
    permuted before they come here.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> quarter = jnp.full((1, 1, 1), jnp.pi / 2)
    >>> apply_rope(x, jnp.cos(quarter), jnp.sin(quarter)).round(3).tolist()
    [[[[-0.0, 1.0]]]]
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
