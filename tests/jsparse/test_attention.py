"""The conformance suite: every implementation of attention passes every case."""

import dataclasses
import functools
import inspect
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import BlockMask, TokenMask, attention, causal, shifted_groups, sliding_window, streaming
from jsparse.attention import _attention
from jsparse.implementations.xla import items, list_loop
from jsparse.masks.token_mask import HeadMasks

# On a machine with a GPU: JSPARSE_TEST_IMPLEMENTATION=mosaic_gpu, in half precision only.
INTERPRETED = pytest.param(
    "mosaic_gpu_interpret",
    marks=pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax < 0.12 cannot interpret Mosaic GPU"),
)
ON_DEVICE = os.environ.get("JSPARSE_TEST_IMPLEMENTATION")
IMPLEMENTATIONS = [ON_DEVICE] if ON_DEVICE else ["reference", "xla", INTERPRETED]
MIXED = [causal(), streaming(3, 20), shifted_groups(32, 16), sliding_window(1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """mask: token masks (one a query head), or a function that makes a BlockMask for the case."""

    mask: Any
    q_len: int = 70
    kv_len: int = 70
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    segments: bool = False
    scale: float | None = None
    unit: int = 1  # block sizes are a multiple of this

    def fit(self, implementation):
        """The same case for kernels whose blocks are of 64 tokens: longer, and fewer sequences."""
        if not implementation.startswith("mosaic_gpu"):
            return self
        batch = 2 if self.segments or getattr(self.mask, "batched", False) else 1
        q_len, kv_len = (n if n == 1 or n > 128 else 2 * n for n in (self.q_len, self.kv_len))
        return dataclasses.replace(self, q_len=q_len, kv_len=kv_len, batch=batch, unit=64)


def blocks(masks, block_q, block_kv):
    def make(_, case):
        sizes = (-(-size // case.unit) * case.unit for size in (block_q, block_kv))
        sizes = dict(zip(("block_q", "block_kv"), sizes, strict=True))
        return BlockMask.from_token_masks(masks, case.q_len, case.kv_len, **sizes)

    return make


def chosen(rows, batched, token_mask=TokenMask()):
    """Random lists of random lengths, some of them empty."""

    def make(rng, case):
        size = max(16, case.unit)
        num_q_blocks, num_kv_blocks = -(-case.q_len // size), -(-case.kv_len // size)
        shape = (case.batch,) * batched + (rows, num_q_blocks)
        index = np.argsort(rng.random((*shape, num_kv_blocks)), axis=-1)[..., :4]
        return BlockMask.from_indices(
            index,
            rng.integers(0, index.shape[-1] + 1, shape),
            q_len=case.q_len,
            kv_len=case.kv_len,
            block_q=size,
            block_kv=size,
            token_mask=token_mask,
        )

    make.batched = batched
    return make


CASES = {
    "causal": Case(causal()),
    "causal, whole blocks": Case(causal(), 64, 64),
    "one token": Case(causal(), 1, 1, batch=1),
    "one query, many keys": Case(MIXED, 1, 70),
    "more queries than keys": Case(MIXED, 70, 33),
    "a continuation": Case(MIXED, 33, 150),
    "mixed masks in small blocks": Case(blocks(MIXED, 8, 16), 70, 90),
    "blocks that divide nothing": Case(blocks(MIXED, 7, 9), 50, 64),
    "part of a group streams": Case([causal()] * 3 + [streaming(1, 4)] * 3, heads=6),
    "whole groups stream": Case([causal()] * 2 + [streaming(1, 4)] * 4, heads=6, kv_heads=3),
    "several blocks": Case([streaming(10, 130)] * 2 + [shifted_groups(128, 64)] * 2, 300, 400, batch=1),
    "packed documents": Case(MIXED, segments=True),
    "packed, T != S": Case(blocks(MIXED, 16, 8), 33, 90, segments=True),
    "multi-head": Case(causal(), kv_heads=4),
    "one KV head": Case(streaming(2, 9), kv_heads=1),
    "head_dim 40": Case(causal(), dim=40),
    "head_dim 256": Case(causal(), dim=256, batch=1),
    "scale": Case(causal(), scale=0.7),
    "chosen for all heads": Case(chosen(1, False), 70, 90),
    "chosen a KV head": Case(chosen(2, False), 70, 90, segments=True),
    "chosen a query head": Case(chosen(4, False), 70, 90),
    "chosen, fewer rows than KV heads": Case(chosen(2, False), 70, 90, heads=8, kv_heads=4),
    "chosen a sequence": Case(chosen(1, True), 70, 90, segments=True),
    "chosen a sequence and KV head": Case(chosen(2, True), 70, 90),
    "chosen a sequence and query head": Case(chosen(4, True, streaming(2, 30)), 70, 90),
}


def inputs(case, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(length, heads):
        return jnp.asarray(rng.normal(size=(case.batch, length, heads, case.dim)), dtype)

    q, k, v = draw(case.q_len, case.heads), draw(case.kv_len, case.kv_heads), draw(case.kv_len, case.kv_heads)
    mask: Any = case.mask
    if callable(mask) and not isinstance(mask, TokenMask):
        mask = mask(rng, case)
    ids = np.sort(rng.integers(0, 3, (case.batch, max(case.q_len, case.kv_len))), axis=1).astype(np.int32)
    segments = {"q_segment_ids": ids[:, -case.q_len :], "kv_segment_ids": ids[:, -case.kv_len :]}
    options = {"scale": case.scale} | (
        {name: jnp.asarray(x) for name, x in segments.items()} if case.segments else {}
    )
    cotangents = rng.normal(size=q.shape), rng.normal(size=q.shape[:3])
    return (q, k, v), mask, options, cotangents


def visible_pairs(mask, case, options):
    """[B, Hq, T, S], pair by pair from the definitions."""
    tokens = np.arange(case.q_len)[:, None] + case.kv_len - case.q_len, np.arange(case.kv_len)
    if isinstance(mask, BlockMask):
        visible = np.zeros((case.batch, case.heads, case.q_len, case.kv_len), bool)
        shape = case.batch, *mask.kv_start.shape[-2:]
        start, count = (np.broadcast_to(x, shape) for x in (mask.kv_start, mask.kv_count))
        rows = mask.head_rows or [h * shape[1] // case.heads for h in range(case.heads)]
        for b, h, i in np.ndindex(case.batch, case.heads, mask.num_q_blocks):
            for j in np.asarray(mask.kv_index)[start[b, rows[h], i] :][: count[b, rows[h], i]]:
                block = (
                    np.s_[i * mask.block_q : (i + 1) * mask.block_q],
                    np.s_[j * mask.block_kv : (j + 1) * mask.block_kv],
                )
                visible[b, h][block] = mask.token_masks[rows[h]](*tokens)[block]
    else:
        masks = [mask] * case.heads if isinstance(mask, TokenMask) else mask
        visible = np.broadcast_to(
            np.stack([m(*tokens) for m in masks]), (case.batch, case.heads, case.q_len, case.kv_len)
        )
    if case.segments:
        q_ids, kv_ids = np.asarray(options["q_segment_ids"]), np.asarray(options["kv_segment_ids"])
        visible = visible & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    return visible


def dense(q, k, v, visible, scale, d_out, d_lse):
    """out, lse, dq, dk, dv in float64 NumPy, with the gradients written out by hand."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    weights = np.exp(scale * np.einsum("bthd,bshd->bhts", q, keys)) * visible
    total = weights.sum(axis=-1)
    seen = total > 0
    weights = weights / np.where(seen, total, 1)[..., None]
    out = np.einsum("bhts,bshd->bthd", weights, values)
    lse = np.where(seen, np.log(np.where(seen, total, 1)), -np.inf).swapaxes(1, 2)

    d_weights = np.einsum("bthd,bshd->bhts", d_out, values)
    inner = (weights * d_weights).sum(axis=-1) - d_lse.swapaxes(1, 2)
    d_scores = scale * weights * (d_weights - inner[..., None])
    dq = np.einsum("bhts,bshd->bthd", d_scores, keys)
    dk = np.einsum("bhts,bthd->bshd", d_scores, q).reshape(*k.shape[:2], k.shape[2], group, -1).sum(axis=3)
    dv = np.einsum("bhts,bthd->bshd", weights, d_out).reshape(*k.shape[:2], k.shape[2], group, -1).sum(axis=3)
    return out, lse, dq, dk, dv


def run(qkv, mask, options, cotangents, implementation):
    """out, lse, dq, dk, dv; the gradient of lse is taken where it is finite."""
    d_out, d_lse = cotangents

    def loss(q, k, v, mask):
        out, lse = attention(q, k, v, mask, implementation=implementation, return_lse=True, **options)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, lse)

    traced = isinstance(jax.tree.leaves(mask)[0], jax.Array) if isinstance(mask, BlockMask) else False
    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=() if traced else 3)
    gradients, (out, lse) = step(
        *qkv, mask if traced or isinstance(mask, BlockMask | TokenMask) else tuple(mask)
    )
    return out, lse, *gradients


def assert_close(ours, expected, tolerances):
    for name, x, y, tolerance in zip(
        ("out", "lse", "dq", "dk", "dv"), ours, expected, tolerances, strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y), err_msg=name)
        error = np.linalg.norm(np.where(np.isneginf(x), 0, x - np.where(np.isneginf(y), 0, y)))
        assert error <= tolerance * max(np.linalg.norm(np.where(np.isneginf(y), 0, y)), 1e-3), (name, error)


FLOAT32 = (1e-5, 1e-5, 1e-4, 1e-4, 1e-4)
BFLOAT16 = (2e-2,) * 5


# The interpreter takes seconds for a case: these at every run, the others with the tests marked slow.
INTERPRETED_EVERY_TIME = ("causal", "several blocks", "packed, T != S", "chosen a KV head", "a continuation")


def conformance(names):
    for name in names:
        for implementation in IMPLEMENTATIONS:
            if implementation is INTERPRETED:
                slow = [] if name in INTERPRETED_EVERY_TIME else [pytest.mark.slow]
                yield pytest.param(name, *INTERPRETED.values, marks=[*INTERPRETED.marks, *slow])
            else:
                yield pytest.param(name, implementation)


@pytest.mark.parametrize(("name", "implementation"), list(conformance(CASES)))
def test_agrees_with_dense_float64(name, implementation):
    case = CASES[name].fit(implementation)
    dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    qkv, mask, options, cotangents = inputs(case, dtype)
    expected = dense(*qkv, visible_pairs(mask, case, options), case.scale, *cotangents)
    tolerances = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    assert_close(run(qkv, mask, options, cotangents, implementation), expected, tolerances)


@pytest.fixture
def in_many_steps(monkeypatch):
    """XLA in miniature: blocks as the mask has them, two or three to a step, and several chunks of items."""
    monkeypatch.setattr(items, "device_kind", lambda: "a device with no block sizes of its own")
    monkeypatch.setattr(list_loop, "_STEP_TOKENS", 32)
    monkeypatch.setattr(list_loop, "_MOST_STEP_TOKENS", 48)
    monkeypatch.setattr(list_loop, "_CHUNK_SCORES", 1 << 12)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "name",
    [
        "mixed masks in small blocks",
        "blocks that divide nothing",
        "packed, T != S",
        "chosen for all heads",
        "chosen a KV head",
        "chosen a sequence and query head",
    ],
)
def test_agrees_in_many_steps(name, in_many_steps):
    case = CASES[name]
    qkv, mask, options, cotangents = inputs(case)
    expected = dense(*qkv, visible_pairs(mask, case, options), case.scale, *cotangents)
    assert_close(run(qkv, mask, options, cotangents, "xla"), expected, FLOAT32)


def test_long_lists_take_several_steps_in_the_blocks_that_suit_a_cpu():
    case = Case([causal()] * 2 + [streaming(100, 1200)] * 2, 1300, 2100, batch=1)
    qkv, mask, options, cotangents = inputs(case)
    expected = dense(*qkv, visible_pairs(mask, case, options), case.scale, *cotangents)
    assert_close(run(qkv, mask, options, cotangents, "xla"), expected, FLOAT32)


def test_lists_that_say_less_than_their_token_mask_are_followed():
    case = Case(None, 64, 64)
    whole = BlockMask.from_token_masks(causal(), 64, 64, block_q=16, block_kv=16)
    mask = dataclasses.replace(whole, kv_count=np.ones_like(whole.kv_count))
    qkv, _, options, cotangents = inputs(case)
    expected = dense(*qkv, visible_pairs(mask, case, options), case.scale, *cotangents)
    assert_close(run(qkv, mask, options, cotangents, "xla"), expected, FLOAT32)


@pytest.mark.parametrize("group", [1, 3, 4, 16])
@pytest.mark.parametrize("by_key", [False, True])
def test_block_sizes_follow_what_a_query_sees(group, by_key):
    def sizes(mask, length=8192):
        return items.block_sizes(mask, length, length, group, by_key=by_key)

    own = {1: 128, 3: 32, 4: 32, 16: 16}[group]  # 128 rows of an item's own tokens, 16 tokens at least
    visited = {1: 64, 3: 16, 4: 16, 16: 16}[group]
    assert sizes(streaming(64, 256)) == sizes(sliding_window(1)) == ((visited, 128) if by_key else (own, 64))
    assert sizes(causal())[1] == sizes(shifted_groups(4096, 0))[1] == 512
    assert sizes(causal(), 100)[1] in (64, 128) and sizes(causal(), 1) == (16, 16)


@given(
    masks=st.lists(
        st.builds(
            TokenMask, st.integers(0, 9), st.none() | st.integers(1, 30), st.none() | st.integers(1, 30)
        ),
        min_size=2,
        max_size=2,
    ),
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    segments=st.booleans(),
)
@settings(max_examples=8)
def test_random_masks_lengths_and_blocks(masks, q_len, kv_len, sizes, segments):
    case = Case(blocks(masks, *sizes), q_len, kv_len, heads=2, segments=segments)
    qkv, mask, options, cotangents = inputs(case)
    expected = dense(*qkv, visible_pairs(mask, case, options), case.scale, *cotangents)
    assert_close(run(qkv, mask, options, cotangents, "xla"), expected, FLOAT32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("name", "implementation"),
    list(conformance(["mixed masks in small blocks", "chosen a sequence and KV head"])),
)
def test_agrees_in_half_precision(name, dtype, implementation):
    case = CASES[name].fit(implementation)
    qkv, mask, options, cotangents = inputs(case, dtype)
    expected = dense(*qkv, visible_pairs(mask, case, options), case.scale, *cotangents)
    ours = run(qkv, mask, options, cotangents, implementation)
    assert ours[0].dtype == ours[2].dtype == dtype and ours[1].dtype == jnp.float32
    assert_close(ours, expected, BFLOAT16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_traced_lists_give_what_known_lists_give(implementation):
    case = CASES["mixed masks in small blocks"].fit(implementation)
    qkv, mask, options, cotangents = inputs(
        case, jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    )
    known = run(qkv, mask, options, cotangents, implementation)
    traced = run(qkv, jax.tree.map(jnp.asarray, mask), options, cotangents, implementation)
    assert_close(traced, known, FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(implementation):
    case = Case(causal(), 40, 24).fit(implementation)
    dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    qkv, mask, options, (d_out, d_lse) = inputs(case, dtype)
    out, lse, dq, dk, dv = run(qkv, mask, options, (d_out, d_lse), implementation)
    blind = case.q_len - case.kv_len
    assert not out[:, :blind].any() and np.isneginf(lse[:, :blind]).all()
    assert not dq[:, :blind].any() and all(np.isfinite(x).all() for x in (dq, dk, dv))
    assert out[:, blind:].any()


@pytest.mark.parametrize(
    "masks", [[shifted_groups(16, 0), shifted_groups(16, 8)] * 2, causal(), streaming(4, 8)]
)
def test_no_output_depends_on_a_later_token(masks):
    q, k, v = inputs(Case(masks, 48, 48))[0]
    jacobian = jax.jacrev(lambda v: attention(q, k, v, masks)[0].sum((1, 2)))(v)
    reach = np.abs(jacobian[:, 0]).sum((2, 3))  # [query, key]
    assert not np.triu(reach, 1).any() and np.diag(reach).all()


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_blocks_that_are_not_listed_are_not_read(implementation):
    """NaN in blocks 2 to 4 reaches the one query block that lists them, whatever the others' lists hold."""
    size = 16 if implementation == "xla" else 64
    dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    (q, k, v), _, options, cotangents = inputs(Case(causal(), 6 * size, 6 * size, batch=1, heads=2), dtype)
    index = np.array([[[0, 1, 3]] * 5 + [[4, 3, 2]]])
    counts = np.array([[1, 2, 1, 2, 2, 3]])  # of unequal lengths: the longest keeps the others waiting
    mask = BlockMask.from_indices(index, counts, q_len=6 * size, kv_len=6 * size, block_q=size, block_kv=size)

    def poison(x):
        return x.at[:, 2 * size : 5 * size].set(jnp.nan)

    poisoned = run((q, poison(k), poison(v)), mask, options, cotangents, implementation)
    clean = run((q, k, v), mask, options, cotangents, implementation)
    for ours, expected in zip(poisoned[:3], clean[:3], strict=True):  # out, lse, dq
        np.testing.assert_array_equal(ours[:, : 5 * size], expected[:, : 5 * size])
        assert not np.isfinite(ours[:, 5 * size :]).any()
    for ours, expected in zip(poisoned[3:], clean[3:], strict=True):  # dk, dv
        np.testing.assert_array_equal(ours[:, : 2 * size], expected[:, : 2 * size])
        assert not np.any(ours[:, 5 * size :])


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporary_bytes(length):
        qkv = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (4, 2, 2)]
        masks = [causal()] * 2 + [streaming(64, 256)] * 2
        step = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, masks).sum(), (0, 1, 2)))
        analysis: Any = step.lower(*qkv).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long < 4.5 * short
    assert long < 16384**2  # a quarter of one T x T array of float32


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_composes_with_jit_vmap_checkpoint_and_scan(implementation):
    dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    qkv, masks, _, _ = inputs(Case([causal(), streaming(3, 20)], heads=2, kv_heads=1), dtype)
    attend = functools.partial(attention, implementation=implementation)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, masks).astype(jnp.float32) ** 2)

    def assert_same(ours):
        for x, y in zip(ours, expected, strict=True):
            np.testing.assert_allclose(x.reshape(y.shape), y, atol=1e-5)

    expected = jax.grad(loss, (0, 1, 2))(*qkv)
    # jax.checkpoint takes no effects, which the interpreter is made of: test_choice.py traces it for a GPU.
    if implementation != "mosaic_gpu_interpret":
        assert_same(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*qkv))

    def one(q, k, v):
        return attend(q[None], k[None], v[None], masks)[0]

    assert_same(jax.grad(lambda *qkv: jnp.sum(jax.vmap(one)(*qkv).astype(jnp.float32) ** 2), (0, 1, 2))(*qkv))
    grad_of_one = jax.grad(lambda *qkv: jnp.sum(one(*qkv).astype(jnp.float32) ** 2), (0, 1, 2))
    assert_same(jax.vmap(grad_of_one)(*qkv))
    body = lambda _, qkv: (None, jax.grad(loss, (0, 1, 2))(*qkv))  # noqa: E731
    assert_same(jax.lax.scan(body, None, tuple(x[None] for x in qkv))[1])


