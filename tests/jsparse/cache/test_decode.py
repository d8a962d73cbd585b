"""Attention over the caches against dense attention in float64, masked as the cache should show it."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jsparse.cache.layer
from jsparse.cache.decode import decode_attention, paged_attention
from jsparse.cache.layer import LayerKVCache, attend_and_append
from jsparse.cache.pages import PagedKVCache, append_paged
from jsparse.cache.quantize import dequantize, quantize
from jsparse.cache.ring import StreamingKVCache, append_streaming
from jsparse.cache.select.best import select_pages
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens
from jsparse.masks.token_mask import causal, streaming

needs_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax >= 0.11.2")
PAGE, LOGICAL, DIM = 8, 4, 8
# On a machine with a GPU: JSPARSE_TEST_IMPLEMENTATION=mosaic_gpu, in half precision only.
INTERPRETED = pytest.param(
    "mosaic_gpu_interpret",
    marks=pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax < 0.12 cannot interpret Mosaic GPU"),
)
ON_DEVICE = os.environ.get("JSPARSE_TEST_IMPLEMENTATION")
IMPLEMENTATIONS = [ON_DEVICE] if ON_DEVICE else ["xla", INTERPRETED]


def fit(implementation):
    """(dim, dtype, relative error) that an implementation is tested with; kernels take head_dim 64 and up."""
    if implementation == "mosaic_gpu":
        return 64, jnp.bfloat16, 2e-2
    return (DIM if implementation == "xla" else 64), jnp.float32, 1e-5


def assert_close(actual, expected, tolerance):
    actual = np.asarray(actual, np.float64)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


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


def nan_layer(
    batch, kv_heads, pages, streaming_heads, sink=3, window=5, logical=LOGICAL, dim=DIM, dtype=jnp.float32
):
    """A layer's cache whose pools and rings hold NaN, as if recycled from a broken sequence."""
    paged = ring = None
    if len(streaming_heads) < kv_heads:
        retrieval = kv_heads - len(streaming_heads)
        paged = PagedKVCache.zeros(
            batch * pages, retrieval, dim, page_size=PAGE, logical_page_size=logical, dtype=dtype
        )
    if streaming_heads:
        ring = StreamingKVCache.zeros(batch, len(streaming_heads), dim, sink=sink, window=window, dtype=dtype)
    layer = LayerKVCache(paged, ring, streaming_heads)
    table = np.random.default_rng(5).permutation(batch * pages).reshape(batch, pages)
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), layer), jnp.array(table)


step = jax.jit(attend_and_append, static_argnames=("selection", "estimate"))
append = jax.jit(append_paged)
select = jax.jit(select_pages, static_argnames=("budget", "page_size"))
decode = jax.jit(decode_attention, static_argnames=("scale", "implementation"))


def run(q, k, v, layer, table, lengths, chunk):
    """Ragged prompts through the cache in chunks: a list of what each sequence got, and the cache."""
    held = np.zeros(len(lengths), np.int32)
    outs = [[] for _ in lengths]
    while (held < lengths).any():
        counts = np.minimum(lengths - held, chunk).astype(np.int32)
        take = np.minimum(held[:, None] + np.arange(chunk), q.shape[1] - 1)[:, :, None, None]
        pieces = (jnp.array(np.take_along_axis(x, take, axis=1)) for x in (q, k, v))
        out, layer = step(*pieces, layer, Tokens(table, jnp.array(held), jnp.array(counts)))
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
        out, layer = step(*pieces, layer, Tokens(table, jnp.array(held), jnp.ones(rows, jnp.int32)))
        np.testing.assert_allclose(out[:, 0], expected[held], atol=2e-6)
        held = held + 1
    assert layer.streaming.k.shape == (rows, 1, sink + window, DIM) and layer.paged is None


def test_a_ring_as_long_as_the_sequence_is_dense():
    q, k, v = random(1, 20, 4, DIM), random(1, 20, 2, DIM, seed=1), random(1, 20, 2, DIM, seed=2)
    layer, table = nan_layer(1, 2, 1, (0, 1), sink=8, window=12)
    outs, _ = run(q, k, v, layer, table, np.array([20]), 6)
    np.testing.assert_allclose(outs[0], dense(q[0], k[0], v[0], [causal()] * 2), atol=2e-6)


