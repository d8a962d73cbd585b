"""Guards: sparse must stay a good deal faster than our own dense path, on whatever machine the tests run.

Ratios of alternated calls and never absolute times, each call of one side right after one of the other: what
slows the machine down slows both. Bounds are loose: they fail where blocks are no longer skipped or something
is copied or computed without need, not where something is a fifth slower. How fast it is, a benchmark says
(``python benchmarks/cpu``).
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse
from jsparse.cache.decode import decode_attention
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.select.best import select_pages
from jsparse.masks.block_mask import build_block_mask
from jsparse.masks.bounds import page_bounds


def median_ratio(ours: Callable, dense: Callable, rounds: int) -> float:
    """The median over the rounds of the ratio of one call each; two calls before do not count."""

    def seconds(call: Callable) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    for call in (ours, dense, ours, dense):
        jax.block_until_ready(call())
    return statistics.median(seconds(ours) / seconds(dense) for _ in range(rounds))


@pytest.fixture(scope="module")
def qkv():
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((1, 8192, 1, 64), np.float32)) for _ in range(3)]


def attend(mask, *, backward: bool) -> Callable:
    def run(q, k, v):
        return jsparse.attention(q, k, v, mask, implementation="xla")

    if backward:
        return jax.jit(jax.grad(lambda q, k, v: run(q, k, v).sum(), argnums=(0, 1, 2)))
    return jax.jit(run)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_streaming_takes_a_third_of_the_time_of_dense_at_8k(qkv, backward):
    """Backward a sixth, or nearly a fifth with jax 0.10; forward a tenth. 4k is too close to any bound."""
    ours = attend(jsparse.streaming(sink=64, window=256), backward=backward)
    dense = attend(jsparse.causal(), backward=backward)
    assert median_ratio(lambda: ours(*qkv), lambda: dense(*qkv), rounds=7) < 1 / 3


@pytest.fixture(scope="module")
def cache():
    """16384 tokens in pages of 64, of 2 KV heads of 64, with bounds of 16; and a query of 8 heads."""
    random = np.random.default_rng(1)
    k, v = (jnp.asarray(random.standard_normal((256, 2, 64, 64), np.float32)) for _ in range(2))
    bounds = jnp.concatenate(page_bounds(k, 16), axis=-1)
    q = jnp.asarray(random.standard_normal((1, 8, 64), np.float32))
    return q, PagedKVCache(k, v, bounds), jnp.array([16384]), jnp.arange(256)[None]


def choose(q, cache, lengths):
    return select_pages(q, jnp.swapaxes(cache.bounds, 0, 1)[None], lengths, budget=2048, page_size=64)


def test_a_chosen_list_takes_half_the_time_of_the_whole_cache_at_16k(cache):
    q, pool, lengths, table = cache

    @jax.jit
    def sparse(q, pool, lengths, table):
        pages = choose(q, pool, lengths)
        return decode_attention(q, pool, lengths, table, pages=pages, implementation="xla")

    @jax.jit
    def dense(q, pool, lengths, table):
        return decode_attention(q, pool, lengths, table, implementation="xla")

    arguments = (q, pool, lengths, table)
    assert median_ratio(lambda: sparse(*arguments), lambda: dense(*arguments), rounds=31) < 0.5


def test_block_lists_are_made_much_faster_than_they_are_attended():
    """At 32768 tokens, where a T x T array of them would take seconds: milliseconds."""
    mask = jsparse.streaming(sink=64, window=256)

    def lists():
        return build_block_mask(mask, 32768, 32768, 128, 128).kv_index

    def all_pairs_of_blocks():
        block = np.arange(32768 // 8)
        return (block[:, None] >= block) & (block[:, None] - block < 32)

    assert median_ratio(lists, all_pairs_of_blocks, rounds=7) < 0.5
