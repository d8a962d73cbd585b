"""The backward kernels under Mosaic's interpreter, with its race detector, against autodiff in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import TokenMask, causal, shifted_groups, sliding_window, streaming

if jax.__version_info__ < (0, 12):
    pytest.skip("the interpreter of Mosaic GPU kernels needs jax >= 0.12", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsparse.pallas_kernels.hopper.backward_keys import backward_keys
from jsparse.pallas_kernels.hopper.backward_queries import backward_queries
from jsparse.pallas_kernels.lists import UNLIMITED, Heads, Lists

# The conformance suite (tests/jsparse/test_attention.py) runs these kernels every time; here are more shapes.
pytestmark = pytest.mark.slow

FLOAT32 = 1e-5  # relative, norm-wise
NARROW = 2e-2
MIXED = (causal(), streaming(3, 40), shifted_groups(64, 32), sliding_window(1))


@pytest.fixture(autouse=True)
def no_races():
    """Every kernel here runs with the race detector on, and it must stay silent."""
    yield
    races = gpu_callbacks._races
    assert races is None or not races.races_found


@dataclasses.dataclass(frozen=True)
class Case:
    """masks: one a row; rows: those of the query heads; chosen: a random half of the blocks, by sequence."""

    masks: tuple[TokenMask, ...]
    rows: tuple[int, ...] = (0, 0)
    kv_heads: int = 1
    batch: int = 1
    q_len: int = 130
    kv_len: int = 130
    dim: int = 64
    block_q: int = 64
    block_kv: int = 64
    segments: bool = False
    chosen: bool = False
    scale: float | None = None
    dtype: Any = jnp.float32


CASES = {
    "causal": Case((causal(),)),
    "causal, wide blocks": Case((causal(),), q_len=300, kv_len=330, block_q=256, block_kv=256, rows=(0,)),
    "streaming": Case((streaming(10, 70),), q_len=200, kv_len=200, block_kv=128),
    "shifted groups": Case((shifted_groups(64, 32),), q_len=150, kv_len=200, block_q=128, rows=(0, 0, 0)),
    "sliding window": Case((sliding_window(20),), q_len=200, kv_len=200, block_q=128, block_kv=128),
    "all at once": Case((TokenMask(sink=70, window=20, group_size=96, group_shift=16),), 2 * (0,), q_len=200),
    "mixed rows": Case(MIXED, (0, 1, 2, 3), kv_heads=2, batch=2, q_len=140, kv_len=200),
    "a row for two groups": Case(MIXED[:2], (1, 0, 0, 1), q_len=70, kv_len=130, block_q=128, block_kv=128),
    "multi-head": Case(MIXED, (0, 1, 2), kv_heads=3, block_kv=128),
    "a continuation": Case(MIXED, (0, 1), q_len=33, kv_len=260, block_kv=128),
    "one query": Case((causal(),), q_len=1, kv_len=70),
    "queries that see nothing": Case(MIXED, (0, 1), q_len=200, kv_len=70, block_q=128),
    "chosen lists": Case((causal(),), batch=2, q_len=200, kv_len=200, chosen=True),
    "chosen lists, one a head": Case(MIXED, (2, 0, 1, 3), 2, 2, 200, 200, block_q=128, chosen=True),
    "segments": Case(MIXED, (0, 1), batch=2, q_len=200, kv_len=200, segments=True),
    "segments, T != S": Case(MIXED[:1], q_len=100, kv_len=200, block_q=128, block_kv=128, segments=True),
    "head_dim 128": Case(MIXED, (0, 1), q_len=140, kv_len=200, dim=128, segments=True),
    "head_dim 128, two warpgroups": Case(MIXED, (0, 2), dim=128, q_len=200, block_q=128, block_kv=128),
    "head_dim 256": Case(MIXED, (0, 1), q_len=70, dim=256),
    "head_dim 256, two warpgroups": Case(MIXED, (0, 1), dim=256, block_q=128, block_kv=128, segments=True),
    "scale": Case((causal(),), scale=0.7),
    "bfloat16": Case(MIXED, (0, 1), block_q=128, block_kv=128, dtype=jnp.bfloat16),
    "float16": Case(MIXED, (0, 1), q_len=70, dim=256, dtype=jnp.float16),
}


@pytest.fixture(scope="module", params=CASES)
def solved(request):
    """A case, the kernels' arguments but for the lists, what each query sees, and the true gradients."""
    case = CASES[request.param]
    rng = np.random.default_rng(0)
    heads, scale = len(case.rows), case.scale or case.dim**-0.5

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), case.dtype)

    q, d_out = (random(case.batch, case.q_len, heads, case.dim) for _ in "ab")
    k, v = (random(case.batch, case.kv_len, case.kv_heads, case.dim) for _ in "ab")
    d_lse = rng.normal(size=(case.batch, heads, case.q_len))

    # By row; the blocks to list are chosen among those that show something.
    positions = np.arange(case.q_len)[:, None] + case.kv_len - case.q_len
    shown = np.stack([np.asarray(mask(positions, np.arange(case.kv_len))) for mask in case.masks])[None]
    listed, full = by_block(shown, case.block_q, case.block_kv)
    if case.chosen:
        listed = listed & (rng.random((case.batch, *listed.shape[1:])) < 0.5)
        full = full & listed
    blocks = np.repeat(np.repeat(listed, case.block_q, 2), case.block_kv, 3)
    seen = (shown & blocks[:, :, : case.q_len, : case.kv_len])[:, list(case.rows)]
    segments = None
    if case.segments:
        ids = np.sort(rng.integers(0, 3, (case.batch, case.kv_len)), axis=1)
        segments = jnp.asarray(ids[:, -case.q_len :]), jnp.asarray(ids)
        seen = seen & (ids[:, -case.q_len :, None] == ids[:, None, :])[:, None]

    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        (out, lse), pull = jax.vjp(functools.partial(dense, scale=scale, seen=seen), *wide)
        gradients = [np.asarray(x) for x in pull((jnp.asarray(d_out, jnp.float64), jnp.asarray(d_lse)))]
        delta = np.einsum("bthd,bthd->bht", out, np.asarray(d_out, np.float64)) - d_lse
        base2 = np.where(seen.any(-1), lse / np.log(2), np.inf)
    padding = (0, 0), (0, 0), (0, -case.q_len % 128)
    lse = jnp.asarray(np.pad(base2, padding, constant_values=np.inf), jnp.float32)
    arrays = q, k, v, d_out, lse, jnp.asarray(np.pad(delta, padding), jnp.float32)
    options = {"scale": scale, "block_q": case.block_q, "block_kv": case.block_kv, "segments": segments}
    return case, arrays, options, listed, full, gradients


