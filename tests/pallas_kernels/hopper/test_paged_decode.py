"""The decode kernel, interpreted with the race detector on, against dense attention in float64."""

import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache.quantize import dequantize, quantize

if jax.__version_info__ < (0, 12):
    pytest.skip("the interpreter of Mosaic GPU kernels needs jax >= 0.12", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from jsparse.pallas_kernels.hopper.paged_decode import (
    SHARED_MEMORY,
    SYSTEM_MEMORY,
    DecodeTiles,
    all_tiles,
    combine,
    decode_tiles,
    num_splits,
    paged_decode,
    shape_limit,
    shared_memory,
)
from jsparse.pallas_kernels.lists import HEAD_DIMS

NUM_PAGES, KV_HEADS = 9, 2
FLOAT32 = 1e-5  # relative, norm-wise
NARROW = 2e-2


@functools.partial(jax.jit, static_argnames=("scale", "splits", "tiles"))
def run(q, k, v, pages, used, *, scale=None, splits=None, tiles=None):
    interpreter = plgpu.InterpretGPUParams(detect_races=True)  # a race raises
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return paged_decode(q, k, v, pages, used, scale=scale, splits=splits, tiles=tiles, interpret=interpreter)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pools(page_size, dim, form, dtype=jnp.float32, num_pages=NUM_PAGES) -> tuple[Any, tuple[Any, Any]]:
    """Keys and values as the kernel takes them, and as float64: what it has to treat them as."""
    given, meant = [], []
    for n in range(2):
        x = jnp.array(random(num_pages, KV_HEADS, page_size, dim, seed=n + 1) + 0.5)
        if form == "float":
            x = x.astype(dtype)
            given.append(x)
        else:
            bits = int(form.removeprefix("int"))
            quantized = quantize(x, bits)
            given.append(tuple(quantized))
            x = dequantize(quantized, bits)
        meant.append(np.asarray(x, np.float64))
    return given, (meant[0], meant[1])


def poisoned(pool, pages, used):
    """The pool with NaN wherever no list of the KV head means a key; codes cannot be NaN and are 77."""
    meant = np.zeros((NUM_PAGES, KV_HEADS, jax.tree.leaves(pool)[0].shape[2]), bool)
    for b, head, n in np.ndindex(*pages.shape):
        if pages[b, head, n] >= 0:
            meant[pages[b, head, n], head, : used[b, head, n]] = True

    def poison(x):
        mask = meant.reshape(meant.shape + (1,) * (x.ndim - 3))
        return jnp.where(mask, x, 77 if x.dtype == jnp.int8 else jnp.nan)

    return jax.tree.map(poison, pool)


def dense(q, k, v, pages, used, scale=None):
    """out [B, Hq, D] and lse [B, Hq] (base 2) in float64."""
    q = np.asarray(q, np.float64)
    batch, q_heads, dim = q.shape
    out, lse = np.zeros_like(q), np.full((batch, q_heads), -np.inf)
    for b, h in np.ndindex(batch, q_heads):
        head = h * KV_HEADS // q_heads
        row = head % pages.shape[1]  # one list for all heads, or one for each
        lists = [(p, u) for p, u in zip(pages[b, row], used[b, row], strict=True) if p >= 0]
        keys, values = (np.concatenate([x[p, head, :u] for p, u in lists] or [x[0, 0, :0]]) for x in (k, v))
        if not len(keys):
            continue
        scores = keys @ q[b, h] * (dim**-0.5 if scale is None else scale)
        weights = np.exp(scores - scores.max())
        out[b, h] = weights @ values / weights.sum()
        lse[b, h] = (np.log(weights.sum()) + scores.max()) / np.log(2)
    return out, lse


def assert_close(actual, expected, tolerance):
    for x, y in zip(actual, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        assert (np.isfinite(x) == np.isfinite(y)).all()
        x, y = np.where(np.isfinite(y), x, 0), np.where(np.isfinite(y), y, 0)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def ragged_lists(page_size, n=5, seed=3):
    """A list for each sequence and KV head: full pages, tails, holes, a page of which nothing is meant."""
    rng = np.random.default_rng(seed)
    pages = np.stack([[rng.permutation(NUM_PAGES)[:n] for _ in range(KV_HEADS)] for _ in range(2)])
    pages = pages.astype(np.int32)
    used = np.full(pages.shape, page_size, np.int32)
    used[:, :, -1] = page_size // 2 + 1
    used[0, 0, 1] = 0
    pages[0, 1, [0, 2]] = -1
    pages[1, 0, 1:] = -1  # one page
    used[1, 0, 0] = 1  # of one token
    return pages, used


def check(form, page_size, dim, group, dtype=jnp.float32, tolerance=FLOAT32, **options):
    pages, used = ragged_lists(page_size)
    (k, v), meant = pools(page_size, dim, form, dtype)
    k, v = (poisoned(x, pages, used) for x in (k, v))
    q = jnp.array(random(2, KV_HEADS * group, dim)).astype(dtype)
    actual = run(q, k, v, jnp.array(pages), jnp.array(used), **options)
    assert all(x.dtype == jnp.float32 for x in actual)
    assert_close(actual, dense(q, *meant, pages, used), tolerance)


@pytest.mark.parametrize(
    ("form", "page_size", "dim"),
    [
        ("float", 16, 64),
        ("float", 32, 64),
        ("float", 64, 128),
        ("float", 128, 64),
        ("float", 96, 64),
        ("float", 8, 256),
        ("int8", 16, 64),
        ("int8", 64, 128),
        ("int8", 128, 256),
        ("int4", 32, 64),
        ("int4", 64, 128),
        ("int4", 96, 64),
        ("int4", 8, 256),
    ],
)
def test_ragged_lists_are_dense_attention_to_their_keys(form, page_size, dim):
    check(form, page_size, dim, group=2, splits=2)


@pytest.mark.parametrize(("form", "group"), [("float", 1), ("float", 3), ("float", 16), ("int4", 8)])
def test_any_group_of_query_heads_shares_a_kv_head(form, group):
    check(form, 64, 64, group, splits=1)


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_stay_within_their_rounding(form, dtype):
    check(form, 64, 64, group=4, dtype=dtype, tolerance=NARROW, splits=2)


@pytest.mark.parametrize(("form", "splits"), [("float", 1), ("float", 3), ("float", 11), ("int8", 5)])
def test_any_number_of_splits_gives_the_same(form, splits):
    # Up to more splits than steps, where some find nothing.
    check(form, 64, 64, group=2, splits=splits)


@pytest.mark.parametrize(("form", "keys"), [("float", 64), ("float", 128), ("int8", 64), ("int4", 128)])
def test_other_tiles_give_the_same(form, keys):
    check(form, 32, 64, group=2, splits=1, tiles=DecodeTiles(keys, stages=2, resident=1))


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_lists_without_a_key_give_zero_and_minus_infinity(form):
    pages, used = ragged_lists(64)
    pages[0], used[1] = -1, 0
    (k, v), _ = pools(64, 64, form)
    k, v = (poisoned(x, pages, used) for x in (k, v))
    out, lse = run(jnp.array(random(2, 4, 64)), k, v, jnp.array(pages), jnp.array(used), splits=2)
    np.testing.assert_array_equal(out, np.zeros((2, 4, 64)))
    np.testing.assert_array_equal(lse, np.full((2, 4), -np.inf))


def test_heads_may_share_one_list():
    pages, used = ragged_lists(64)
    pages, used = pages[:, :1], used[:, :1]
    (k, v), meant = pools(64, 64, "float")
    q = jnp.array(random(2, 4, 64))
    actual = run(q, k, v, jnp.array(pages), jnp.array(used), splits=2)
    assert_close(actual, dense(q, *meant, pages, used), FLOAT32)


@pytest.mark.parametrize("slots", [8, 72, 128])
def test_a_ring_is_a_pool_of_one_page_a_sequence(slots):
    # The last tile of 72 slots reaches beyond them; copies beyond an array bring zeros.
    (k, v), meant = pools(slots, 64, "float", num_pages=3)
    pages = np.arange(3, dtype=np.int32)[:, None, None]
    used = np.array([slots, slots // 2 + 1, 0], np.int32)[:, None, None]
    empty = (np.arange(slots) >= used[:, :, :1])[..., None]
    k, v = (jnp.where(empty, jnp.nan, x) for x in (k, v))
    q = jnp.array(random(3, 4, 64))
    actual = run(q, k, v, jnp.array(pages), jnp.array(used), splits=2)
    assert_close(actual, dense(q, *meant, pages, used), FLOAT32)


def test_large_scores_and_a_scale():
    pages, used = ragged_lists(64)
    (k, v), meant = pools(64, 64, "float")
    q = jnp.array(random(2, 4, 64)) * 30
    actual = run(q, k, v, jnp.array(pages), jnp.array(used), scale=1.5, splits=2)
    assert_close(actual, dense(q, *meant, pages, used, scale=1.5), FLOAT32)


@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data(), form=st.sampled_from(["float", "int4"]))
def test_random_lists(data, form):
    entries = (2, KV_HEADS, 6)
    count = int(np.prod(entries))
    numbers = lambda low, high: st.lists(st.integers(low, high), min_size=count, max_size=count)  # noqa: E731
    pages = np.array(data.draw(numbers(-1, NUM_PAGES - 1)), np.int32).reshape(entries)
    used = np.array(data.draw(numbers(0, 16)), np.int32).reshape(entries)
    (k, v), meant = pools(16, 64, form)
    k, v = (poisoned(x, pages, used) for x in (k, v))
    q = jnp.array(random(2, 4, 64))
    actual = run(q, k, v, jnp.array(pages), jnp.array(used), splits=2)
    assert_close(actual, dense(q, *meant, pages, used), FLOAT32)


def test_combine_is_attention_to_the_union():
    scores, values = random(2, 5, 30) * 9, random(30, 8)
    # Unequal parts, one of them empty for all and one for a single head.
    scores[0, 3, 20:] = -np.inf
    outs, lses = [], []
    for start, end in ((0, 4), (4, 4), (4, 20), (20, 30)):
        weights = np.exp2(scores[..., start:end].astype(np.float64))
        total = weights.sum(-1)
        outs.append(weights @ values[start:end] / np.where(total == 0, 1, total)[..., None])
        with np.errstate(divide="ignore"):
            lses.append(np.log2(total))
    out, lse = combine(jnp.array(outs, jnp.float32).transpose(1, 0, 3, 2), jnp.array(lses).swapaxes(0, 1))
    weights = np.exp2(scores.astype(np.float64))
    total = weights.sum(-1)
    assert_close((out, lse), (weights @ values / total[..., None], np.log2(total)), 1e-6)


def test_combine_of_nothing_is_nothing():
    out, lse = combine(jnp.zeros((3, 8, 4)), jnp.full((3, 4), -jnp.inf))
    np.testing.assert_array_equal(out, np.zeros((4, 8)))
    np.testing.assert_array_equal(lse, np.full(4, -np.inf))


@hypothesis.given(
    batch=st.integers(1, 300),
    kv_heads=st.integers(1, 64),
    steps=st.integers(1, 5000),
    slots=st.integers(1, 600),
)
def test_splits_keep_the_chip_busy(batch, kv_heads, steps, slots):
    splits, lists = num_splits(batch, kv_heads, steps, slots), batch * kv_heads
    assert 1 <= splits <= steps
    rounds = -(-lists * splits // slots)
    if steps >= max(8, slots // lists) and slots >= 100:
        assert lists * splits >= 0.8 * rounds * slots
    if lists * splits > slots:
        assert splits <= 8  # what does not fit at once anyway is not cut ever finer


def test_one_sequence_fills_an_h200():
    # 4096 listed keys of 8 KV heads, in steps of 64.
    assert 8 * num_splits(1, 8, 64, 132 * decode_tiles(128, 16).resident) >= 132


def test_tiles_fit_the_shared_memory_they_are_made_for():
    listed = all_tiles()
    assert len(set(listed)) == len(listed) == len(HEAD_DIMS) * 3 * 2
    for head_dim, bits, group, tiles in listed:
        assert tiles.keys == 64 and tiles.stages >= 2
        assert tiles.resident * (shared_memory(tiles, head_dim, bits, group) + SYSTEM_MEMORY) <= SHARED_MEMORY
        assert decode_tiles(head_dim, bits, group) == tiles


@pytest.mark.parametrize(
    ("q", "pool", "limit"),
    [
        (((1, 8, 128), jnp.bfloat16), ((4, 8, 64, 128), jnp.bfloat16), None),
        (((1, 8, 128), jnp.float32), ((4, 8, 64, 128), jnp.float32), "queries, not float32"),
        (((1, 8, 128), jnp.bfloat16), ((4, 8, 64, 128), jnp.float32), "queries' bfloat16, not float32"),
        (((1, 8, 128), jnp.bfloat16), ((4, 8, 64, 128), jnp.int8), "queries' bfloat16, not int8"),
        (((1, 8, 96), jnp.bfloat16), ((4, 8, 64, 96), jnp.bfloat16), r"head_dim \(64, 128, 256\), not 96"),
        (((1, 8, 128), jnp.bfloat16), ((4, 8, 48, 128), jnp.bfloat16), "tokens, not 48"),
        (((1, 8, 128), jnp.bfloat16), ((4, 8, 100, 128), jnp.bfloat16), "tokens, not 100"),
        (((1, 34, 128), jnp.bfloat16), ((4, 2, 64, 128), jnp.bfloat16), "16 query heads per KV head, not 17"),
    ],
)
def test_shapes_that_do_not_fit_are_named(q, pool, limit: str | None):
    found = shape_limit(jnp.zeros(*q), jnp.zeros(*pool))
    assert found is None if limit is None else re.search(limit, str(found))


def test_codes_come_with_a_scale_and_a_zero():
    q, scale = jnp.zeros((1, 8, 128), jnp.float16), jnp.zeros((4, 8, 64))
    for stored_dim in (128, 64):
        assert shape_limit(q, (jnp.zeros((4, 8, 64, stored_dim), jnp.int8), scale, scale)) is None
    limit = shape_limit(q, (jnp.zeros((4, 8, 64, 128), jnp.uint8), scale, scale))
    assert limit == "the decode kernel takes int8 codes, not uint8"
