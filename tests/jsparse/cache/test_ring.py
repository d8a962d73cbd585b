"""Spare slots of a ring: drafts that are rejected leave every token that a later query sees in its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jsparse.cache.decode import decode_attention
from jsparse.cache.prefill import streaming_prefill
from jsparse.cache.ring import StreamingKVCache, append_streaming
from jsparse.cache.tokens import Tokens

DIM, Q_HEADS = 4, 2
SINKS, WINDOWS, SPARES = st.integers(0, 3), st.integers(1, 6), st.integers(1, 5)


def sequence(length):
    """q [T, Hq, D], k and v [T, 1, D] of one sequence."""
    generator = np.random.default_rng(length)
    return (generator.normal(size=(length, heads, DIM)).astype(np.float32) for heads in (Q_HEADS, 1, 1))


def dirty_ring(rows, sink, window, spare):
    """A ring recycled from a broken sequence."""
    ring = StreamingKVCache.zeros(rows, 1, DIM, sink=sink, window=window, spare=spare, dtype=jnp.float32)
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), ring)


def dense(q, k, v, sink, window):
    """Attention of every query to the sink and its window, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, 0], v[:, 0]))
    key, query = np.arange(len(k)), np.arange(len(k))[:, None]
    visible = (key <= query) & ((key < sink) | (key > query - window))
    scores = np.einsum("thd,sd->hts", q, k) / np.sqrt(DIM)
    weights = np.where(visible, np.exp(scores - scores.max()), 0)
    return np.einsum("hts,sd->thd", weights / weights.sum(-1, keepdims=True), v)


@settings(max_examples=8)
@example(sink=2, window=4, spare=0)
@given(sink=SINKS, window=WINDOWS, spare=st.integers(0, 5))
def test_positions_are_those_of_a_ring_that_is_written_token_by_token(sink, window, spare):
    ring = StreamingKVCache.zeros(1, 1, DIM, sink=sink, window=window, spare=spare, dtype=jnp.float32)
    assert (ring.window, ring.ring, ring.k.shape[2]) == (window, window + spare, sink + window + spare)
    lengths = np.arange(3 * (sink + window + spare) + 2)
    positions = np.asarray(ring.positions(jnp.array(lengths)))
    slots = np.asarray(ring.slots(jnp.arange(lengths[-1] + spare)))
    for length, got in zip(lengths, positions, strict=True):
        for drafts in range(spare + 1):
            written = np.full(len(got), -1)
            for position in range(length + drafts):
                written[slots[position]] = position
            # No slot counts as a token's that a draft has overwritten.
            np.testing.assert_array_equal(got[got >= 0], written[got >= 0])
            if spare == 0:
                np.testing.assert_array_equal(got, written)  # and none is overlooked
        assert sorted(got[got >= 0]) == [p for p in range(length) if p < sink or p >= length - window]


@functools.partial(jax.jit, static_argnames="one_chunk")
def decode_after_drafts(ring, q, k, v, lengths, drafts, *, one_chunk):
    """What queries from ``lengths - 1`` on get, [B, 1 + steps, Hq, D], when all drafts are rejected."""
    rows, spare, steps = len(lengths), ring.spare, ring.ring + 2

    def write(before, added, k, v, ring):
        return append_streaming(ring, k[:, None], v[:, None], Tokens(None, before, added.astype(jnp.int32)))

    def prompt(t, ring):
        before = jnp.full(rows, t)
        new_k, new_v = (jnp.broadcast_to(x[t], (rows, 1, DIM)) for x in (k, v))
        return write(before, t < lengths, new_k, new_v, ring)

    def draft(j, ring):
        nothing = jnp.full((rows, 1, DIM), jnp.nan)
        return write(lengths + j, j < drafts, nothing, nothing, ring)

    def step(ring, i):
        at = lengths + i
        ring = write(at, jnp.ones(rows), k[at], v[at], ring)
        return ring, decode_attention(q[at], ring, at + 1)

    ring = jax.lax.fori_loop(0, jnp.max(lengths), prompt, ring)
    if one_chunk:
        chunk = jnp.full((rows, spare, 1, DIM), jnp.nan)
        ring = append_streaming(ring, chunk, chunk, Tokens(None, lengths, drafts))
    else:
        ring = jax.lax.fori_loop(0, spare, draft, ring)
    again = decode_attention(q[lengths - 1], ring, lengths)
    return jnp.concatenate([again[:, None], jax.lax.scan(step, ring, jnp.arange(steps))[1].swapaxes(0, 1)], 1)


