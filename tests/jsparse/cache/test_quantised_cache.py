"""Pages of int8 and int4 codes: what they hold, what attention makes of them, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache.decode import decode_attention
from jsparse.cache.pages import PagedKVCache, append_paged
from jsparse.cache.quantize import quantize
from jsparse.cache.tokens import Tokens
from jsparse.masks.bounds import page_scores

PAGE, LOGICAL, HEADS, DIM = 64, 16, 2, 8
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 130]
ROWS, CAPACITY = len(LENGTHS), 192
TABLE = np.random.default_rng(0).permutation(ROWS * CAPACITY // PAGE).reshape(ROWS, -1).astype(np.int32)
BITS = pytest.mark.parametrize("bits", [8, 4])
KERNEL = pytest.param(
    4,
    "mosaic_gpu_interpret",
    marks=pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax < 0.12 cannot interpret Mosaic GPU"),
)


def random(*shape, seed=0):
    """Values whose vectors have ranges, and places of them, of their own."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * rng.exponential(size=(*shape[:-1], 1)) + 1).astype(np.float32)


def dirty_pool(bits, dim=DIM, rows=ROWS, page=PAGE):
    """Pages recycled from a broken sequence: codes of all bits, and NaN for scales, zeros and bounds."""
    cache = PagedKVCache.zeros(
        rows * CAPACITY // PAGE,
        HEADS,
        dim,
        page_size=page,
        logical_page_size=LOGICAL,
        dtype=jnp.float32,
        bits=bits,
    )
    return jax.tree.map(lambda x: jnp.full_like(x, -1 if x.dtype == jnp.int8 else jnp.nan), cache)


append = jax.jit(append_paged)


def filled(cache, k, v, lengths, chunk, table=TABLE):
    """Ragged prompts, chunk by chunk, with NaN where a chunk has no token."""
    held, lengths = np.zeros(len(lengths), np.int32), np.array(lengths)
    while (held < lengths).any():
        counts = np.clip(lengths - held, 0, chunk).astype(np.int32)
        take = (held[:, None] + np.arange(chunk))[:, :, None, None]
        after = np.arange(chunk)[:, None, None] >= counts[:, None, None, None]
        pieces = (
            jnp.array(np.where(after, np.nan, np.take_along_axis(x, take % x.shape[1], axis=1)))
            for x in (k, v)
        )
        cache = append(cache, *pieces, Tokens(*map(jnp.asarray, (table, held, counts))))
        held = held + counts
    return cache


def values_of(stored, bits):
    """The values of codes in float64, by an unpacking of the test's own."""
    codes, scale, zero = (np.asarray(x) for x in stored)
    codes = codes.astype(np.int32)
    if bits == 4:
        halves = np.concatenate([codes & 15, codes >> 4 & 15], axis=-1)
        codes = np.where(halves >= 8, halves - 16, halves)
    return scale.astype(np.float64)[..., None] * (codes - zero.astype(np.float64)[..., None])


def in_order(pool, row, length, table=TABLE):
    """[Hk, length, ...]: what a sequence's pages hold, token by token."""
    pages = np.asarray(pool)[table[row]].swapaxes(0, 1)
    return pages.reshape(pages.shape[0], -1, *pages.shape[3:])[:, :length]


@pytest.fixture(scope="module")
def tokens():
    return random(ROWS, CAPACITY, HEADS, DIM), random(ROWS, CAPACITY, HEADS, DIM, seed=1)


