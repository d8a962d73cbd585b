"""Attention over the caches against dense attention in float64, masked as the cache should show it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache import LayerKVCache, PagedKVCache, StreamingKVCache, append_paged, append_streaming
from jsparse.decode import attend_and_append, decode_attention, paged_attention
from jsparse.masks import causal, streaming
from jsparse.select import select_pages

PAGE, LOGICAL, DIM = 8, 4, 8


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(q, k, v, masks):
    """One sequence in float64: q [T, Hq, D], k and v [S, Hk, D], a TokenMask for each KV head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_len, q_heads, dim = q.shape
    kv_len, kv_heads, _ = k.shape
    out = np.zeros_like(q)
    for h in range(q_heads):
        kv = h * kv_heads // q_heads
        scores = q[:, h] @ k[:, kv].T / np.sqrt(dim)
        visible = masks[kv](np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len))
        weights = np.exp(np.where(visible, scores, -np.inf) - scores.max())
        out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
    return out


def nan_layer(batch, kv_heads, pages, streaming_heads, sink=3, window=5, logical=LOGICAL):
    """A layer's cache whose pools and rings hold NaN, as if recycled from a broken sequence."""
    paged = ring = None
    if len(streaming_heads) < kv_heads:
        retrieval = kv_heads - len(streaming_heads)
        paged = PagedKVCache.zeros(
            batch * pages, retrieval, DIM, page_size=PAGE, logical_page_size=logical, dtype=jnp.float32
        )
    if streaming_heads:
        ring = StreamingKVCache.zeros(
            batch, len(streaming_heads), DIM, sink=sink, window=window, dtype=jnp.float32
        )
    layer = LayerKVCache(paged, ring, streaming_heads)
    table = np.random.default_rng(5).permutation(batch * pages).reshape(batch, pages)
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), layer), jnp.array(table)


step = jax.jit(attend_and_append, static_argnames="budget")
append = jax.jit(append_paged)
select = jax.jit(select_pages, static_argnames=("budget", "page_size"))
decode = jax.jit(decode_attention, static_argnames="scale")


def run(q, k, v, layer, table, lengths, chunk):
    """Ragged prompts through the cache in chunks: a list of what each sequence got, and the cache."""
    held = np.zeros(len(lengths), np.int32)
    outs = [[] for _ in lengths]
    while (held < lengths).any():
        counts = np.minimum(lengths - held, chunk).astype(np.int32)
        take = np.minimum(held[:, None] + np.arange(chunk), q.shape[1] - 1)[:, :, None, None]
        pieces = (jnp.array(np.take_along_axis(x, take, axis=1)) for x in (q, k, v))
        out, layer = step(*pieces, layer, table, jnp.array(held), jnp.array(counts))
        for row, count in enumerate(counts):
            outs[row].append(np.asarray(out)[row, :count])
        held = held + counts
    return [np.concatenate(out) for out in outs], layer


