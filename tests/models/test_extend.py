"""Each way to a longer context: what it promises of the frequencies, and how it goes on from another."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse.models import LlamaConfig, RopeConfig
from jsparse.models.extend import EXTENSIONS, extend_rope
from jsparse.models.rope import rope_frequencies

METHODS = list(EXTENSIONS)
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
BASE = RopeConfig(theta=10000.0)
OF_KIND = {
    "default": BASE,
    "linear": RopeConfig(kind="linear", factor=2.0),
    "yarn": RopeConfig(kind="yarn", factor=2.0, original_max_position_embeddings=2048),
    "llama3": RopeConfig(
        kind="llama3",
        factor=8.0,
        low_freq_factor=2.0,
        high_freq_factor=3.0,
        original_max_position_embeddings=512,
    ),
}


def extend(rope, growth, method=None, head_dim=128, length=4096):
    return extend_rope(rope, growth, head_dim=head_dim, max_position_embeddings=length, method=method)


@pytest.mark.parametrize(
    ("length", "factor"), [(8192, 2), (16384, 4), (32768, 8), (65536, 16), (100_000, 25), (102_400, 25)]
)
@pytest.mark.parametrize("method", METHODS)
def test_longloras_lengths_from_4096(method, length, factor):
    config = LlamaConfig(**SIZES).extend_context(length, method)
    assert config.max_position_embeddings == 4096 * factor
    expected = {
        "linear": RopeConfig(kind="linear", factor=factor),
        "ntk": RopeConfig(theta=10000 * factor ** (16 / 14)),
        "yarn": RopeConfig(kind="yarn", factor=factor, original_max_position_embeddings=4096),
        "llama3": RopeConfig(
            kind="llama3",
            factor=factor,
            low_freq_factor=1,
            high_freq_factor=4,
            original_max_position_embeddings=4096,
        ),
    }
    assert config.rope == expected[method]
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_length_that_fits_changes_nothing(method):
    for rope in OF_KIND.values():
        config = LlamaConfig(**SIZES, rope=rope)
        assert config.extend_context(4096, method) is config
        assert config.extend_context(1, method) is config


def test_position_interpolation_is_exact():
    base, _ = rope_frequencies(BASE, 128)
    positions = np.arange(4096, dtype=np.float32)[:, None]
    for growth in (2, 4, 8, 16):  # powers of two only move the exponent
        stretched, _ = rope_frequencies(extend(BASE, growth, "linear"), 128)
        np.testing.assert_array_equal(growth * positions * stretched, positions * base)
    stretched, _ = rope_frequencies(extend(BASE, 25, "linear"), 128)
    np.testing.assert_allclose(25 * positions * stretched, positions * base, rtol=3e-7)


@pytest.mark.parametrize("head_dim", [4, 64, 128])
def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest(head_dim):
    base, _ = rope_frequencies(BASE, head_dim)
    ours, factor = rope_frequencies(extend(BASE, 8, "ntk", head_dim), head_dim)
    assert ours[0] == base[0] == 1 and factor == 1
    np.testing.assert_allclose(base[-1] / ours[-1], 8, rtol=1e-6)
    exponents = np.log(base.astype(np.float64) / ours) / np.log(8)
    np.testing.assert_allclose(exponents, np.linspace(0, 1, head_dim // 2), atol=1e-6)
    on_linear = extend(OF_KIND["linear"], 8, "ntk", head_dim)
    assert on_linear.kind == "linear"
    np.testing.assert_allclose(rope_frequencies(on_linear, head_dim)[0], ours / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_bands_keep_short_waves_and_divide_long_ones(kind):
    """Waves shorter than the original context is long stay; longer ones, which it never turned, stretch."""
    rope = extend(BASE, 8, kind)
    ours, _ = rope_frequencies(rope, 128)
    base, _ = rope_frequencies(BASE, 128)
    turns = 4096 * base / (2 * math.pi)
    fast, slow = turns > 40, turns < 0.9
    assert fast.sum() > 10 and slow.sum() > 5
    np.testing.assert_allclose(ours[fast], base[fast], rtol=1e-6)
    np.testing.assert_allclose(ours[slow], base[slow] / 8, rtol=1e-6)


@given(method=st.sampled_from(METHODS), first=st.integers(1, 40), second=st.integers(1, 40))
def test_two_steps_are_one(method, first, second):
    once = LlamaConfig(**SIZES).extend_context(4096 * first * second, method)
    twice = LlamaConfig(**SIZES).extend_context(4096 * first, method)
    twice = twice.extend_context(4096 * first * second, method)
    assert twice.max_position_embeddings == once.max_position_embeddings
    assert twice.rope.theta == pytest.approx(once.rope.theta, rel=1e-12)
    assert twice.rope.factor == once.rope.factor
    ours, theirs = rope_frequencies(twice.rope, 16), rope_frequencies(once.rope, 16)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=3e-7)
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("kind", OF_KIND)
def test_none_goes_on_in_the_checkpoints_own_way(kind):
    rope = extend(OF_KIND[kind], 3)
    assert rope == extend(OF_KIND[kind], 3, "linear" if kind == "default" else kind)
    if kind != "default":  # nothing but the factor changes
        assert rope == dataclasses.replace(OF_KIND[kind], factor=3 * (OF_KIND[kind].factor or 1))


def test_yarns_factor_on_cosines_follows_the_new_factor():
    plain = OF_KIND["yarn"]
    for before in (plain, dataclasses.replace(plain, mscale=2.0, mscale_all_dim=0.5)):
        rope, fresh = extend(before, 4), dataclasses.replace(before, factor=8.0)
        assert rope_frequencies(rope, 64)[1] != rope_frequencies(before, 64)[1]
        assert rope == fresh and rope_frequencies(rope, 64)[1] == rope_frequencies(fresh, 64)[1]
    with pytest.raises(NotImplementedError, match="attention_factor=1.2 .*factor 2.0.*8.0.*leave it out"):
        extend(dataclasses.replace(plain, attention_factor=1.2), 4)


@pytest.mark.parametrize(
    ("method", "kind", "allowed"),
    [
        ("linear", "yarn", "yarn"),
        ("linear", "llama3", "llama3"),
        ("ntk", "yarn", "yarn"),
        ("ntk", "llama3", "llama3"),
        ("yarn", "linear", "linear, ntk"),
        ("yarn", "llama3", "llama3"),
        ("llama3", "linear", "linear, ntk"),
        ("llama3", "yarn", "yarn"),
    ],
)
def test_no_single_rope(method, kind, allowed):
    config = LlamaConfig(**SIZES, rope=OF_KIND[kind])
    with pytest.raises(
        NotImplementedError, match=f"'{method}'.*'{kind}'.*allowed on '{kind}' are {allowed}$"
    ):
        config.extend_context(5000, method)


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    unknown: Any = "dynamic"
    for length in (100, 5000):  # refused even where nothing would change
        with pytest.raises(ValueError, match="linear, ntk, yarn, llama3 or None, not 'dynamic'"):
            LlamaConfig(**SIZES).extend_context(length, unknown)
    with pytest.raises(ValueError, match="head_dim above 2, not 2"):
        extend(BASE, 2, "ntk", head_dim=2)
    with pytest.raises(ValueError, match="growth.*>= 1, not 0"):
        extend(BASE, 0)