@pytest.mark.parametrize("implementation", ["xla", INTERPRETED])
def test_vmap_over_chosen_lists(implementation):
    """Lists, queries, or both mapped; lists for all sequences and lists a sequence."""
    size = 64
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 2, 2 * size, 2, 16)), jnp.float32)
    index = jnp.asarray([[[[0, 1], [1, 0]]], [[[1, 0], [0, 1]]]])  # [2, R, nq, M]
    count = jnp.asarray([[[1, 2]], [[0, 1]]])

    def attend(q, index, count, implementation=implementation):
        mask = BlockMask.from_indices(
            index, count, q_len=2 * size, kv_len=2 * size, block_q=size, block_kv=size
        )
        return attention(q, q, q, mask, implementation=implementation)

    def one_by_one(q, index, count):
        return jnp.stack([attend(*x, "xla") for x in zip(q, index, count, strict=True)])

    both = jax.vmap(attend)(q, index, count)
    np.testing.assert_allclose(both, one_by_one(q, index, count), atol=1e-5)
    lists_only = jax.vmap(attend, (None, 0, 0))(q[0], index, count)
    np.testing.assert_allclose(lists_only, one_by_one(q[:1].repeat(2, 0), index, count), atol=1e-5)
    a_sequence = jax.vmap(attend, (0, None, None))(q, index, count)
    np.testing.assert_allclose(a_sequence, jnp.stack([attend(x, index, count, "xla") for x in q]), atol=1e-5)