@BITS
@pytest.mark.parametrize("chunk", [23, 130])
def test_appending_in_any_chunks_holds_each_token_within_half_a_step(tokens, bits, chunk):
    cache = filled(dirty_pool(bits), *tokens, lengths=LENGTHS, chunk=chunk)
    for stored, given in zip((cache.k, cache.v), tokens, strict=True):
        whole = jax.tree.map(np.asarray, quantize(jnp.array(given.swapaxes(1, 2)), bits))
        assert stored.codes.dtype == jnp.int8 and stored.scale.dtype == stored.zero.dtype == jnp.float32
        values = values_of(stored, bits)
        for row, length in enumerate(LENGTHS):
            given_row = given[row, :length].swapaxes(0, 1).astype(np.float64)
            step = np.ptp(given_row, axis=-1, keepdims=True) / (2**bits - 1)
            step = np.maximum(step, np.abs(given_row).max(axis=-1, keepdims=True) * 2.0**-16)
            # Half a step, and three roundings of half of float32's precision at the largest zero.
            assert (np.abs(in_order(values, row, length) - given_row) <= step * (0.5 + 3 * 2**-8)).all()
            for ours, one_shot in zip(stored, whole, strict=True):
                np.testing.assert_allclose(in_order(ours, row, length), one_shot[row, :, :length], rtol=1e-6)


