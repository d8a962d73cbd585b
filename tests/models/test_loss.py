import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.models.loss import next_targets, token_nll


def test_a_token_counts_where_the_next_is_scored_and_of_its_document():
    tokens = np.array([[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]], np.int32)
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    scored = np.array([[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]], bool)  # the second row begins with a prompt
    targets, counts = next_targets(*map(jnp.asarray, (tokens, segment_ids, scored)))
    assert np.array_equal(targets[:, :-1], tokens[:, 1:])
    assert np.array_equal(counts, [[1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0]])
    assert np.array_equal(
        next_targets(jnp.asarray(tokens), jnp.asarray(segment_ids))[1],
        [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    )


def dense_nll(hidden, table, targets):
    """In float64, with all logits at once."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64)
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    largest = logits.max(-1)
    return np.log(np.exp(logits - largest[..., None]).sum(-1)) + largest - picked


@settings(max_examples=20, deadline=None)
@given(parts=st.sampled_from([1, 2, 4]), part=st.integers(1, 9), at_once=st.integers(1, 80))
def test_the_stretches_change_nothing(parts, part, at_once):
    rng = np.random.default_rng(parts + 10 * part)
    hidden = jnp.asarray(rng.normal(size=(2, parts * part, 6)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(6, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, hidden.shape[:2]), jnp.int32)
    nll = token_nll(hidden, lambda h: h @ table, targets, parts=parts, logits_at_once=at_once)
    np.testing.assert_allclose(nll, dense_nll(hidden, table, targets), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 37, 16)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(16, 50)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 37)), jnp.int32)
    return hidden, table, targets


def gradients(case, logits_at_once):
    hidden, table, targets = case

    def loss(hidden, table):
        def logits_of(h):
            return jnp.einsum("...e,ev->...v", h, table.astype(h.dtype), preferred_element_type=jnp.float32)

        return token_nll(hidden, logits_of, targets, logits_at_once=logits_at_once).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(hidden, table)


def test_gradients_of_the_stretches_are_summed_in_the_tables_own_float32(case):
    """A float32 table read in bfloat16: what its stretches add up is not rounded to bfloat16 in between."""
    whole, stretched = gradients(case, 10**6), gradients(case, 4 * 50)
    for one, other in zip(whole, stretched, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) < 4e-3 * np.linalg.norm(one)
    assert whole[1].dtype == jnp.float32


def test_all_logits_are_never_there_at_once():
    """The largest float32 array of the compiled gradient is one stretch of logits, not [T, vocabulary]."""
    length, vocab = 4096, 1000
    hidden = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
    table = jax.ShapeDtypeStruct((8, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(hidden, table, targets):
        return token_nll(hidden, lambda h: h @ table, targets, logits_at_once=256 * vocab).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table, targets).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < length * vocab * 4 / 3


def test_every_stretch_has_a_key_of_its_own():
    """The noise that an adapter's dropout is, here in the logits themselves."""

    def logits_of(hidden, key):
        return jax.random.normal(key, (*hidden.shape[:-1], 8))

    hidden, targets = jnp.zeros((1, 12, 4)), jnp.zeros((1, 12), jnp.int32)
    nll = np.asarray(token_nll(hidden, logits_of, targets, key=jax.random.key(0), logits_at_once=24))[0]
    assert len(set(nll.tolist())) == 12  # not the same three again and again
    again = token_nll(hidden, logits_of, targets, key=jax.random.key(0), logits_at_once=24)
    np.testing.assert_array_equal(again[0], nll)
    whole = token_nll(hidden, logits_of, targets, key=jax.random.key(0))
    expected = -jax.nn.log_softmax(logits_of(hidden, jax.random.key(0)))[..., 0]
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