@pytest.mark.parametrize("one_chunk", [False, True])
@settings(max_examples=4)
@example(sink=2, window=4, spare=3)
@example(sink=0, window=1, spare=5)
@given(sink=SINKS, window=WINDOWS, spare=SPARES)
def test_rejected_drafts_leave_no_trace(one_chunk, sink, window, spare):
    """Every length over two turns of the ring, and every number of drafts that it has slots for."""
    longest = sink + 2 * (window + spare)
    lengths, drafts = np.mgrid[1 : longest + 1, : spare + 1].reshape(2, -1).astype(np.int32)
    q, k, v = sequence(longest + window + spare + 2)
    ring = dirty_ring(len(lengths), sink, window, spare)
    run = functools.partial(decode_after_drafts, ring, *map(jnp.array, (q, k, v)), one_chunk=one_chunk)
    got, never = (np.asarray(run(lengths, d)) for d in (drafts, np.zeros_like(drafts)))
    np.testing.assert_array_equal(got, never)
    expected = dense(q, k, v, sink, window)[lengths[:, None] - 1 + np.arange(got.shape[1])]
    np.testing.assert_allclose(got, expected, atol=3e-6)


@jax.jit
def verify(q, k, v, ring, lengths, counts):
    tokens = Tokens(None, lengths, counts)
    after = append_streaming(ring, k, v, tokens)
    return streaming_prefill(q, k, v, ring, after, tokens), after


@settings(max_examples=3)
@example(sink=2, window=4, spare=3, seed=0)
@given(sink=SINKS, window=WINDOWS, spare=SPARES, seed=st.integers(0, 99))
def test_chunks_of_a_token_and_drafts_of_which_some_are_accepted(sink, window, spare, seed):
    generator = np.random.default_rng(seed)
    rows, rounds, chunk = 6, 8, 1 + spare
    prompt = sink + 3 * (window + spare)  # longer than the ring, in one chunk
    q, k, v = sequence(prompt + rounds * chunk + chunk)
    expected = dense(q, k, v, sink, window)
    lengths = generator.integers(1, prompt + 1, rows).astype(np.int32)
    pieces = (jnp.array(np.broadcast_to(x[:prompt], (rows, *x[:prompt].shape))) for x in (q, k, v))
    out, ring = verify(*pieces, dirty_ring(rows, sink, window, spare), np.zeros(rows, np.int32), lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :length], expected[:length], atol=3e-6)
    for _ in range(rounds):
        drafts = generator.integers(0, spare + 1, rows)
        right = 1 + generator.integers(0, drafts + 1)
        wrong = (np.arange(chunk) >= right[:, None])[..., None, None]
        take = lengths[:, None] + np.arange(chunk)
        pieces = (jnp.array(np.where(wrong, 1e3, x[take]), jnp.float32) for x in (q, k, v))
        out, ring = verify(*pieces, ring, jnp.array(lengths), jnp.array(1 + drafts, jnp.int32))
        for row, count in enumerate(right):
            first = lengths[row]
            np.testing.assert_allclose(out[row, :count], expected[first : first + count], atol=3e-6)
        lengths = (lengths + right).astype(np.int32)


@pytest.mark.parametrize(("sink", "long", "short", "spare"), [(0, 6, 2, 3), (3, 7, 4, 1), (2, 5, 5, 2)])
def test_a_narrowed_ring_has_the_same_spare_slots(sink, long, short, spare):
    lengths = np.arange(1, 3 * (sink + long + spare), dtype=np.int32)
    rows = len(lengths)
    _, k, v = (jnp.array(np.broadcast_to(x, (rows, *x.shape))) for x in sequence(int(lengths[-1])))

    def filled(window):
        return append_streaming(
            dirty_ring(rows, sink, window, spare), k, v, Tokens(None, start, jnp.array(lengths))
        )

    start = jnp.zeros(rows, jnp.int32)
    got, direct = filled(long).narrowed(short, jnp.array(lengths)), filled(short)
    assert jax.tree.structure(got) == jax.tree.structure(direct) and got.k.shape == direct.k.shape
    held = np.asarray(got.positions(jnp.array(lengths)))[:, None, :, None] >= 0
    for narrow, expected in ((got.k, direct.k), (got.v, direct.v)):
        np.testing.assert_array_equal(np.where(held, narrow, 0), np.where(held, expected, 0))


def test_a_negative_number_of_spare_slots_is_refused():
    with pytest.raises(ValueError, match="spare=-1 must be >= 0"):
        StreamingKVCache.zeros(1, 1, DIM, sink=1, window=4, spare=-1, dtype=jnp.float32)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_gpu_interpret"])
def test_the_kernel_refuses_spare_slots_and_says_so(implementation):
    ring = StreamingKVCache.zeros(1, 1, 64, sink=0, window=6, spare=2, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="takes streaming caches of spare=0, not spare=2"):
        decode_attention(jnp.ones((1, 1, 64)), ring, jnp.array([1]), implementation=implementation)
    out = decode_attention(jnp.ones((1, 1, 64)), ring, jnp.array([1]))  # XLA takes it
    assert out.shape == (1, 1, 64)
