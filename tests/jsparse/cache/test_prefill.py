"""Prompts whose blocks are estimated: any chunks give what one gives, from dirty pages, quantised or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import PooledBlocks, VerticalSlash
from jsparse.cache.layer import LayerKVCache, attend_and_append
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.quantize import dequantize, quantize
from jsparse.cache.tokens import Tokens

BLOCK, SEGMENT, PAGE, DIM, HEADS, KV_HEADS = 4, 8, 8, 8, 4, 2
LENGTHS, CAPACITY = np.array([47, 17, 32, 0], np.int32), 48
SMALL = {
    "bounds": PooledBlocks(3 * BLOCK, "bounds", BLOCK),
    "vertical-slash": VerticalSlash(2 * BLOCK, BLOCK, last_queries=3, block=BLOCK, segment=SEGMENT),
}
COVERING = {
    "mean": PooledBlocks(CAPACITY, "mean", BLOCK),
    "vertical-slash": VerticalSlash(CAPACITY, BLOCK, last_queries=3, block=BLOCK, segment=SEGMENT),
}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def tokens():
    rows = len(LENGTHS)
    q, k, v = (random(rows, CAPACITY, n, DIM, seed=i) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    k[:, 5] *= 4  # some keys draw many queries
    return 2 * q, k, v


def empty(bits=None):
    """Pages recycled from a broken sequence; the table names some pages that are not there."""
    rows, pages = len(LENGTHS), CAPACITY // PAGE
    pool = PagedKVCache.zeros(
        rows * pages, KV_HEADS, DIM, page_size=PAGE, logical_page_size=4, dtype=jnp.float32, bits=bits
    )
    pool = jax.tree.map(lambda x: jnp.full_like(x, -1 if x.dtype == jnp.int8 else jnp.nan), pool)
    table = np.random.default_rng(5).permutation(rows * pages).reshape(rows, pages).astype(np.int32)
    table = np.where(np.arange(pages) * PAGE < LENGTHS[:, None] + 4, table, 10**6)
    return LayerKVCache(pool, None), table


step = jax.jit(attend_and_append, static_argnames="estimate")


def prefilled(tokens, layer, table, chunk, estimate, lengths=LENGTHS):
    """What each sequence got, and the cache; NaN where a chunk has no token."""
    held, outs = np.zeros(len(lengths), np.int32), [[np.zeros((0, HEADS, DIM))] for _ in lengths]
    while (held < lengths).any():
        counts = np.clip(lengths - held, 0, chunk).astype(np.int32)
        take = np.minimum(held[:, None] + np.arange(chunk), CAPACITY - 1)[..., None, None]
        after = (np.arange(chunk) >= counts[:, None])[..., None, None]
        pieces = (jnp.array(np.where(after, np.nan, np.take_along_axis(x, take, 1))) for x in tokens)
        out, layer = step(*pieces, layer, Tokens(*map(jnp.asarray, (table, held, counts))), estimate=estimate)
        for row, count in enumerate(counts):
            outs[row].append(np.asarray(out)[row, :count])
        held = held + counts
    return [np.concatenate(out) for out in outs], layer


def dense(q, k, v, visible=None):
    """One sequence in float64; ``visible`` [Hq, T, T] beside the causal mask."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    mask = np.tril(np.ones(scores.shape[1:], bool))
    mask = mask if visible is None else mask & visible[:, : len(q), : len(q)]
    weights = np.where(mask, np.exp(scores - scores.max()), 0)
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


@functools.partial(jax.jit, static_argnums=0)
def block_mask(estimate, q, k):
    return estimate.block_mask(q, k, counts=LENGTHS)


def listed(estimate, q, k):
    """[B, Hq, T, T]: the tokens in the blocks that the estimate lists for whole prompts."""
    mask = block_mask(estimate, q, k)
    count = np.asarray(mask.kv_count)
    index = np.asarray(mask.kv_index).reshape(*count.shape, -1)
    blocks = np.zeros((*count.shape, count.shape[2]), bool)
    for place in np.ndindex(count.shape):
        blocks[(*place, index[place][: count[place]])] = True
    return blocks.repeat(BLOCK, 2).repeat(BLOCK, 3)


@pytest.mark.parametrize("name", SMALL)
def test_prompts_in_chunks_get_what_their_whole_lists_give(tokens, name):
    outs, _ = prefilled(tokens, *empty(), 16, SMALL[name])
    visible = listed(SMALL[name], *tokens[:2])
    for row, length in enumerate(LENGTHS[:3]):
        prompt = [x[row, :length] for x in tokens]
        np.testing.assert_allclose(outs[row], dense(*prompt, visible=visible[row]), atol=1e-5)
        if length > 20:  # something was left out
            assert np.abs(outs[row] - dense(*prompt)).max() > 0.01


@pytest.mark.parametrize("name", COVERING)
def test_a_budget_over_the_prompt_is_dense(tokens, name):
    outs, _ = prefilled(tokens, *empty(), 16, COVERING[name])
    for row, length in enumerate(LENGTHS[:3]):
        np.testing.assert_allclose(outs[row], dense(*(x[row, :length] for x in tokens)), atol=5e-6)


def test_a_quantised_prompt_reads_its_codes_however_it_is_cut(tokens):
    """The chunk's own keys too: else the cut would decide which keys are exact."""
    estimate, bits = SMALL["bounds"], 4
    outs, _ = prefilled(tokens, *empty(bits), 16, estimate)
    whole, _ = prefilled(tokens, *empty(bits), CAPACITY, estimate)
    stored = (tokens[0], *(np.asarray(dequantize(quantize(jnp.array(x), bits), bits)) for x in tokens[1:]))
    visible = listed(estimate, *stored[:2])
    for row, length in enumerate(LENGTHS[:3]):
        np.testing.assert_allclose(outs[row], whole[row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            outs[row], dense(*(x[row, :length] for x in stored), visible=visible[row]), atol=1e-5
        )


def test_prefill_then_decode_is_all_prefill(tokens):
    """From codes: what decoding reads of a prompt is what the prompt itself read."""
    expected, _ = prefilled(tokens, *empty(bits=8), 16, None)
    stored = (tokens[0], *(np.asarray(dequantize(quantize(jnp.array(x), 8), 8)) for x in tokens[1:]))
    for row, length in enumerate(LENGTHS[:3]):
        np.testing.assert_allclose(expected[row], dense(*(x[row, :length] for x in stored)), atol=1e-5)
    steps = 9
    held = np.maximum(LENGTHS - steps, 0)  # a row of 0 tokens stays empty
    layer, table = empty(bits=8)
    _, layer = prefilled(tokens, layer, table, 16, None, held)
    for _ in range(steps):
        counts = (held < LENGTHS).astype(np.int32)
        place = np.arange(len(LENGTHS)), np.minimum(held, CAPACITY - 1)
        out, layer = step(
            *(jnp.array(x[place][:, None]) for x in tokens),
            layer,
            Tokens(*map(jnp.asarray, (table, held, counts))),
        )
        for row in np.flatnonzero(counts):
            np.testing.assert_allclose(out[row, 0], expected[row][held[row]], atol=1e-5)
        held = held + counts
    np.testing.assert_array_equal(held, LENGTHS)