@BITS
def test_bounds_are_of_the_keys_before_they_are_quantised(tokens, bits):
    k = tokens[0]
    cache = filled(dirty_pool(bits), *tokens, lengths=LENGTHS, chunk=23)
    for row, length in enumerate(LENGTHS):
        for name, reduce in (("k_min", np.min), ("k_max", np.max)):
            bounds = in_order(getattr(cache, name), row, -(-length // LOGICAL))
            for page, start in enumerate(range(0, length, LOGICAL)):
                keys = k[row, start : min(start + LOGICAL, length)]
                np.testing.assert_array_equal(bounds[:, page], reduce(keys, axis=0))


@BITS
def test_a_score_bounds_the_products_with_quantised_keys_up_to_half_a_step(tokens, bits):
    cache = filled(dirty_pool(bits), *tokens, lengths=LENGTHS, chunk=130)
    q = random(5, DIM, seed=3) - 1
    slack_needed = False
    for row, length in enumerate(LENGTHS):
        keys = in_order(values_of(cache.k, bits), row, length)
        steps = in_order(cache.k.scale, row, length)
        logical = -(-length // LOGICAL)
        k_min, k_max = (in_order(x, row, logical) for x in (cache.k_min, cache.k_max))
        scores = np.asarray(page_scores(q[:, None], jnp.array(k_min), jnp.array(k_max)), np.float64)
        for page in range(logical):
            inside = slice(page * LOGICAL, (page + 1) * LOGICAL)
            products = np.einsum("qd,hsd->qhs", q.astype(np.float64), keys[:, inside])
            slack = np.abs(q).sum(1)[:, None, None] * steps[:, inside] / 2
            assert (scores[..., page, None] >= products - slack - 1e-4).all()
            slack_needed |= bool((scores[..., page, None] < products - 1e-4).any())
    assert slack_needed  # of a page of one token, the bound without it is that token's own product


def expected(q, k, v, visible):
    """One query head over the visible tokens, in float64."""
    k, v = k[visible], v[visible]
    scores = k @ q.astype(np.float64) / np.sqrt(q.size)
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


decode = jax.jit(decode_attention, static_argnames="implementation")


@pytest.mark.parametrize(("bits", "implementation"), [(8, "xla"), (4, "xla"), KERNEL])
def test_attention_is_to_the_values_of_the_codes(bits, implementation):
    dim = DIM if implementation == "xla" else 64
    lengths, pages = np.array([40, 17]), np.array([[[0, 2, -1]] * HEADS, [[0, 1, -1]] * HEADS], np.int32)
    k, v = random(2, 48, HEADS, dim), random(2, 48, HEADS, dim, seed=1)
    table = np.array([[4, 1, 5], [0, 3, 99]], np.int32)  # no third page: this place may hold anything
    cache = filled(dirty_pool(bits, dim, 2, 16), k, v, lengths, 48, table)
    q = random(2, 2 * HEADS, dim, seed=2)
    values = [values_of(x, bits) for x in (cache.k, cache.v)]
    listed = pages if bits == 4 else None
    out = decode(q, cache, lengths, table, pages=listed, implementation=implementation)
    for row, length in enumerate(lengths):
        held = [in_order(x, row, length, np.minimum(table, 5)) for x in values]
        seen = np.arange(length)
        seen = seen if listed is None else seen[np.isin(seen // 16, listed[row, 0])]
        for h in range(2 * HEADS):
            oracle = expected(q[row, h], *(x[h // 2] for x in held), visible=seen)
            np.testing.assert_allclose(out[row, h], oracle, atol=1e-5)


@BITS
def test_the_memory_is_that_of_codes_scales_zeros_and_bounds(bits):
    cache = dirty_pool(bits)
    vectors = (ROWS * CAPACITY // PAGE) * HEADS * PAGE
    codes = 2 * vectors * DIM * bits // 8  # of keys and values
    scales_and_zeros = 2 * vectors * 2 * 4
    bounds = vectors // LOGICAL * 2 * DIM * 4
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == codes + scales_and_zeros + bounds


def test_4_bits_take_an_even_head_dim():
    with pytest.raises(ValueError, match="7 dimensions: 4-bit codes take an even number"):
        PagedKVCache.zeros(1, 1, 7, page_size=16, logical_page_size=4, dtype=jnp.float32, bits=4)


# Vectors whose largest value rounds up to the highest code, or beyond it if anything is careless.
EXTREME = [
    np.full(DIM, 3.7),
    np.full(DIM, 0.0),
    np.full(DIM, -1e30),
    1e4 + np.linspace(0, 1, DIM),  # far from zero for its range
    -1e4 - np.linspace(0, 1e-3, DIM),
    np.where(np.arange(DIM) == 3, 1e6, np.linspace(-1, 1, DIM)),  # one outlier
    np.where(np.arange(DIM) == 0, -1e6, np.linspace(-1, 1, DIM)),
    np.nextafter(np.linspace(0, 15, DIM), 16),
    np.linspace(-1 / 3, 2 / 3, DIM),
]


@BITS
def test_no_value_wraps_around(bits):
    x = np.array(EXTREME, np.float32)[None, :, None].repeat(HEADS, 2)
    cache = PagedKVCache.zeros(
        1, HEADS, DIM, page_size=16, logical_page_size=None, dtype=jnp.float32, bits=bits
    )
    count = np.array([len(EXTREME)], np.int32)
    tokens = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.array(count))
    cache = append(cache, x, -x, tokens)
    x = x[0].swapaxes(0, 1).astype(np.float64)
    for stored, given in ((cache.k, x), (cache.v, -x)):
        got = values_of(stored, bits)[0, :, : len(EXTREME)]
        largest = np.abs(given).max(axis=-1, keepdims=True)
        assert np.isfinite(got).all()
        assert (stored.scale[0, :, : len(EXTREME), None] >= largest * 2.0**-16 * (1 - 1e-6)).all()
        step = np.maximum(np.ptp(given, axis=-1, keepdims=True) / (2**bits - 1), largest * 2.0**-16)
        constant = np.ptp(given, axis=-1, keepdims=True) == 0
        assert (np.abs(got - given) <= np.where(constant, 0, step * (0.5 + 3 * 2**-8))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_cache_that_is_not_quantised_holds_the_very_numbers(dtype):
    """LServe's unquantised models got int8 caches with scales of 1 all the same."""
    k = jnp.array(random(1, 16, HEADS, DIM), dtype)
    cache = PagedKVCache.zeros(2, HEADS, DIM, page_size=16, logical_page_size=4, dtype=dtype)
    zero = jnp.zeros(1, jnp.int32)
    cache = append(cache, k, -k, Tokens(jnp.ones((1, 1), jnp.int32), zero, zero + 16))
    assert cache.bits is None and {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(cache.k[1].swapaxes(0, 1), k[0])
    np.testing.assert_array_equal(cache.v[1].swapaxes(0, 1), -k[0])
