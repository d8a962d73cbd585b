"""Attention of one query token per sequence to listed pages of keys and values, split over the list.

Decoding reads much and computes little: a key meets only the few query heads of its group. So keys are the
rows of the first matrix product (64 of them fill a wgmma), and the group's query heads, padded to 8, are the
columns of both::

    S' = K Q'        [keys, heads]
    O' += V' P'      [head_dim, heads]

Each sequence and KV head has a list of pages, and ``splits`` thread blocks share it, so even one sequence
fills the chip (FlashDecoding). A thread block is one warpgroup; TMA brings its next pages while it works.
Several fit on an SM, and one works while another waits. Their results are float32, and are combined outside.

Pages hold bfloat16 or float16; or int8 or int4 codes with a scale and a zero per token and KV head, ``value =
scale * (code - zero)`` (QServe, arXiv 2405.04532; LServe, arXiv 2502.14866). Codes enter the products as they
are, which is exact. Scales and zeros are applied to scores and weights, which are small::

    s = scale * (codes . q - zero * sum(q))
    o = sum_k (p_k scale_k) codes_k - sum_k (p_k scale_k) zero_k
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsparse.pallas_kernels.hopper.mosaic import anew, launch, multiply, multiply_registers, tile_transforms
from jsparse.pallas_kernels.lists import HEAD_DIMS

GROUPS = (8, 16)  # query heads per KV head, rounded up
MIN_PAGE = 8  # rows of the smallest tile that TMA copies
SHARED_MEMORY = 228 * 1024  # bytes of an SM that its thread blocks share
SYSTEM_MEMORY = 1024  # bytes of it that the system takes for each thread block
LOWEST = -1e30  # the first running maximum: finite, since -inf - -inf is not a number

Pages = Array | tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """How a thread block works.

    - keys: visited per step, 64 or 128.
    - stages: steps in flight.
    - resident: thread blocks that an SM holds.
    """

    keys: int
    stages: int
    resident: int


def decode_tiles(head_dim: int, bits: int, group: int = 8) -> DecodeTiles:
    """The tiles for pages of ``bits`` per element and ``group`` query heads per KV head.

    Codes take longer to compute with than to copy, so more thread blocks share an SM, as many as its
    registers allow. Each has as many stages as fit in its part of the shared memory, at most six.
    """
    resident = {16: 1, 8: 1, 4: 2}[bits] if head_dim == 256 else {16: 2, 8: 3, 4: 3}[bits]
    resident = min(resident, 3 if group <= 8 else 2)
    share = SHARED_MEMORY // resident - SYSTEM_MEMORY
    choices = (DecodeTiles(64, stages, resident) for stages in range(6, 1, -1))
    return next(x for x in choices if shared_memory(x, head_dim, bits, group) <= share)


def all_tiles() -> list[tuple[int, int, int, DecodeTiles]]:
    """Every (head_dim, bits, group, tiles) that ``decode_tiles`` can return."""
    choices = itertools.product(HEAD_DIMS, (16, 8, 4), GROUPS)
    return [(*choice, decode_tiles(*choice)) for choice in choices]


def shared_memory(tiles: DecodeTiles, head_dim: int, bits: int, group: int = 8) -> int:
    """Bytes of shared memory that one thread block asks for."""
    columns = _columns(group)
    buffers = [columns * head_dim * 2]  # q
    buffers += [tiles.stages * tiles.keys * head_dim * bits // 8] * 2  # k and v
    buffers += [tiles.keys * columns * 2]  # weights
    buffers += [head_dim * columns * 4, columns * 4]  # out and lse
    if bits < 16:
        buffers += [tiles.stages * tiles.keys * 4] * 4  # scales and zeros
        buffers += [tiles.keys * head_dim * 2, columns * 4]  # v as wgmma takes it; sums of q
    # Each buffer begins at a whole KiB. Reductions over keys take two more, and each barrier 8 bytes.
    return sum(pl.cdiv(size, 1024) * 1024 for size in buffers) + 2048 + 8 * (tiles.stages + 1)


def num_splits(batch: int, kv_heads: int, steps: int, slots: int) -> int:
    """How many thread blocks share a list of at most ``steps`` steps, on a chip that holds ``slots`` at once.

    The fewest that keep it nine tenths as busy as the best number: the last round of blocks is rarely full.
    """
    lists = batch * kv_heads

    def busy(splits):
        rounds = lists * splits / slots
        return rounds / math.ceil(rounds)

    choices = range(1, min(steps, max(slots // lists, 8)) + 1)
    most = max(busy(splits) for splits in choices)
    return next(splits for splits in choices if busy(splits) >= 0.9 * most)


def shape_limit(q: Array, k: Pages, *, interpret: bool = False) -> str | None:
    """Why :func:`paged_decode` cannot take these queries and keys (values are like them), or None."""
    pool, stored = (k[0], jnp.int8) if isinstance(k, tuple) else (k, q.dtype)
    group, head_dim, page_size = q.shape[1] // pool.shape[1], q.shape[2], pool.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16) and not (interpret and q.dtype == jnp.float32):
        return f"the decode kernel takes bfloat16 and float16 queries, not {q.dtype}"
    if pool.dtype != stored:
        what = "int8 codes" if isinstance(k, tuple) else f"pages of the queries' {q.dtype}"
        return f"the decode kernel takes {what}, not {pool.dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the decode kernel takes head_dim {HEAD_DIMS}, not {head_dim}"
    if page_size % MIN_PAGE or (page_size < 64 and 64 % page_size):
        return (
            f"the decode kernel takes pages of 8, 16, 32 or a multiple of 8 from 64 tokens, not {page_size}"
        )
    if group > GROUPS[-1]:
        return f"the decode kernel takes up to {GROUPS[-1]} query heads per KV head, not {group}"
    return None


def paged_decode(
    q: Array,
    k: Pages,
    v: Pages,
    pages: Array,
    used: Array,
    *,
    scale: float,
    splits: int | None = None,
    tiles: DecodeTiles | None = None,
    interpret=None,
) -> tuple[Array, Array]:
    """Attention of one query per sequence to the keys of its listed pages::

        out = softmax(scale * q k') v      lse = log2 sum exp(scale * q k')

    or 0 and -inf if no key is listed. ``shape_limit`` says which shapes are supported.

    - q: [B, Hq, D].
    - k, v: [num_pages, Hk, page_size, D] of q's dtype; or (codes, scale, zero). Codes are int8 of that shape,
      or [..., D / 2] with two int4 codes per byte, dimension d low and d + D / 2 high. Scale and zero are
      float32, [num_pages, Hk, page_size].
    - pages: [B, 1 or Hk, n], int32: places in the pool, -1 for none.
    - used: of the same shape: how many keys at the start of each page count; if 0, the page is ignored. What
      a page holds beyond them has no effect, NaN included.
    - scale: of the scores.
    - splits: thread blocks per list; chosen by :func:`num_splits` if None.
    - tiles: those of :func:`decode_tiles` if None.
    - interpret: Pallas' settings for interpreting the kernel on a CPU; None compiles it.

    Returns out [B, Hq, D] and lse [B, Hq], float32.
    """
    batch, q_heads, head_dim = q.shape
    k_arrays, v_arrays = (_unpacked(x, head_dim) if isinstance(x, tuple) else (x,) for x in (k, v))
    quantised, pool = len(k_arrays) > 1, k_arrays[0]
    packed = pool.dtype == jnp.int4
    bits = (4 if packed else 8) if quantised else 16
    _, kv_heads, page_size, _ = pool.shape
    group = q_heads // kv_heads
    columns = _columns(group)
    tiles = tiles or decode_tiles(head_dim, bits, columns)
    keys, stages, width = tiles.keys, tiles.stages, min(head_dim, 128)
    # A step visits `entries` whole pages, or one of the `pieces` of a page.
    rows = min(page_size, keys)
    entries, pieces = keys // rows, pl.cdiv(page_size, rows)
    # An entry without keys is still copied if its step has others: it then names page 0.
    used = jnp.where(pages < 0, 0, used)
    pages = jnp.where(used > 0, pages, 0)
    pages, used = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % entries))) for x in (pages, used))
    # Nothing is visited after the last key that counts.
    end = jnp.where(used > 0, jnp.arange(used.shape[2]) * pieces + pl.cdiv(used, rows), 0)
    num_steps = pl.cdiv(end.max(axis=2), entries)
    if splits is None:
        splits = num_splits(batch, kv_heads, pages.shape[2] * pieces // entries, num_sms() * tiles.resident)
    own_list = pages.shape[1] > 1
    log2_scale = scale * math.log2(math.e)

    def kernel(q_ref, pages_ref, used_ref, steps_ref, *refs):
        *refs, out_ref, lse_ref = refs
        sums_ref: Any = refs[-1] if quantised else None
        pool_refs = refs[:-1] if quantised else refs
        b, head, split = (lax.axis_index(name) for name in ("batch", "kv_heads", "split"))
        row = head if own_list else 0
        first, last = (lax.div(steps_ref[b, row] * n, splits) for n in (split, split + 1))

        def places(step):
            """The page of each piece of a step, and where in it the piece begins."""
            found = [step * entries + e for e in range(entries)]
            return [(pages_ref[b, row, lax.div(n, pieces)], lax.rem(n, pieces) * rows) for n in found]

        def lengths(step):
            """How many keys of each piece count."""
            found = [step * entries + e for e in range(entries)]
            return [
                jnp.clip(used_ref[b, row, lax.div(n, pieces)] - lax.rem(n, pieces) * rows, 0, rows)
                for n in found
            ]

        def body(q_smem, sums_smem, pool_smem, values_smem, weights_smem, out_smem, lse_smem, q_ready, ready):
            def fetch(step, found):
                slot = lax.rem(step - first, stages)
                for e, (page, start) in enumerate(found):
                    for ref, smem in zip(pool_refs, pool_smem, strict=True):
                        piece = smem.at[slot, pl.ds(e * rows, rows)]
                        plgpu.copy_gmem_to_smem(ref.at[page, head, pl.ds(start, rows)], piece, ready.at[slot])

            plgpu.copy_gmem_to_smem(q_ref.at[b, head], q_smem.at[0], q_ready)
            if quantised:
                plgpu.copy_gmem_to_smem(sums_ref.at[b, head], sums_smem, q_ready)
            for n in range(stages):
                pl.when(first + n < last)(lambda n=n: fetch(first + n, places(first + n)))
            plgpu.barrier_wait(q_ready)
            sums: Any = _cast(sums_smem[...], _BY_HEAD) if quantised else None

            def decoded(codes):
                """The values of a tile of codes, some columns at a time, and which columns these are."""
                for start in range(0, head_dim, width):
                    at = pl.ds(start, width)
                    yield codes.at[:, at][...].astype(q.dtype), at

            def step(t, carry):
                acc, top, total, offset = carry
                slot = lax.rem(t - first, stages)
                # Read before the wait: they are needed right after it.
                coming, held = places(jnp.minimum(t + stages, last - 1)), lengths(t)
                plgpu.barrier_wait(ready.at[slot])
                tile = [smem.at[slot] for smem in pool_smem]
                k_tile, v_tile = tile[0], tile[len(k_arrays)]
                q_tile, weights_tile = q_smem.at[anew(0)], weights_smem.at[anew(0)]

                if quantised:
                    k_scale, k_zero, v_scale, v_zero = (
                        _along_keys(_where(held, rows, _cast(ref[...], _BY_KEY), 0.0), columns)
                        for ref in (*tile[1:3], *tile[4:6])
                    )
                    pairs = ((values, q_tile.at[:, at].transpose((1, 0))) for values, at in decoded(k_tile))
                    scores = multiply_registers(pairs, (keys, columns), interpret=interpret)
                    scores = k_scale * (scores - k_zero * _along_heads(sums, keys))
                else:
                    scores = multiply(k_tile, q_tile.transpose((1, 0)))
                scores = _where(held, rows, _cast(scores * log2_scale, _MATRIX), -jnp.inf)
                new_top = jnp.maximum(top, _cast(scores.max(axis=0), _BY_HEAD))
                decay = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - _along_heads(new_top, keys))
                # Each thread adds up its own keys; these sums are added at the very end.
                total = total * _along_heads(decay, keys) + weights

                if quantised:
                    narrow = (weights * v_scale).astype(q.dtype)
                    offset = offset * _along_heads(decay, keys) + narrow.astype(jnp.float32) * v_zero
                    values_tile = values_smem.at[anew(0)]
                    for values, at in decoded(v_tile):
                        values_tile.at[:, at][...] = values
                    v_tile = values_tile
                else:
                    narrow = weights.astype(q.dtype)

                    @pl.when(sum(held) < keys)
                    def _():
                        # A slot that holds no token may hold anything, and 0 * NaN is NaN.
                        v_tile[...] = _where(held, rows, v_tile[...], 0.0)

                weights_tile.transpose((1, 0))[...] = narrow
                plgpu.commit_smem()
                product = multiply(v_tile.transpose((1, 0)), weights_tile.transpose((1, 0)))
                acc = acc * _along_heads(decay, head_dim) + product
                pl.when(t + stages < last)(lambda: fetch(t + stages, coming))
                return acc, new_top, total, offset

            def zeros(*shape):
                return _cast(jnp.zeros(shape, jnp.float32), _MATRIX)

            top = _cast(jnp.full((columns,), LOWEST, jnp.float32), _BY_HEAD)
            carry = (
                zeros(head_dim, columns),
                top,
                zeros(keys, columns),
                zeros(keys, columns) if quantised else None,
            )
            acc, top, total, offset = lax.fori_loop(first, last, step, carry)

            total = _cast(total.sum(axis=0), _BY_HEAD)
            if quantised:
                acc = acc - _along_heads(_cast(offset.sum(axis=0), _BY_HEAD), head_dim)
            out_smem[...] = acc * _along_heads(jnp.where(total > 0, 1 / total, 0.0), head_dim)
            lse_smem[...] = jnp.where(total > 0, top + jnp.log(total) * math.log2(math.e), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, head, split])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, head, split])
            plgpu.wait_smem_to_gmem(0)

        wide = tile_transforms(q.dtype)
        stored = tile_transforms(pool.dtype, min(128, width * bits // 8))
        pl.run_scoped(
            body,
            plgpu.SMEM((1, columns, head_dim), q.dtype, transforms=wide),
            plgpu.SMEM((columns,), jnp.float32) if quantised else None,
            [
                plgpu.SMEM((stages, keys, *x.shape[3:]), x.dtype, transforms=stored if x.ndim == 4 else ())
                for x in (*k_arrays, *v_arrays)
            ],
            plgpu.SMEM((1, keys, head_dim), q.dtype, transforms=wide) if quantised else None,
            plgpu.SMEM((1, columns, keys), q.dtype, transforms=wide),
            plgpu.SMEM((head_dim, columns), jnp.float32),
            plgpu.SMEM((columns,), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if quantised else 1),
            plgpu.Barrier(num_arrivals=entries * 2 * len(k_arrays), num_barriers=stages),
            collective_axes="warpgroup",
        )

    grouped = q.reshape(batch, kv_heads, group, head_dim)
    if packed:
        grouped = _interleaved(grouped)
    arrays = [*k_arrays, *v_arrays]
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, columns - group), (0, 0)))
    if quantised:
        arrays.append(grouped.astype(jnp.float32).sum(axis=-1))
    out, lse = launch(
        kernel,
        "paged_decode",
        warpgroups=1,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct((batch, kv_heads, splits, head_dim, columns), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, splits, columns), jnp.float32),
        ],
        grid=(splits, kv_heads, batch),
        grid_names=("split", "kv_heads", "batch"),
    )(grouped, pages, used, num_steps, *arrays)
    out, lse = combine(out[..., :group], lse[..., :group])
    if packed:
        out = _in_order(out)
    return out.reshape(q.shape), lse.reshape(batch, q_heads)


def combine(out: Array, lse: Array) -> tuple[Array, Array]:
    """The attention to all splits, from that to each: out [..., splits, D, H] and lse [..., splits, H].

    Returns out [..., H, D] and lse [..., H], float32: ``lse = log2 sum 2**lse_i`` and
    ``out = sum 2**(lse_i - lse) out_i``, or -inf and 0 if no split saw a key.
    """
    top = lse.max(axis=-2)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    total = top + jnp.log2(jnp.exp2(lse - top[..., None, :]).sum(axis=-2))
    weights = jnp.exp2(lse - jnp.where(total == -jnp.inf, 0.0, total)[..., None, :])
    return (out * weights[..., None, :]).sum(axis=-3).swapaxes(-1, -2), total


def _unpacked(quantized: tuple[Array, Array, Array], head_dim: int) -> tuple[Array, Array, Array]:
    """Bytes of two int4 codes as an array of int4, which costs nothing; their dimensions are interleaved."""
    codes, scale, zero = quantized
    if codes.shape[-1] < head_dim:
        codes = lax.bitcast_convert_type(codes, jnp.int4).reshape(*codes.shape[:-1], head_dim)
    return codes, scale, zero


def _interleaved(x: Array) -> Array:
    """The last axis in the order of codes that share bytes: 0, D / 2, 1, D / 2 + 1 and so on."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def _in_order(x: Array) -> Array:
    """The reverse of :func:`_interleaved`."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def num_sms() -> int:
    """Multiprocessors of the device that is compiled for; an H200's if that is not a GPU."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    cores = jax.devices()[0].core_count if abstract is None and jax.default_backend() == "gpu" else None
    return (cores if abstract is None else abstract.num_cores) or 132


def _columns(group: int) -> int:
    return pl.cdiv(group, 8) * 8


_MATRIX = plgpu.Layout.WGMMA  # [keys or dimensions, heads]
_BY_KEY, _BY_HEAD = _MATRIX.reduce(1), _MATRIX.reduce(0)
_cast = plgpu.layout_cast


def _along_keys(x: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _along_heads(x: Array, rows: int) -> Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def _where(lengths: list, rows: int, x: Array, other: float) -> Array:
    """x where its key, along the first axis, is one of the first ``lengths[e]`` of the e-th rows."""
    key = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    inside = ((key >= e * rows) & (key < e * rows + length) for e, length in enumerate(lengths))
    return jnp.where(functools.reduce(jnp.logical_or, inside), x, jnp.full_like(x, other))