def test_a_second_call_compiles_nothing():
    compiled: Any = _attention
    (q, k, v), masks, _, _ = inputs(Case(MIXED))
    attention(q, k, v, masks)
    before = compiled._cache_size()
    attention(q + 1, k, v, [*MIXED])
    assert compiled._cache_size() == before

    for seed in range(2):
        lists = chosen(1, False)(np.random.default_rng(seed), Case(None))
        attention(q, k, v, lists)
    assert compiled._cache_size() == before + 1


def test_other_lengths_do_not_make_a_mask_compile_again():
    compiled: Any = _attention
    calls = [inputs(Case(MIXED, length, length))[:2] for length in (71, 50, 40, 71)]
    for (q, k, v), masks in calls[:-1]:
        attention(q, k, v, masks)
    before = compiled._cache_size()
    (q, k, v), masks = calls[-1]
    attention(q, k, v, masks)
    assert compiled._cache_size() == before


def test_a_block_mask_of_token_masks_is_laid_out_as_they_are():
    """On a CPU in blocks of its own; not once its lists may be others."""
    for masks in (causal(), tuple(MIXED)):
        head_masks = HeadMasks(masks, 70, 90)
        mask = BlockMask.from_token_masks(masks, 70, 90, block_q=8, block_kv=16)
        assert mask.exact == head_masks
        for ours, expected in zip(items.parts(mask, 4, 2), items.parts(head_masks, 4, 2), strict=True):
            assert (ours.q_heads, ours.kv_heads) == (expected.q_heads, expected.kv_heads)
            jax.tree.map(np.testing.assert_array_equal, ours.lists, expected.lists)
    assert dataclasses.replace(mask, kv_count=mask.kv_count).exact is None
    assert jax.tree.map(np.copy, mask).exact is None