@pytest.mark.parametrize("streaming_heads", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_prompts_in_chunks_are_masked_dense_attention(streaming_heads, chunk):
    # Lengths around the sink, the window, pages and several turns of the ring; a row of padding has length 0.
    total = 32
    q, k, v = random(6, total, 6, DIM), random(6, total, 3, DIM, seed=1), random(6, total, 3, DIM, seed=2)
    lengths = np.array([1, 8, 9, 17, 32, 0])
    layer, table = nan_layer(6, 3, total // PAGE, streaming_heads)
    outs, _ = run(q, k, v, layer, table, lengths, chunk)
    masks = [streaming(3, 5) if h in streaming_heads else causal() for h in range(3)]
    for row, length in enumerate(lengths):
        if length:
            expected = dense(q[row, :length], k[row, :length], v[row, :length], masks)
            np.testing.assert_allclose(outs[row], expected, atol=2e-6)
        else:
            assert outs[row].size == 0


def test_every_prompt_length_then_decode_over_three_turns_of_the_ring():
    sink, window, chunk, rows = 2, 6, 5, 20
    total = rows + 3 * window
    q, k, v = random(1, total, 2, DIM), random(1, total, 1, DIM, seed=1), random(1, total, 1, DIM, seed=2)
    q, k, v = (np.repeat(x, rows, axis=0) for x in (q, k, v))
    lengths = np.arange(1, rows + 1)  # every prompt length in one batch
    layer, table = nan_layer(rows, 1, 1, (0,), sink, window)
    outs, layer = run(q, k, v, layer, table, lengths, chunk)
    expected = dense(q[0], k[0], v[0], [streaming(sink, window)])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(outs[row], expected[:length], atol=2e-6)
    held, row = lengths, np.arange(rows)
    for _ in range(3 * window):
        pieces = (jnp.array(x[row, held][:, None]) for x in (q, k, v))
        out, layer = step(*pieces, layer, table, jnp.array(held), jnp.ones(rows, jnp.int32))
        np.testing.assert_allclose(out[:, 0], expected[held], atol=2e-6)
        held = held + 1
    assert layer.streaming.k.shape == (rows, 1, sink + window, DIM) and layer.paged is None


def test_a_ring_as_long_as_the_sequence_is_dense():
    q, k, v = random(1, 20, 4, DIM), random(1, 20, 2, DIM, seed=1), random(1, 20, 2, DIM, seed=2)
    layer, table = nan_layer(1, 2, 1, (0, 1), sink=8, window=12)
    outs, _ = run(q, k, v, layer, table, np.array([20]), 6)
    np.testing.assert_allclose(outs[0], dense(q[0], k[0], v[0], [causal()] * 2), atol=2e-6)


def paged_sequences(lengths, pages, kv_heads=2, seed=1):
    k, v = (
        random(2, pages * PAGE, kv_heads, DIM, seed=seed),
        random(2, pages * PAGE, kv_heads, DIM, seed=seed + 1),
    )
    layer, table = nan_layer(2, kv_heads, pages, ())
    cache = append(layer.paged, jnp.array(k), jnp.array(v), table, jnp.zeros(2, jnp.int32), lengths)
    return k, v, cache, table


def test_decode_reads_the_listed_pages_and_no_others():
    lengths = jnp.array([37, 22])
    k, v, cache, table = paged_sequences(lengths, pages=6)
    q = random(2, 4, DIM)
    pages = jnp.array([[[0, 3, 4], [1, 2, 4]], [[0, 2, -1], [1, 2, -1]]])
    listed = np.zeros((12, 2), bool)
    for row in range(2):
        for head in range(2):
            listed[[int(table[row, page]) for page in pages[row, head] if page >= 0], head] = True
    # What is not listed for a head is NaN.
    poisoned = jax.tree.map(lambda x: jnp.where(listed[:, :, None, None], x, jnp.nan), cache)
    out = np.asarray(decode(jnp.array(q), poisoned, lengths, table, pages=pages))
    for row, length in enumerate([37, 22]):
        for head in range(2):
            seen = [p for p in range(length) if p // PAGE in pages[row, head].tolist()]
            expected = dense(
                q[row, None, 2 * head : 2 * head + 2],
                k[row, seen, head, None],
                v[row, seen, head, None],
                [causal()],
            )
            np.testing.assert_allclose(out[row, 2 * head : 2 * head + 2], expected[0], atol=2e-6)


def test_a_budget_over_the_context_is_dense_to_the_bit():
    lengths = jnp.array([37, 22])
    _, _, cache, table = paged_sequences(lengths, pages=6)
    q = jnp.array(random(2, 4, DIM))
    k_min, k_max = (x[table].swapaxes(1, 2) for x in (cache.k_min, cache.k_max))
    pages = select(q, k_min, k_max, lengths, budget=48, page_size=PAGE)
    assert pages.tolist() == [[[0, 1, 2, 3, 4, -1]] * 2, [[0, 1, 2, -1, -1, -1]] * 2]
    selected = decode(q, cache, lengths, table, pages=pages)
    np.testing.assert_array_equal(selected, decode(q, cache, lengths, table))


def test_a_small_budget_finds_the_needle():
    # One key points along the query, the others are small: the page that holds it is all that matters.
    q = np.ones((1, 1, 2, DIM), np.float32)
    k, v = 0.1 * random(1, 64, 1, DIM), random(1, 64, 1, DIM, seed=1)
    k[0, 19] = 8.0
    layer, table = nan_layer(1, 1, 8, ())
    cache = append(
        layer.paged, *map(jnp.array, (k[:, :63], v[:, :63])), table, jnp.array([0]), jnp.array([63])
    )
    layer = LayerKVCache(cache, None)
    last = [jnp.array(x[:, 63:]) for x in (k, v)]
    full, _ = step(jnp.array(q), *last, layer, table, jnp.array([63]), jnp.array([1]))
    sparse, _ = step(jnp.array(q), *last, layer, table, jnp.array([63]), jnp.array([1]), budget=2 * PAGE)
    np.testing.assert_allclose(sparse, full, atol=1e-6)
    lost, _ = step(jnp.array(q), *last, layer, table, jnp.array([63]), jnp.array([1]), budget=PAGE)
    assert np.abs(np.asarray(lost) - np.asarray(full)).max() > 0.1


def test_many_blocks_of_pages_and_queries_at_any_offset():
    # More keys than one step of the loop visits, and a batch whose rows stand at different places.
    lengths = np.array([1000, 613])
    k, v = random(2, 1024, 1, DIM, seed=1), random(2, 1024, 1, DIM, seed=2)
    zeros = PagedKVCache.zeros(2 * 64, 1, DIM, page_size=16, logical_page_size=None, dtype=jnp.float32)
    table = jnp.array(np.random.default_rng(0).permutation(128).reshape(2, 64))
    cache = append(zeros, jnp.array(k), jnp.array(v), table, jnp.array([0, 0]), jnp.array(lengths))
    q = random(2, 9, 3, DIM)
    out = paged_attention(jnp.array(q), cache, table, jnp.array(lengths) - 9, jnp.array(lengths))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            out[row], dense(q[row], k[row, :length], v[row, :length], [causal()]), atol=2e-6
        )


def test_bfloat16_caches_stay_within_rounding():
    lengths = jnp.array([37, 22])
    k, v, cache, table = paged_sequences(lengths, pages=6)
    q = random(2, 4, DIM)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cache)
    out = decode(jnp.array(q).astype(jnp.bfloat16), narrow, lengths, table)
    assert out.dtype == jnp.bfloat16
    for row, length in enumerate([37, 22]):
        expected = dense(q[row, None], k[row, :length], v[row, :length], [causal()] * 2)[0]
        error = np.linalg.norm(np.asarray(out[row], np.float64) - expected) / np.linalg.norm(expected)
        assert error < 2e-2


def test_a_scale_replaces_the_default():
    ring = StreamingKVCache.zeros(1, 1, DIM, sink=0, window=4, dtype=jnp.float32)
    k, v = jnp.array(random(1, 4, 1, DIM)), jnp.array(random(1, 4, 1, DIM, seed=1))
    ring = append_streaming(ring, k, v, jnp.array([0]), jnp.array([4]))
    q = jnp.array(random(1, 1, DIM, seed=2))
    unscaled = decode(q, ring, jnp.array([4]), scale=1.0)
    np.testing.assert_allclose(unscaled, decode(q * DIM**0.5, ring, jnp.array([4])), atol=1e-6)


def test_arguments_that_do_not_go_together_are_refused():
    paged = PagedKVCache.zeros(2, 2, DIM, page_size=PAGE, logical_page_size=None, dtype=jnp.float32)
    ring = StreamingKVCache.zeros(1, 2, DIM, sink=1, window=2, dtype=jnp.float32)
    table, one = jnp.array([[0, 1]]), jnp.array([1])
    with pytest.raises(ValueError, match="3 heads, which is no multiple of the 2 KV heads"):
        decode_attention(jnp.ones((1, 3, DIM)), paged, one, table)
    with pytest.raises(ValueError, match="needs page_table"):
        decode_attention(jnp.ones((1, 2, DIM)), paged, one)
    with pytest.raises(ValueError, match="no pages"):
        decode_attention(jnp.ones((1, 2, DIM)), ring, one, table)


def test_a_decode_step_holds_selected_pages_not_the_pool():
    pool = PagedKVCache.zeros(4096, 1, DIM, page_size=PAGE, logical_page_size=None, dtype=jnp.float32)
    table = jnp.arange(4096)[None]
    lowered = jax.jit(decode_attention).lower(
        jnp.ones((1, 1, DIM)), pool, jnp.array([30000]), table, pages=jnp.array([[[7, 3749]]])
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < pool.k.nbytes / 100