def dense(q, k, v, scale, seen):
    """out [B, T, Hq, D] and the natural lse [B, Hq, T]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(seen, scale * jnp.einsum("bthd,bshd->bhts", q, k), -1e3)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0)
    return jnp.einsum("bhts,bshd->bthd", weights, v), jnp.where(seen.any(-1), lse, -jnp.inf)


def by_block(shown, block_q, block_kv):
    """Which blocks of [..., T, S] show something, and which everything: keys beyond S are not shown."""
    *leading, q_len, kv_len = shown.shape
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)

    def blocks(value):
        padded = np.full((*leading, rows * block_q, columns * block_kv), value)
        padded[..., :q_len, :kv_len] = shown
        padded[..., :, kv_len:] = False
        return padded.reshape(*leading, rows, block_q, columns, block_kv)

    return blocks(False).any((-3, -1)), blocks(True).all((-3, -1))


def lists_of(listed, full):
    """Lists of the blocks along the last axis; the whole ones first, otherwise in no order."""
    rng = np.random.default_rng(1)
    entries = [sorted(rng.permutation(np.flatnonzero(x)), key=lambda n: not y[n]) for x, y in zip(
        listed.reshape(-1, listed.shape[-1]), full.reshape(-1, full.shape[-1]), strict=True
    )]  # fmt: skip
    count = listed.sum(-1)
    start = np.cumsum(count).reshape(count.shape) - count
    return Lists(
        *(jnp.asarray(x, jnp.int32) for x in (np.concatenate([*entries, [0]]), start, count, full.sum(-1)))
    )


def heads_of(case):
    integers = [
        (m.sink if m.window else 0, m.window or UNLIMITED, m.group_size or UNLIMITED, m.group_shift)
        for m in case.masks
    ]
    return Heads(jnp.asarray(case.rows), jnp.asarray([integers[row] for row in case.rows]))


def check(case, got, want):
    assert got.dtype == case.dtype
    got = np.asarray(got, np.float64)
    assert not got[~want.any(-1)].any()  # exactly, where a query sees nothing or nobody sees a key
    assert np.linalg.norm(got - want) <= (FLOAT32 if case.dtype == jnp.float32 else NARROW) * np.linalg.norm(
        want
    )


INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)


def test_queries(solved):
    case, arrays, options, listed, full, (dq, _, _) = solved
    lists = lists_of(listed, full)
    got = backward_queries(*arrays, lists=lists, heads=heads_of(case), **options, interpret=INTERPRETER)
    check(case, got, dq)


def test_keys(solved):
    case, arrays, options, listed, full, (_, dk, dv) = solved
    lists = lists_of(listed.swapaxes(2, 3), full.swapaxes(2, 3))
    got = backward_keys(*arrays, transposed=lists, heads=heads_of(case), **options, interpret=INTERPRETER)
    check(case, got[0], dk)
    check(case, got[1], dv)
