"""Codes against the values they stand for."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from jsparse.cache.quantize import Quantized, dequantize, quantize


def unpacked(codes, bits):
    """The codes in NumPy, one an element."""
    codes = np.asarray(codes).astype(np.int32)
    if bits == 8:
        return codes
    halves = np.concatenate([codes & 15, codes >> 4 & 15], axis=-1)
    return np.where(halves >= 8, halves - 16, halves)


@pytest.mark.parametrize("bits", [8, 4])
@hypothesis.given(
    x=arrays.arrays(np.float32, (3, 8), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
)
def test_values_come_back_within_half_a_step(bits, x):
    quantized = quantize(jnp.array(x), bits)
    scale, zero = (np.asarray(a, np.float64)[:, None] for a in quantized[1:])
    # In float64, from the stored numbers, by an unpacking of the test's own.
    values = scale * (unpacked(quantized.codes, bits) - zero)
    # Zeros are below 2**17, where float32 is precise to 2**-7; each of three roundings is half of that.
    assert (np.abs(values - x) <= scale * (0.5 + 3 * 2**-8)).all()
    rounding = 2.0**-22 * np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(np.asarray(dequantize(quantized, bits)) - values) <= rounding).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_is_the_range_by_the_number_of_codes_and_the_ends_are_exact(bits):
    x = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32) + 1
    quantized = quantize(jnp.array(x), bits)
    np.testing.assert_allclose(quantized.scale, np.ptp(x, axis=-1) / (2**bits - 1), rtol=1e-6)
    codes = unpacked(quantized.codes, bits)
    assert (codes.min(axis=-1) == -(2 ** (bits - 1))).all() and (
        codes.max(axis=-1) == 2 ** (bits - 1) - 1
    ).all()
    rows = np.arange(100)
    for end in (x.argmin(axis=-1), x.argmax(axis=-1)):
        np.testing.assert_allclose(dequantize(quantized, bits)[rows, end], x[rows, end], atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 65504.0, 1e-30, -1e30, 0.1])
def test_constant_vectors_are_exact(bits, value):
    x = jnp.full((2, 6), value, jnp.float32)
    quantized = quantize(x, bits)
    assert np.isfinite(quantized.scale).all() and np.isfinite(quantized.zero).all()
    np.testing.assert_array_equal(dequantize(quantized, bits), x)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_value_does_not_wrap_to_the_smallest_code(bits):
    # Ranges whose largest value divides to a hair above the highest code.
    high = np.nextafter(np.float32(1), np.float32(2)) + np.arange(1000, dtype=np.float32) / 777
    x = np.stack([np.zeros_like(high), high], axis=-1)
    back = np.asarray(dequantize(quantize(jnp.array(x), bits), bits))
    np.testing.assert_allclose(back[:, 1], high, rtol=1e-5)


def test_four_bit_codes_share_a_byte_with_the_dimension_half_way_on():
    # Step 1 and zero -1: the codes are the values less one.
    x = jnp.array([[-7.0, 3.0, 0.0, 8.0]])
    quantized = quantize(x, 4)
    assert quantized.codes.dtype == jnp.int8 and quantized.codes.shape == (1, 2)
    low_high = [[-8, -1], [2, 7]]  # byte 0: dimensions 0 and 2, byte 1: dimensions 1 and 3
    expected = [np.array((low & 15) | (high & 15) << 4, np.uint8).view(np.int8) for low, high in low_high]
    np.testing.assert_array_equal(quantized.codes[0], expected)


def test_narrow_floats_are_taken_and_other_widths_refused():
    x = jnp.array([[0.0, 1.0, 2.0, 3.0]], jnp.bfloat16)
    np.testing.assert_allclose(dequantize(quantize(x, 8), 8), np.asarray(x, np.float32), atol=1e-6)
    with pytest.raises(ValueError, match="bits=3 must be 8 or 4"):
        quantize(x, 3)
    with pytest.raises(ValueError, match="bits=16 must be 8 or 4"):
        dequantize(Quantized(jnp.zeros((1, 2), jnp.int8), jnp.ones(1), jnp.ones(1)), 16)
    with pytest.raises(ValueError, match="3 dimensions"):
        quantize(x[:, :3], 4)
