"""RoPE against formulas written out one frequency at a time, in float64."""

import cmath
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.models import RopeConfig
from jsparse.models.rope import apply_rope, rope_frequencies, rope_tables

BASE = RopeConfig(theta=10000.0)


def test_default_frequencies():
    frequencies, factor = rope_frequencies(RopeConfig(theta=500.0), 8)
    np.testing.assert_allclose(frequencies, [500 ** (-i / 8) for i in (0, 2, 4, 6)], rtol=1e-7)
    assert factor == 1.0


def test_llama3_bands():
    rope = RopeConfig(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    )
    base, _ = rope_frequencies(BASE, 64)
    ours, _ = rope_frequencies(rope, 64)
    expected, bands = [], set()
    for frequency in base.astype(np.float64):
        wavelength = 2 * math.pi / frequency
        if wavelength < 256 / 4:
            expected.append(frequency)
            bands.add("kept")
        elif wavelength > 256 / 1:
            expected.append(frequency / 8)
            bands.add("stretched")
        else:
            smooth = (256 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
            bands.add("between")
    assert len(bands) == 3
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_yarn_attention_factor():
    def factor(**fields):
        return rope_frequencies(RopeConfig(kind="yarn", original_max_position_embeddings=64, **fields), 16)[1]

    assert factor(factor=4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert factor(factor=1.0) == 1.0
    assert factor(factor=4.0, attention_factor=0.7) == 0.7
    ratio = (0.1 * 2 * math.log(4) + 1) / (0.1 * 0.5 * math.log(4) + 1)
    assert factor(factor=4.0, mscale=2.0, mscale_all_dim=0.5) == pytest.approx(ratio)
    # DeepSeek's convention: one of the two alone changes nothing
    assert factor(factor=4.0, mscale=2.0) == factor(factor=4.0)


def test_yarn_truncation_moves_the_ramp_to_whole_dimensions():
    fields = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    whole, _ = rope_frequencies(RopeConfig(**fields), 64)
    exact, _ = rope_frequencies(RopeConfig(**fields, truncate=False), 64)
    base, _ = rope_frequencies(BASE, 64)
    assert np.abs(whole / exact - 1).max() > 1e-3
    for frequencies in (whole, exact):  # fast dimensions are kept, slow ones are divided by the factor
        np.testing.assert_allclose(frequencies[0], base[0], rtol=1e-6)
        np.testing.assert_allclose(frequencies[-1], base[-1] / 4, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0, 4.0])
def test_interpolated_position_is_the_base_position(factor):
    positions = jnp.arange(50)[None]
    base = rope_tables(BASE, 32, positions)
    stretched = rope_tables(RopeConfig(kind="linear", factor=factor), 32, positions * int(factor))
    np.testing.assert_allclose(stretched, base, atol=1e-5)


def test_rotation_is_a_complex_product():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    cos, sin = rope_tables(BASE, 8, jnp.array([[0, 5, 1000]]))
    ours = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    for t, position in enumerate((0, 5, 1000)):
        for i in range(4):
            turn = cmath.exp(1j * position * 10000 ** (-2 * i / 8))
            turned = (x[0, t, :, i] + 1j * x[0, t, :, i + 4]) * turn
            np.testing.assert_allclose(ours[0, t, :, i], turned.real, atol=1e-4)
            np.testing.assert_allclose(ours[0, t, :, i + 4], turned.imag, atol=1e-4)


def test_scores_depend_on_distance_only_and_dtype_is_kept():
    q, k = (np.random.default_rng(seed).standard_normal((1, 1, 1, 16)).astype(np.float32) for seed in (0, 1))

    def score(q_position, k_position):
        turned = [
            apply_rope(jnp.asarray(x), *rope_tables(BASE, 16, jnp.array([[position]])))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2
    half = jnp.asarray(q, jnp.bfloat16)
    assert apply_rope(half, *rope_tables(BASE, 16, jnp.array([[3]]))).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "dynamic"}, "'dynamic'.*default, linear, llama3, yarn"),
        ({"factor": 2.0}, "'default' does not read factor=2.0"),
        ({"kind": "linear"}, "factor"),
        ({"theta": float("inf")}, "theta"),
        ({"theta": 1.0}, "rope_theta.*> 1"),
        ({"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "truncate": 1}, "truncate"),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refusals(fields, named):
    with pytest.raises(ValueError, match=named):
        RopeConfig(**fields)