def paged_sequences(lengths, pages, kv_heads=2, seed=1, dim=DIM, dtype=jnp.float32):
    k, v = (
        jnp.array(random(2, pages * PAGE, kv_heads, dim, seed=seed), dtype),
        jnp.array(random(2, pages * PAGE, kv_heads, dim, seed=seed + 1), dtype),
    )
    layer, table = nan_layer(2, kv_heads, pages, (), dim=dim, dtype=dtype)
    cache = append(layer.paged, k, v, Tokens(table, jnp.zeros(2, jnp.int32), lengths))
    return k, v, cache, table


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_reads_the_listed_pages_and_no_others(implementation):
    dim, dtype, tolerance = fit(implementation)
    lengths = jnp.array([37, 22])
    k, v, cache, table = paged_sequences(lengths, pages=6, dim=dim, dtype=dtype)
    q = jnp.array(random(2, 4, dim), dtype)
    pages = jnp.array([[[0, 3, 4], [1, 2, 4]], [[0, 2, -1], [-1, 2, 1]]])
    listed = np.zeros((12, 2), bool)
    for row in range(2):
        for head in range(2):
            listed[[int(table[row, page]) for page in pages[row, head] if page >= 0], head] = True
    # What is not listed for a head is NaN.
    poisoned = jax.tree.map(lambda x: jnp.where(listed[:, :, None, None], x, jnp.nan), cache)
    out = decode(q, poisoned, lengths, table, pages=pages, implementation=implementation)
    assert out.dtype == dtype
    expected = np.zeros((2, 4, dim))
    for row, length in enumerate([37, 22]):
        for head in range(2):
            seen = [p for p in range(length) if p // PAGE in pages[row, head].tolist()]
            group = slice(2 * head, 2 * head + 2)
            expected[row, group] = dense(
                q[row, None, group],
                k[row, jnp.array(seen), head, None],
                v[row, jnp.array(seen), head, None],
                [causal()],
            )[0]
    assert_close(out, expected, tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_without_a_list_reads_every_page_of_each_sequence(implementation):
    dim, dtype, tolerance = fit(implementation)
    lengths = jnp.array([41, 1])
    k, v, cache, table = paged_sequences(lengths, pages=6, dim=dim, dtype=dtype)
    table = table.at[1, 1:].set(10**6)  # no token, no page: these places of a table may hold anything
    q = jnp.array(random(2, 4, dim), dtype)
    out = decode(q, cache, lengths, table, implementation=implementation)
    expected = [
        dense(q[row, None], k[row, :n], v[row, :n], [causal()] * 2)[0] for row, n in enumerate([41, 1])
    ]
    assert_close(out, np.array(expected), tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decode_of_a_ring_sees_the_sink_and_the_window(implementation):
    dim, dtype, tolerance = fit(implementation)
    # Before the sink is full, before the ring is, after one turn and a bit more.
    lengths = [0, 1, 3, 6, 8, 13, 20]
    rows = len(lengths)
    k, v = (jnp.array(random(rows, 20, 2, dim, seed=seed), dtype) for seed in (1, 2))
    layer, _ = nan_layer(rows, 2, 1, (0, 1), dim=dim, dtype=dtype)
    ring = append_streaming(
        layer.streaming, k, v, Tokens(None, jnp.zeros(rows, jnp.int32), jnp.array(lengths))
    )
    q = jnp.array(random(rows, 6, dim), dtype)
    out = decode(q, ring, jnp.array(lengths), implementation=implementation)
    np.testing.assert_array_equal(out[0], np.zeros((6, dim)))
    expected = [
        dense(q[row, None], k[row, :n], v[row, :n], [streaming(3, 5)] * 2)[0]
        for row, n in enumerate(lengths)
        if n
    ]
    assert_close(out[1:], np.array(expected), tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_budget_over_the_context_is_dense_to_the_bit(implementation):
    dim, dtype, _ = fit(implementation)
    lengths = jnp.array([37, 22])
    _, _, cache, table = paged_sequences(lengths, pages=6, dim=dim, dtype=dtype)
    q = jnp.array(random(2, 4, dim), dtype)
    pages = select(q, cache.bounds[table].swapaxes(1, 2), lengths, budget=48, page_size=PAGE)
    assert pages.tolist() == [[[0, 1, 2, 3, 4, -1]] * 2, [[0, 1, 2, -1, -1, -1]] * 2]
    selected = decode(q, cache, lengths, table, pages=pages, implementation=implementation)
    np.testing.assert_array_equal(selected, decode(q, cache, lengths, table, implementation=implementation))


def test_a_small_budget_finds_the_needle():
    # One key points along the query, the others are small: the page that holds it is all that matters.
    q = np.ones((1, 1, 2, DIM), np.float32)
    k, v = 0.1 * random(1, 64, 1, DIM), random(1, 64, 1, DIM, seed=1)
    k[0, 19] = 8.0
    layer, table = nan_layer(1, 1, 8, ())
    cache = append(
        layer.paged, *map(jnp.array, (k[:, :63], v[:, :63])), Tokens(table, jnp.array([0]), jnp.array([63]))
    )
    layer = LayerKVCache(cache, None)
    last = [jnp.array(x[:, 63:]) for x in (k, v)]
    full, _ = step(jnp.array(q), *last, layer, Tokens(table, jnp.array([63]), jnp.array([1])))
    sparse, _ = step(
        jnp.array(q),
        *last,
        layer,
        Tokens(table, jnp.array([63]), jnp.array([1])),
        selection=Selection(2 * PAGE),
    )
    np.testing.assert_allclose(sparse, full, atol=1e-6)
    lost, _ = step(
        jnp.array(q), *last, layer, Tokens(table, jnp.array([63]), jnp.array([1])), selection=Selection(PAGE)
    )
    assert np.abs(np.asarray(lost) - np.asarray(full)).max() > 0.1


def test_many_blocks_of_pages_and_queries_at_any_offset():
    # More keys than one step of the loop visits, and a batch whose rows stand at different places.
    lengths = np.array([1000, 613])
    k, v = random(2, 1024, 1, DIM, seed=1), random(2, 1024, 1, DIM, seed=2)
    zeros = PagedKVCache.zeros(2 * 64, 1, DIM, page_size=16, logical_page_size=None, dtype=jnp.float32)
    table = jnp.array(np.random.default_rng(0).permutation(128).reshape(2, 64))
    cache = append(zeros, jnp.array(k), jnp.array(v), Tokens(table, jnp.array([0, 0]), jnp.array(lengths)))
    q = random(2, 9, 3, DIM)
    out = paged_attention(jnp.array(q), cache, table, jnp.array(lengths) - 9, jnp.array(lengths))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            out[row], dense(q[row], k[row, :length], v[row, :length], [causal()]), atol=2e-6
        )


def long_sequences(lengths, heads, page=64):
    """Keys and values of long sequences, and a cache of them in which all else is NaN."""
    rows, pages = len(lengths), -(-max(lengths) // page) + 3
    k, v = (random(rows, pages * page, heads, DIM, seed=seed) for seed in (1, 2))
    zeros = PagedKVCache.zeros(
        rows * pages, heads, DIM, page_size=page, logical_page_size=None, dtype=jnp.float32
    )
    dirty = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), zeros)
    table = jnp.array(np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages))
    return (
        k,
        v,
        append(dirty, jnp.array(k), jnp.array(v), Tokens(table, jnp.zeros(rows, int), jnp.array(lengths))),
        table,
    )


def test_single_queries_after_small_steps_and_large_ones():
    # Around the end of the small steps, and of the first large one.
    lengths = [300, 4095, 4096, 4097, 8193, 0]
    k, v, cache, table = long_sequences(lengths, heads=2)
    q = random(len(lengths), 4, DIM)
    out = decode(jnp.array(q), cache, jnp.array(lengths), table, implementation="xla")
    for row, length in enumerate(lengths):
        if length:
            expected = dense(q[row, None], k[row, :length], v[row, :length], [causal()] * 2)[0]
            np.testing.assert_allclose(out[row], expected, atol=2e-6)
    np.testing.assert_array_equal(out[-1], np.zeros((4, DIM)))
    every = jnp.broadcast_to(jnp.arange(table.shape[1]), (len(lengths), 2, table.shape[1]))
    listed = decode(jnp.array(q), cache, jnp.array(lengths), table, pages=every, implementation="xla")
    np.testing.assert_array_equal(listed, out)


def test_blocks_before_a_chunk_need_no_mask_to_give_the_same_bits():
    # With a row that has just begun, no block is visible to all queries, and all are masked.
    chunk, lengths = 9, [1600, 1200]
    k, v, cache, table = long_sequences(lengths, heads=1)
    q = jnp.array(random(2, chunk, 3, DIM))
    run = jax.jit(paged_attention)
    offsets = jnp.array(lengths) - chunk
    out = run(q, cache, table, offsets, jnp.array(lengths))
    for row, length in enumerate(lengths):
        expected = dense(q[row], k[row, :length], v[row, :length], [causal()])
        np.testing.assert_allclose(out[row], expected, atol=2e-6)
    beside_a_beginning = run(q, cache, table, offsets.at[1].set(0), jnp.array([lengths[0], chunk]))
    np.testing.assert_array_equal(beside_a_beginning[0], out[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_caches_of_half_precision_stay_within_rounding(dtype, implementation):
    dim, _, _ = fit(implementation)
    lengths = jnp.array([37, 22])
    k, v, cache, table = paged_sequences(lengths, pages=6, dim=dim, dtype=dtype)
    q = jnp.array(random(2, 4, dim), dtype)
    out = decode(q, cache, lengths, table, implementation=implementation)
    assert out.dtype == dtype
    for row, length in enumerate([37, 22]):
        assert_close(out[row], dense(q[row, None], k[row, :length], v[row, :length], [causal()] * 2)[0], 2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_replaces_the_default(implementation):
    dim, dtype, tolerance = fit(implementation)
    ring = StreamingKVCache.zeros(1, 1, dim, sink=0, window=8, dtype=dtype)
    k, v = jnp.array(random(1, 8, 1, dim), dtype), jnp.array(random(1, 8, 1, dim, seed=1), dtype)
    ring = append_streaming(ring, k, v, Tokens(None, jnp.array([0]), jnp.array([8])))
    q = jnp.array(random(1, 1, dim, seed=2), dtype)
    out = decode(q, ring, jnp.array([8]), scale=0.5, implementation=implementation)
    assert_close(out, dense(q * 0.5 * dim**0.5, k[0], v[0], [causal()])[0], tolerance)


@pytest.mark.parametrize("implementation", [x for x in IMPLEMENTATIONS if x != "xla"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_pages_are_attention_to_the_values_of_their_codes(bits, implementation):
    from jsparse.implementations.hopper import interpreter
    from jsparse.pallas_kernels.hopper.paged_decode import paged_decode

    dim, dtype, tolerance = fit(implementation)
    k, v = (quantize(jnp.array(random(6, 2, 64, dim, seed=seed)) + 0.5, bits) for seed in (1, 2))
    pages = jnp.array([[[4, 0, 2], [1, -1, 5]], [[3, -1, -1], [0, 1, 2]]], jnp.int32)
    used = jnp.array([[[64, 64, 7], [64, 64, 33]], [[1, 0, 0], [64, 0, 64]]], jnp.int32)
    q = jnp.array(random(2, 8, dim), dtype)
    run = jax.jit(
        functools.partial(
            paged_decode, scale=dim**-0.5, interpret=interpreter() if implementation != "mosaic_gpu" else None
        )
    )
    out, lse = run(q, tuple(k), tuple(v), pages, used)
    k, v = (np.asarray(dequantize(x, bits), np.float64) for x in (k, v))
    for row, head in np.ndindex(2, 2):
        listed = [(p, n) for p, n in zip(pages[row, head], used[row, head], strict=True) if p >= 0]
        keys, values = (np.concatenate([x[p, head, :n] for p, n in listed])[:, None] for x in (k, v))
        group = slice(4 * head, 4 * head + 4)
        assert_close(out[row, group], dense(q[row, None, group], keys, values, [causal()])[0], tolerance)
        scores = np.asarray(q[row, group], np.float64) @ keys[:, 0].T / np.sqrt(dim)
        assert_close(lse[row, group], np.log2(np.exp(scores).sum(-1)), tolerance)


@pytest.mark.parametrize("implementation", [x for x in IMPLEMENTATIONS if x != "xla"])
def test_single_tokens_of_a_layer_go_through_the_kernel(implementation, monkeypatch):
    dim, dtype, tolerance = fit(implementation)
    lengths, more, total = np.array([9, 15]), 2, 17
    q, k, v = (jnp.array(random(2, total, n, dim, seed=n), dtype) for n in (6, 3, 3))
    layer, table = nan_layer(2, 3, 4, (1,), dim=dim, dtype=dtype)
    _, layer = step(
        q[:, :15], k[:, :15], v[:, :15], layer, Tokens(table, jnp.zeros(2, jnp.int32), jnp.array(lengths))
    )
    kernel = functools.partial(decode_attention, implementation=implementation)
    monkeypatch.setattr(jsparse.cache.layer, "decode_attention", kernel)
    by_kernel = jax.jit(lambda *args: attend_and_append(*args))  # a function that was not traced before
    row = np.arange(2)
    for n in range(more):
        pieces = (x[row, lengths + n][:, None] for x in (q, k, v))
        out, layer = by_kernel(*pieces, layer, Tokens(table, jnp.array(lengths + n), jnp.ones(2, jnp.int32)))
        for b in row:
            end = int(lengths[b]) + n + 1
            expected = dense(q[b, :end], k[b, :end], v[b, :end], [causal(), streaming(3, 5), causal()])[-1]
            assert_close(out[b, 0], expected, tolerance)


def traced(kind, chunk=1, dtype=jnp.bfloat16, dim=128, page=64, group=4):
    """The program of one layer, half of whose KV heads stream, as it is traced for a device."""
    q, k = (jnp.zeros((2, chunk, heads, dim), dtype) for heads in (2 * group, 2))
    layer = LayerKVCache(
        PagedKVCache.zeros(8, 1, dim, page_size=page, logical_page_size=16, dtype=dtype),
        StreamingKVCache.zeros(2, 1, dim, sink=64, window=128, dtype=dtype),
        (1,),
    )
    table, lengths, counts = jnp.zeros((2, 4), jnp.int32), jnp.array([3, 70]), jnp.ones(2, jnp.int32)
    abstract = AbstractDevice(device_kind=kind, platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        run = jax.jit(lambda *args: attend_and_append(*args, selection=Selection(2 * page)))
        return str(run.trace(q, k, k, layer, Tokens(table, lengths, counts)).jaxpr)


@needs_kernels
def test_single_tokens_on_hopper_take_the_kernel_where_their_shapes_fit():
    kernel = "jsparse_paged_decode"
    found = traced("NVIDIA H200")
    assert found.count(f"name={kernel}") == 2  # pages, and the ring
    assert kernel not in traced("NVIDIA H200", chunk=2)
    assert kernel not in traced("NVIDIA H200", dtype=jnp.float32)
    assert kernel not in traced("NVIDIA H200", dim=96)
    assert kernel not in traced("NVIDIA H200", group=17)
    assert traced("NVIDIA H200", page=48).count(f"name={kernel}") == 1  # the ring alone
    assert kernel not in traced("NVIDIA B200")
    assert kernel not in traced("cpu")


@needs_kernels
def test_an_implementation_that_cannot_run_says_why():
    def call(implementation, dim=64, dtype=jnp.bfloat16, slots=64):
        ring = StreamingKVCache.zeros(1, 1, dim, sink=0, window=slots, dtype=dtype)
        decode_attention(jnp.zeros((1, 2, dim), dtype), ring, jnp.array([1]), implementation=implementation)

    with pytest.raises(NotImplementedError, match="'mosaic_gpu': the GPU kernels are for Hopper .* 'cpu'"):
        call("mosaic_gpu")
    abstract = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        with pytest.raises(NotImplementedError, match=r"head_dim \(64, 128, 256\), not 96"):
            call("mosaic_gpu", dim=96)
        with pytest.raises(NotImplementedError, match="bfloat16 and float16 queries, not float32"):
            call("mosaic_gpu", dtype=jnp.float32)
        with pytest.raises(NotImplementedError, match="from 64 tokens, not 100"):
            call("mosaic_gpu", slots=100)
    with pytest.raises(ValueError, match="implementation must be None or one of .* not 'triton'"):
        call("triton")


def test_arguments_that_do_not_go_together_are_refused():
    paged = PagedKVCache.zeros(2, 2, DIM, page_size=PAGE, logical_page_size=None, dtype=jnp.float32)
    ring = StreamingKVCache.zeros(1, 2, DIM, sink=1, window=2, dtype=jnp.float32)
    table, one = jnp.array([[0, 1]]), jnp.array([1])
    with pytest.raises(ValueError, match="3 heads, which is not a multiple of the 2 KV heads"):
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
    block = 512 * DIM * 4  # what a step of the loop holds of keys, and of values
    assert memory is not None and memory.temp_size_in_bytes < 3 * block < pool.k.nbytes / 20


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_vmap_over_batches(implementation, shared):
    """Two batches, of one pool of pages or each of its own."""
    dim, dtype, tolerance = fit(implementation)
    q = jnp.asarray(random(2, 2, 4, dim), dtype)
    k, v = (jnp.asarray(random(2, 8, 2, 16, dim, seed=seed), dtype) for seed in (1, 2))
    table = jnp.asarray(np.random.default_rng(3).permutation(8).reshape(2, 2, 2))
    lengths = jnp.array([[5, 30], [32, 17]])

    def attend(q, k, v, lengths, table, implementation=implementation):
        return decode_attention(q, PagedKVCache(k, v), lengths, table, implementation=implementation)

    if shared:
        k, v = k[0], v[0]
    mapped = jax.vmap(attend, (0, None if shared else 0, None if shared else 0, 0, 0))(
        q, k, v, lengths, table
    )
    for n in range(2):
        pool = (k, v) if shared else (k[n], v[n])
        alone = attend(q[n], *pool, lengths[n], table[n], implementation="xla")
        assert_close(mapped[n], np.asarray(alone, np.float64), tolerance)
