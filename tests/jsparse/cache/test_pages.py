"""Appending to the caches: any split of a prompt leaves what one append leaves; old contents never show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache.pages import PagedKVCache, append_paged
from jsparse.cache.ring import StreamingKVCache, append_streaming
from jsparse.cache.tokens import Tokens

PAGE, LOGICAL, HEADS, DIM = 64, 16, 2, 4
CAPACITY = 192
TABLE = jnp.array([[4, 1, 5], [0, 3, 2]])  # two sequences, pages in no order
LENGTHS = [(1, 15), (16, 17), (63, 64), (65, 130)]  # pairs that share a batch


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dirty_pool(fill, num_pages=7):
    zeros = PagedKVCache.zeros(
        num_pages, HEADS, DIM, page_size=PAGE, logical_page_size=LOGICAL, dtype=jnp.float32
    )
    return jax.tree.map(lambda x: jnp.full_like(x, fill), zeros)


append = jax.jit(append_paged)


def fill(cache, k, v, lengths, chunk):
    """Appends ragged prompts chunk by chunk, as generate does: shorter ones end early."""
    held = np.zeros(2, np.int32)
    while (held < lengths).any():
        counts = np.minimum(lengths - held, chunk).astype(np.int32)
        take = held[:, None] + np.arange(chunk)
        k_chunk, v_chunk = (np.take_along_axis(x, take[:, :, None, None] % CAPACITY, axis=1) for x in (k, v))
        cache = append(
            cache, jnp.array(k_chunk), jnp.array(v_chunk), Tokens(TABLE, jnp.array(held), jnp.array(counts))
        )
        held = held + counts
    return cache


@pytest.mark.parametrize("chunk", [1, 23, 80])
@pytest.mark.parametrize("dirt", [np.nan, 1e30])
def test_appending_pools_like_the_whole_prompt(chunk, dirt):
    k, v = random(2, CAPACITY, HEADS, DIM), random(2, CAPACITY, HEADS, DIM, seed=1)
    for lengths in LENGTHS:
        if chunk == 1 and max(lengths) > 70:
            continue  # the same steps again
        cache = fill(dirty_pool(dirt), k, v, np.array(lengths), chunk)
        for row, length in enumerate(lengths):
            for name, tokens in (("k", k), ("v", v)):
                held = (
                    np.asarray(getattr(cache, name))[TABLE[row]].swapaxes(0, 1).reshape(HEADS, CAPACITY, DIM)
                )
                np.testing.assert_array_equal(held[:, :length], tokens[row, :length].swapaxes(0, 1))
                assert not np.isclose(held[:, length:], tokens[row, length:].swapaxes(0, 1)).any()
            for name, reduce in (("k_min", np.min), ("k_max", np.max)):
                bounds = np.asarray(getattr(cache, name))[TABLE[row]].swapaxes(0, 1).reshape(HEADS, -1, DIM)
                for page, start in enumerate(range(0, length, LOGICAL)):
                    keys = k[row, start : min(start + LOGICAL, length)]
                    np.testing.assert_array_equal(bounds[:, page], reduce(keys, axis=0))
        # Page 6 belongs to nobody.
        assert all(
            np.array_equal(x[6], np.full_like(x[6], dirt), equal_nan=True) for x in jax.tree.leaves(cache)
        )


def test_a_cache_without_bounds_holds_the_same_keys():
    k, v = random(2, CAPACITY, HEADS, DIM), random(2, CAPACITY, HEADS, DIM, seed=1)
    plain = PagedKVCache.zeros(7, HEADS, DIM, page_size=PAGE, logical_page_size=None, dtype=jnp.float32)
    assert plain.k_min is None and plain.logical_page_size is None
    full = fill(dirty_pool(0.0), k, v, np.array([65, 130]), 80)
    plain = fill(plain, k, v, np.array([65, 130]), 80)
    np.testing.assert_array_equal(plain.k, full.k)
    np.testing.assert_array_equal(plain.v, full.v)


@pytest.mark.parametrize(("sink", "window"), [(0, 5), (3, 4), (2, 1)])
def test_the_ring_holds_the_sink_and_the_window(sink, window):
    length = sink + 3 * window + 2
    k = random(2, length, HEADS, DIM)
    step = jax.jit(append_streaming)
    for chunk in (1, 3, 11):  # shorter and longer than the window
        zeros = StreamingKVCache.zeros(2, HEADS, DIM, sink=sink, window=window, dtype=jnp.float32)
        cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), zeros)
        for start in range(0, length, chunk):
            piece = np.zeros((2, chunk, HEADS, DIM), np.float32)
            count = min(chunk, length - start)
            piece[:, :count] = k[:, start : start + count]
            # The second sequence stops at half of it.
            counts = [count, min(max(length // 2 - start, 0), count)]
            held = jnp.array([start, min(start, length // 2)])
            cache = step(cache, jnp.array(piece), jnp.array(-piece), Tokens(None, held, jnp.array(counts)))
            assert cache.k.shape == (2, HEADS, sink + window, DIM)
        ends = [length, length // 2]
        positions = np.asarray(cache.positions(jnp.array(ends)))
        for row, end in enumerate(ends):
            seen = [p for p in range(end) if p < sink or p >= end - window]
            assert sorted(positions[row][positions[row] >= 0].tolist()) == seen
            for slot, position in enumerate(positions[row]):
                if position >= 0:
                    np.testing.assert_array_equal(cache.k[row, :, slot], k[row, position])
                    np.testing.assert_array_equal(cache.v[row, :, slot], -k[row, position])


def test_an_empty_ring_holds_nothing():
    cache = StreamingKVCache.zeros(1, 1, 4, sink=2, window=3, dtype=jnp.float32)
    assert cache.positions(jnp.array([0])).tolist() == [[-1] * 5]
    assert cache.positions(jnp.array([1])).tolist() == [[0, -1, -1, -1, -1]]


def test_caches_are_pytrees_of_distinct_buffers():
    paged = PagedKVCache.zeros(2, 1, 4, page_size=4, logical_page_size=2, dtype=jnp.float32)
    ring = StreamingKVCache.zeros(2, 1, 4, sink=1, window=3, dtype=jnp.float32)
    leaves = jax.tree.leaves((paged, ring))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) == 5
    assert jax.tree.map(lambda x: x.shape, ring).k == (2, 1, 4, 4)  # placeholders of any kind pass through
    assert (paged.page_size, paged.logical_page_size, ring.window) == (4, 2, 3)


def test_sizes_that_do_not_fit_are_refused():
    make = functools.partial(PagedKVCache.zeros, 2, 1, 4, page_size=64, dtype=jnp.float32)
    for logical in (0, 10, 128):
        with pytest.raises(ValueError, match=f"logical_page_size={logical} must divide page_size=64"):
            make(logical_page_size=logical)
    with pytest.raises(ValueError, match="sink=-1"):
        StreamingKVCache.zeros(1, 1, 4, sink=-1, window=4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="window=0"):
        StreamingKVCache.zeros(1, 1, 4, sink=1, window=0, dtype=jnp.float32)
