"""Block-sparse attention, backward: the gradient of the queries, by the forward kernel's walk over its lists.

Algorithm: FlashAttention-2 (arXiv 2307.08691), algorithm 2, in two kernels: no sum crosses programs, and the
result is the same every time. This one computes dQ, ``backward_keys`` computes dK and dV. A memory warpgroup
fills rings of K and V tiles, which the compute warpgroups share.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jsparse.pallas_kernels.hopper.masking import pad_segments, row_bounds, same_segment, visible
from jsparse.pallas_kernels.hopper.mosaic import (
    anew,
    bring,
    launch,
    multiply,
    multiply_add,
    release,
    share_registers,
    tile_transforms,
)
from jsparse.pallas_kernels.lists import Heads, Lists, walk

ROWS = 64  # queries that a warpgroup holds: the height of one wgmma


@dataclasses.dataclass(frozen=True)
class QueriesTiles:
    """What a program holds.

    - warpgroups: for computing, with ROWS queries each, on one list.
    - tile_kv: keys per step.
    - k_stages, v_stages: K and V tiles in the rings.
    """

    warpgroups: int
    tile_kv: int
    k_stages: int
    v_stages: int


def queries_tiles(head_dim: int, block_q: int, block_kv: int) -> QueriesTiles:
    """The tiles for one shape: as many keys per step as divide the block and leave room for two stages.

    At head_dim 256 two warpgroups' queries and their gradients leave room for three tiles of 64 keys: V,
    which a step reads only once and early, has a single stage.
    """
    widest = 64 if head_dim == 256 else 128
    warpgroups = 2 if block_q % (2 * ROWS) == 0 else 1
    return QueriesTiles(
        warpgroups=warpgroups,
        tile_kv=widest if block_kv % widest == 0 else 64,
        k_stages=2,
        v_stages=1 if head_dim == 256 and warpgroups == 2 else 2,
    )


def backward_queries(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    lse: Array,
    delta: Array,
    lists: Lists,
    heads: Heads,
    *,
    scale: float,
    block_q: int,
    block_kv: int,
    offset: int | None = None,
    segments: tuple[Array, Array] | None = None,
    tiles: QueriesTiles | None = None,
    interpret=None,
) -> Array:
    """The gradient of the queries, over the keys that the lists and the heads' token masks show::

        dq = scale * ds k      ds = p * (d_out v' - delta)

    with the weights ``p`` of the forward pass; 0 for a query that sees nothing.

    - q, d_out: [B, T, Hq, D], of one dtype.
    - k, v: [B, S, Hk, D], of the same dtype.
    - lse: [B, Hq, T rounded up to 128], float32: that of :func:`forward`, but +inf for a query that sees
      nothing and beyond T.
    - delta: like lse: ``sum(out * d_out)`` minus the gradient of the natural lse.
    - lists, heads, scale, block_q, block_kv, offset, segments, interpret: as for :func:`forward`.
    - tiles: those of :func:`queries_tiles` if None.

    Returns dq, [B, T, Hq, D] in q's dtype.
    """
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    offset = kv_len - q_len if offset is None else offset
    tiles = tiles or queries_tiles(head_dim, block_q, block_kv)
    warpgroups, tile_kv, k_stages, v_stages = tiles.warpgroups, tiles.tile_kv, tiles.k_stages, tiles.v_stages
    rows = warpgroups * ROWS
    num_tiles = pl.cdiv(q_len, rows)
    log2_scale = scale * math.log2(math.e)
    if segments is not None:
        segments = pad_segments(*segments, lse.shape[2], pl.cdiv(kv_len, tile_kv) * tile_kv)

    def kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *rest):
        *list_refs, row_ref, mask_ref = rest[:6]
        segment_refs: Any = rest[6:8] if segments else (None, None)
        (q_segment_ref, kv_segment_ref), dq_ref = segment_refs, rest[-1]
        b, kv_head = lax.axis_index("batch"), lax.axis_index("kv_heads")
        # The longest lists of a causal mask come last: they start first.
        tile = num_tiles - 1 - lax.axis_index("q")
        head = kv_head * group + lax.axis_index("group")
        steps, full_steps, first_key = walk(
            Lists(*list_refs), b, row_ref[head], tile,
            rows=rows, block=block_q, step=tile_kv, listed_block=block_kv,
        )  # fmt: skip

        def body(q_smem, d_out_smem, k_smem, v_smem, row_smem, segment_smem, barriers):
            q_ready, k_ready, v_ready, k_free, v_free = barriers
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < warpgroups)
            def _compute():
                share_registers(warpgroups, compute=True)
                first = tile * rows + warpgroup * ROWS
                queries, ready = pl.ds(first, ROWS), q_ready.at[warpgroup]
                q_tile = q_smem.at[warpgroup]
                lse_tile, delta_tile = row_smem.at[warpgroup, 0], row_smem.at[warpgroup, 1]
                plgpu.copy_gmem_to_smem(q_ref.at[b, queries, head], q_tile, ready)
                plgpu.copy_gmem_to_smem(d_out_ref.at[b, queries, head], d_out_smem.at[warpgroup], ready)
                plgpu.copy_gmem_to_smem(lse_ref.at[b, head, queries], lse_tile, ready)
                plgpu.copy_gmem_to_smem(delta_ref.at[b, head, queries], delta_tile, ready)
                if segments:
                    q_segment_tile = segment_smem.at[warpgroup, pl.ds(0, ROWS)]
                    plgpu.copy_gmem_to_smem(q_segment_ref.at[b, queries], q_segment_tile, ready)
                plgpu.barrier_wait(ready)
                by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
                row_lse = plgpu.layout_cast(lse_tile[...], by_row)
                row_delta = plgpu.layout_cast(delta_tile[...], by_row)
                q_segment = plgpu.layout_cast(q_segment_tile[...], by_row) if segments else None
                bounds = row_bounds(first + offset, ROWS, [mask_ref[head, n] for n in range(4)])

                def step(t, acc, masked):
                    k_slot, v_slot = lax.rem(t, k_stages), lax.rem(t, v_stages)
                    plgpu.barrier_wait(k_ready.at[k_slot])
                    mine = anew(warpgroup)
                    k_tile, v_tile = k_smem.at[k_slot], v_smem.at[anew(v_slot)]
                    scores = multiply(q_smem.at[mine], k_tile.transpose((1, 0)))
                    exponents = scores * log2_scale - lax.broadcast_in_dim(row_lse, scores.shape, [0])
                    if segments:
                        kv_segment = plgpu.layout_cast(segment_smem.at[warpgroups + k_slot][...], by_column)
                        exponents = jnp.where(same_segment(q_segment, kv_segment), exponents, -jnp.inf)
                    if masked:
                        exponents = jnp.where(visible(bounds, first_key(t), tile_kv), exponents, -jnp.inf)
                    weights = jnp.exp2(exponents)
                    plgpu.barrier_wait(v_ready.at[v_slot])
                    d_weights = multiply(d_out_smem.at[mine], v_tile.transpose((1, 0)))
                    release(v_free.at[v_slot], interpret=interpret)
                    d_scores = weights * (d_weights - lax.broadcast_in_dim(row_delta, scores.shape, [0]))
                    acc = multiply_add(acc, d_scores.astype(k.dtype), k_tile, interpret=interpret)
                    release(k_free.at[k_slot], interpret=interpret)
                    return acc

                acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)
                acc = lax.fori_loop(0, full_steps, functools.partial(step, masked=False), acc)
                acc = lax.fori_loop(full_steps, steps, functools.partial(step, masked=True), acc)

                q_tile[...] = (acc * scale).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[b, queries, head])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(warpgroup == warpgroups)
            def _memory():
                share_registers(warpgroups, compute=False)

                @pl.loop(0, steps)
                def _(t):
                    keys = pl.ds(first_key(t), tile_kv)
                    with_k = []
                    if segments:
                        ring = segment_smem.at[pl.ds(warpgroups, k_stages)]
                        with_k.append((kv_segment_ref.at[b, keys], ring))
                    bring(t, (k_ref.at[b, keys, kv_head], k_smem), *with_k, free=k_free, ready=k_ready)
                    bring(t, (v_ref.at[b, keys, kv_head], v_smem), free=v_free, ready=v_ready)

        transforms = tile_transforms(q.dtype)
        pl.run_scoped(
            body,
            plgpu.SMEM((warpgroups, ROWS, head_dim), q.dtype, transforms=transforms),
            plgpu.SMEM((warpgroups, ROWS, head_dim), d_out.dtype, transforms=transforms),
            plgpu.SMEM((k_stages, tile_kv, head_dim), k.dtype, transforms=transforms),
            plgpu.SMEM((v_stages, tile_kv, head_dim), v.dtype, transforms=transforms),
            plgpu.SMEM((warpgroups, 2, ROWS), jnp.float32),
            # One array for the ids of queries and of keys: each array takes a whole KiB, and few are left.
            plgpu.SMEM((warpgroups + k_stages, tile_kv), jnp.int32) if segments else None,
            (
                plgpu.Barrier(num_arrivals=5 if segments else 4, num_barriers=warpgroups),
                plgpu.Barrier(num_arrivals=2 if segments else 1, num_barriers=k_stages),
                plgpu.Barrier(num_barriers=v_stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=k_stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=v_stages),
            ),
            collective_axes="warpgroup",
        )

    return launch(
        kernel,
        "backward_queries",
        warpgroups=warpgroups + 1,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch, kv_heads, num_tiles, group),
        # The last axis runs fastest: heads that read the same keys run side by side.
        grid_names=("batch", "kv_heads", "q", "group"),
    )(q, k, v, d_out, lse, delta, *lists, *heads, *(segments or ()))