def test_lists_of_the_implementations_do_not_drive_out_those_of_users():
    compiled: Any = _attention
    (q, k, v), _, _, _ = inputs(Case(causal()))
    attention(q, k, v, BlockMask.from_token_masks(causal(), 70, 70))
    before = compiled._cache_size()
    for length in range(80, 120):
        items.parts(HeadMasks(causal(), length, length), 4, 2)
    attention(q, k, v, BlockMask.from_token_masks(causal(), 70, 70))
    assert compiled._cache_size() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((2, 8, 4))}, r"q must be \[batch, tokens, heads, head_dim\]"),
        ({"q": jnp.zeros((2, 0, 4, 16))}, r"q must be .* no empty axis"),
        ({"q": jnp.zeros((2, 8, 3, 16))}, "multiple of the KV heads"),
        ({"q": jnp.zeros((3, 8, 4, 16))}, "agree in batch"),
        ({"v": jnp.zeros((2, 9, 2, 16))}, "k and v must have one shape"),
        ({"v": jnp.zeros((2, 8, 2, 16), jnp.bfloat16)}, "one floating dtype"),
        ({"mask": [causal()] * 3}, "one TokenMask per query head: 3 were given for 4 heads"),
        ({"mask": BlockMask.from_token_masks(causal(), 9, 8)}, "mask is for q_len=9, kv_len=8"),
        ({"q_segment_ids": jnp.zeros((2, 8), jnp.int32)}, "together or not at all"),
        (
            {"q_segment_ids": jnp.zeros((2, 7), jnp.int32), "kv_segment_ids": jnp.zeros((2, 8), jnp.int32)},
            r"q_segment_ids must be integers \[2, 8\]",
        ),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"q": jnp.zeros((2, 8, 4, 16)), "k": jnp.zeros((2, 8, 2, 16)), "v": jnp.zeros((2, 8, 2, 16))}
    arguments |= {"mask": causal()} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(attention)(**arguments)  # our own message, not that of the shape checker


