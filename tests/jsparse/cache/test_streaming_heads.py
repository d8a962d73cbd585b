"""Rings of streaming heads whose prompts see a longer window than new tokens: any length, over many turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache.decode import decode_attention
from jsparse.cache.prefill import streaming_prefill
from jsparse.cache.ring import StreamingKVCache, append_streaming
from jsparse.cache.tokens import Tokens


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dirty_ring(rows, dim, sink, window):
    """A ring recycled from a broken sequence."""
    ring = StreamingKVCache.zeros(rows, 1, dim, sink=sink, window=window, dtype=jnp.float32)
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), ring)


def dense(q, k, v, sink, window, first=0):
    """One sequence in float64, q [T, H, D], k and v [T, D]: outputs of the queries from ``first`` on."""
    q, k, v = (np.asarray(x, np.float64) for x in (q[first:], k, v))
    key, query = np.arange(len(k)), np.arange(first, len(k))[:, None]
    visible = (key <= query) & ((key < sink) | (key > query - window))
    scores = np.einsum("thd,sd->hts", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(visible, np.exp(scores - scores.max()), 0)
    return np.einsum("hts,sd->thd", weights / weights.sum(-1, keepdims=True), v)


append = jax.jit(append_streaming)


@functools.partial(jax.jit, static_argnames="window")
def narrowed(ring, window, lengths):
    return ring.narrowed(window, lengths)


@pytest.mark.parametrize(("sink", "long", "short"), [(0, 6, 2), (3, 7, 4), (2, 5, 5)])
def test_a_narrowed_ring_holds_what_the_shorter_one_would(sink, long, short):
    lengths = np.arange(1, 3 * (sink + long) + 1)  # every length in one batch
    rows, longest = len(lengths), int(lengths[-1])
    k = random(rows, longest, 1, 4)
    start = np.zeros(rows, np.int32)
    wide = append(dirty_ring(rows, 4, sink, long), k, -k, Tokens(None, jnp.array(start), jnp.array(lengths)))
    got = narrowed(wide, short, lengths)
    assert got.window == short and got.sink == sink and got.k.shape == (rows, 1, sink + short, 4)
    for row, length in enumerate(lengths):
        held = {}
        for slot, position in enumerate(np.asarray(got.positions(jnp.array(lengths)))[row]):
            if position >= 0:
                held[int(position)] = slot
                np.testing.assert_array_equal(got.k[row, 0, slot], k[row, position, 0])
                np.testing.assert_array_equal(got.v[row, 0, slot], -k[row, position, 0])
        assert sorted(held) == [p for p in range(length) if p < sink or p >= length - short]
    with pytest.raises(ValueError, match=f"window={long + 1} must be at most the {long} of the ring"):
        wide.narrowed(long + 1, jnp.array(lengths))


@jax.jit
def prefill(q, k, v, ring, lengths, counts):
    tokens = Tokens(None, lengths, counts)
    after = append_streaming(ring, k, v, tokens)
    return streaming_prefill(q, k, v, ring, after, tokens), after


@jax.jit
def decode(q, k, v, ring, lengths):
    """Tokens [B, steps] one by one: all outputs in one call, since there are many steps."""

    def step(carry, token):
        ring, lengths = carry
        q, k, v = token
        ring = append_streaming(ring, k[:, None], v[:, None], Tokens(None, lengths, jnp.ones_like(lengths)))
        return (ring, lengths + 1), decode_attention(q, ring, lengths + 1)

    tokens = (x.swapaxes(0, 1) for x in (q, k, v))
    return jax.lax.scan(step, (ring, lengths), tuple(tokens))[1].swapaxes(0, 1)


def check(lengths, steps, sink, window, prefill_window, chunk, dim):
    """Prompts of these lengths in chunks, and as many steps: every output against the masked oracle."""
    lengths = np.array(lengths, np.int32)
    rows, row = len(lengths), np.arange(len(lengths))[:, None]
    total = int(lengths.max()) + max(steps, chunk)
    q, k, v = random(1, total, 2, dim), random(1, total, 1, dim, seed=1), random(1, total, 1, dim, seed=2)
    q, k, v = (np.repeat(x, rows, axis=0) for x in (q, k, v))  # one sequence, cut at different places
    ring, held, outs = (
        dirty_ring(rows, dim, sink, prefill_window),
        np.zeros(rows, np.int32),
        [[] for _ in row],
    )
    while (held < lengths).any():
        counts = np.clip(lengths - held, 0, chunk).astype(np.int32)
        after = (np.arange(chunk) >= counts[:, None])[..., None, None]
        take = held[:, None] + np.arange(chunk)
        pieces = (jnp.array(np.where(after, np.nan, x[row, take])) for x in (q, k, v))
        out, ring = prefill(*pieces, ring, held, counts)
        for i, count in enumerate(counts):
            outs[i].append(np.asarray(out)[i, :count])
        held = held + counts
    ring = narrowed(ring, window, lengths)
    take = lengths[:, None] + np.arange(steps)
    decoded = np.asarray(decode(*(jnp.array(x[row, take]) for x in (q, k, v)), ring, lengths))
    prompt, new = (dense(q[0], k[0, :, 0], v[0, :, 0], sink, w) for w in (prefill_window, window))
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(np.concatenate(outs[i]), prompt[:length], atol=3e-6)
        np.testing.assert_allclose(decoded[i], new[length : length + steps], atol=3e-6)
    assert np.abs(prompt[lengths - 1] - new[lengths - 1]).max() > 0.01 or prefill_window == window


def test_every_prompt_length_over_three_rings_and_three_turns():
    sink, window, prefill_window = 2, 5, 9
    check(range(1, 3 * (sink + prefill_window) + 1), 3 * window + 2, sink, window, prefill_window, 7, 8)


@pytest.mark.parametrize("prefill_window", [256, 512])
def test_lserves_sizes_over_three_turns_of_the_ring(prefill_window):
    """LServe's ring loses tokens of prompts of 257 to 384 tokens, and of others at each new page."""
    lengths = [100, 257, 258, 300, 320, 383, 384, 449, 700]
    check(lengths, 3 * 256 + 70, 128, 256, prefill_window, 192, 4)
