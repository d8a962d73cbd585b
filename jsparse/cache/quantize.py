"""Keys and values as 8- or 4-bit codes with a scale and a zero for each vector."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

# No scale is smaller than this fraction of a vector's largest absolute value: zeros stay precise in float32.
_FINEST = 2.0**-16


class Quantized(NamedTuple):
    """Vectors as codes: ``value = scale * (code - zero)``.

    - codes: int8 [..., D]; or, with 4 bits, [..., D / 2] of two codes per byte, dimension d in the low half
      and d + D / 2 in the high half.
    - scale, zero: float32 [...], one per vector.
    """

    codes: Int8[Array, "*batch stored"]
    scale: Float[Array, "*batch"]
    zero: Float[Array, "*batch"]


def quantize(x: Float[Array, "*batch D"], bits: int) -> Quantized:
    """Vectors as 8- or 4-bit codes, with a scale and a zero for each vector::

        scale = (max - min) / (2**bits - 1)
        code = round(x / scale + zero)        in -2**(bits-1) ... 2**(bits-1) - 1

    A scale is at least 2**-16 of the vector's largest absolute value. Codes are centred on 0, so bfloat16
    represents all of them exactly.

    - x: [..., D], floating; D is even for 4 bits.
    - bits: of a code, 8 or 4.

    Returns codes, scales and zeros. :func:`dequantize` gives each value back within half a scale (and
    float32's rounding), and constant vectors exactly.

    Raises ValueError if ``bits`` is neither 8 nor 4, or if it is 4 and D is odd.

    Source: asymmetric codes per token and head as in QServe (arXiv 2405.04532).

    >>> quantize(jnp.array([[0.0, 1.0, 14.0, 15.0]]), 4).scale.tolist()
    [1.0]
    """
    half = 2 ** (_check(bits) - 1)
    if bits == 4 and x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} dimensions: 4-bit codes take an even number")
    x = x.astype(jnp.float32)
    low, high, largest = x.min(axis=-1), x.max(axis=-1), jnp.abs(x).max(axis=-1)
    scale = jnp.maximum((high - low) / (2 * half - 1), largest * _FINEST)
    # A constant vector has its absolute value as the scale, and its only code is 0.
    constant = high == low
    scale = jnp.where(constant, largest, scale)
    scale = jnp.where(scale == 0, 1.0, scale)
    zero = jnp.where(constant, -jnp.sign(low), -half - low / scale)
    codes = jnp.round(x / scale[..., None] + zero[..., None])
    codes = jnp.clip(codes, -half, half - 1).astype(jnp.int8)
    if bits == 4:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = (first & 15) | (second << 4)
    return Quantized(codes, scale, zero)


def dequantize(quantized: Quantized, bits: int) -> Float[Array, "*batch D"]:
    """The float32 values of codes: ``scale * (code - zero)``.

    - quantized: what :func:`quantize` returned.
    - bits: of a code, the same as there.

    Returns float32 [..., D].

    Raises ValueError if ``bits`` is neither 8 nor 4.

    >>> dequantize(quantize(jnp.array([[-7.0, 0.0, 1.0, 8.0]]), 4), 4).tolist()
    [[-7.0, 0.0, 1.0, 8.0]]
    """
    codes, scale, zero = quantized
    if _check(bits) == 4:
        codes = jnp.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)
    return scale[..., None] * (codes - zero[..., None])


def _check(bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 8 or 4")
    return bits