def test_three_rows_do_not_fit_four_heads():
    mask = BlockMask.from_indices(
        np.zeros((3, 1, 1), int), np.ones((3, 1), int), q_len=8, kv_len=8, block_q=8, block_kv=8
    )
    with pytest.raises(ValueError, match="mask has 3 rows, which 4 query heads on 2 KV heads cannot share"):
        attention(jnp.zeros((1, 8, 4, 16)), jnp.zeros((1, 8, 2, 16)), jnp.zeros((1, 8, 2, 16)), mask)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax < 0.12 cannot interpret Mosaic GPU")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"implementation": "mosaic_gpu"}, r"for Hopper \(H100, H200\), and this device is 'cpu'"),
        ({"dim": 320}, "take head_dim up to 256, not 320"),
        ({"mask": blocks(causal(), 128, 48)}, "a multiple of 64 tokens, not block_kv=48"),
        ({"scale": -1.0}, "take a positive scale, not -1.0"),
    ],
)
def test_kernels_name_their_limits(change, message):
    case = dataclasses.replace(Case(causal()), **{k: x for k, x in change.items() if k != "implementation"})
    (q, k, v), mask, _, _ = inputs(case)
    implementation = change.get("implementation", "mosaic_gpu_interpret")
    with pytest.raises(NotImplementedError, match=f"implementation='{implementation}': .*{message}"):
        attention(q, k, v, mask, scale=case.scale, implementation=implementation)
    assert attention(q, k, v, mask, scale=case.scale).shape == q.shape  # the choice falls on XLA
