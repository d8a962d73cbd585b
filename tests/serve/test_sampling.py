"""Temperature, top-k and top-p against NumPy, and against the frequencies they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse.serve import SamplingParams
from jsparse.serve.draw import drop_unlikely, restrict, sample, scale_logits
from jsparse.serve.penalties import History
from jsparse.serve.sampling import RowParams


def kept_by_numpy(logits, top_k, top_p):
    """Which tokens stay: by loops, in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    keep = list(order[: top_k or None])
    weights = np.exp(logits[keep] - logits.max())
    total, kept = 0.0, []
    for token, weight in zip(keep, weights / weights.sum(), strict=True):
        if total >= top_p and top_p < 1:
            break
        kept.append(token)
        total += weight
    return sorted(kept)


restricted = jax.jit(restrict)


@given(st.integers(0, 2**31), st.integers(0, 20), st.floats(0.01, 1.0))
def test_top_k_and_top_p_keep_what_numpy_keeps(seed, top_k, top_p):
    logits = 3 * np.random.default_rng(seed).normal(size=(2, 16)).astype(np.float32)
    out = np.asarray(
        restricted(jnp.array(logits), jnp.array([top_k, 0]), jnp.array([top_p, 1.0], jnp.float32))
    )
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept_by_numpy(logits[0], top_k, np.float32(top_p))
    np.testing.assert_array_equal(out[0][np.isfinite(out[0])], logits[0][np.isfinite(out[0])])
    np.testing.assert_array_equal(out[1], logits[1])


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_min_p_keeps_what_numpy_keeps(seed, min_p):
    logits = 3 * np.random.default_rng(seed).normal(size=(2, 16)).astype(np.float32)
    scaled = scale_logits(jnp.array(logits), jnp.array([0.7, 0.7]))
    out = np.asarray(drop_unlikely(scaled, jnp.array([min_p, 0.0], jnp.float32)))
    likely = np.exp(np.float64(logits[0]) / 0.7)
    assert np.isfinite(out[0]).tolist() == (likely >= np.float32(min_p) * likely.max()).tolist()
    np.testing.assert_array_equal(out[1], scaled[1])


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    logits = jnp.array([[1.0, 2.0, 1.0, 0.0]])
    assert np.isfinite(restrict(logits, jnp.array([2]), jnp.array([1.0]))).tolist() == [
        [True, True, True, False]
    ]


def rows_of(params, seeds, vocab_size=8):
    return RowParams.of(
        params, seeds, [1] * len(params), batch=len(params), vocab_size=vocab_size, eos_token_ids=(3,)
    )


@jax.jit
def choose(logits, rows, positions):
    none = jnp.zeros(len(logits), jnp.int32)
    history = History.empty(*logits.shape)
    return sample(logits, rows, history, generated=none, positions=positions, running=none == 0)


def test_frequencies_follow_the_restricted_softmax():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, -2.0, -9.0], np.float32)
    count = 4000
    for params in (
        SamplingParams(0.7),
        SamplingParams(1.5, top_k=4),
        SamplingParams(1.0, top_p=0.8),
        SamplingParams(1.0, top_k=-1, min_p=0.2),
    ):
        rows = rows_of([params] * count, list(range(count)))
        tokens, finite = choose(jnp.tile(logits, (count, 1)), rows, jnp.full(count, 17))
        kept = kept_by_numpy(logits / params.temperature, max(params.top_k, 0), params.top_p)
        kept = [token for token in kept if logits[token] >= logits.max() + np.log(params.min_p or 1e-9)]
        expected = np.zeros(8)
        expected[kept] = np.exp(logits[kept] / params.temperature)
        frequencies = np.bincount(np.asarray(tokens), minlength=8) / count
        np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.03)
        assert (frequencies[expected == 0] == 0).all() and finite.all()


def test_seed_and_position_decide_whatever_the_other_rows_do():
    logits = jnp.array(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32))
    warm = SamplingParams(2.0)
    alone, _ = choose(logits, rows_of([warm, *[SamplingParams()] * 3], [5, 0, 0, 0], 64), jnp.arange(4))
    busy, _ = choose(
        logits,
        rows_of([warm, SamplingParams(1.0, 3, 0.5), warm, warm], [5, 1, 2, 3], 64),
        jnp.array([0, 9, 9, 9]),
    )
    assert alone[0] == busy[0]
    assert alone[1:].tolist() == jnp.argmax(logits[1:], axis=-1).tolist()
    same = jnp.tile(logits[:1], (4, 1))
    drawn = [choose(same, rows_of([warm] * 4, [5] * 4, 64), jnp.arange(4) + i)[0].tolist() for i in (0, 4)]
    assert len({*drawn[0], *drawn[1]}) > 3  # positions differ
    assert choose(same, rows_of([warm] * 4, [5] * 4, 64), jnp.zeros(4, int))[0].tolist() == [drawn[0][0]] * 4


def test_a_row_that_is_not_finite_is_flagged_alone():
    logits = np.zeros((4, 8), np.float32)
    logits[0, 3], logits[1, 2], logits[2, 1] = np.nan, np.inf, -np.inf
    for temperature in (0.0, 1.0):
        _, finite = choose(
            jnp.array(logits), rows_of([SamplingParams(temperature)] * 4, [0] * 4), jnp.arange(4)
        )
        assert finite.tolist() == [False, False, False, True]


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e30])
def test_extreme_temperatures_stay_finite_or_nothing(temperature):
    logits = jnp.array([[1e4, -1e4, 9e3]])
    scaled = np.asarray(scale_logits(logits, jnp.array([temperature], jnp.float32)))
    assert not np.isnan(scaled).any() and scaled[0, 0] == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
def test_a_tiny_temperature_is_greedy_but_for_ties(temperature):
    logits = jnp.tile(jnp.array([[1e4, 9e3, -1e4, 1e4]]), (64, 1))
    rows = rows_of([SamplingParams(temperature)] * 64, list(range(64)), 4)
    tokens, finite = choose(logits, rows, jnp.zeros(64, int))
    assert finite.all() and set(tokens.tolist()) == {0, 3}


def test_rows_hold_the_stop_tokens():
    params = [SamplingParams(stop_token_ids=[1, 5]), SamplingParams(ignore_eos=True, stop_token_ids=(2,))]
    rows = RowParams.of(params, [1, 2], [9, 9], batch=3, vocab_size=8, eos_token_ids=(3,))
    assert [np.flatnonzero(row).tolist() for row in rows.stops[:2]] == [[1, 3, 5], [2]]
    assert rows.max_new.tolist() == [9, 9, 0] and rows.seed.tolist() == [1, 2, 0]


def test_temperatures_beyond_float32_are_kept_within_it():
    rows = RowParams.of(
        [SamplingParams(temperature=1e39), SamplingParams()], [0, 0], [1, 1], batch=2, vocab_size=4
    )
    assert np.isfinite(rows.temperature).all() and rows.temperature[0] > 1e20 and rows.temperature[1] == 0
