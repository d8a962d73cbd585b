"""Block-sparse attention, forward: TMA copies the tiles of a list, which two compute warpgroups share.

Algorithm: FlashAttention-3 (arXiv 2407.08608). A memory warpgroup fills a ring of K and V tiles. Two compute
warpgroups take turns: the softmax of one runs beside the matrix products of the other. What is new is that
the tiles come from a list read at run time, and that only its partial blocks pay for the element mask.
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
LOWEST = -1e30  # the first running maximum: finite, since -inf - -inf is not a number


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """What a program holds.

    - warpgroups: for computing, with ROWS queries each, on one list.
    - tile_kv: keys per step.
    - stages: K and V tiles in the rings.
    """

    warpgroups: int
    tile_kv: int
    stages: int


def forward_tiles(head_dim: int, block_q: int, block_kv: int) -> ForwardTiles:
    """The tiles for one shape: as many keys per step as divide the block and leave room for two stages."""
    widest = 64 if head_dim == 256 else 128
    return ForwardTiles(
        warpgroups=2 if block_q % (2 * ROWS) == 0 else 1,
        tile_kv=widest if block_kv % widest == 0 else 64,
        stages=2,
    )


def forward(
    q: Array,
    k: Array,
    v: Array,
    lists: Lists,
    heads: Heads,
    *,
    scale: float,
    block_q: int,
    block_kv: int,
    offset: int | None = None,
    segments: tuple[Array, Array] | None = None,
    tiles: ForwardTiles | None = None,
    interpret=None,
) -> tuple[Array, Array]:
    """Attention over the keys that the lists and the heads' token masks show::

        out = softmax(scale * q k') v      lse = log2 sum exp(scale * q k')

    or 0 and -inf for a query that sees nothing. Unless interpreted, T and S must be less than 8 or multiples
    of 8 (TMA).

    - q: [B, T, Hq, D].
    - k, v: [B, S, Hk, D], of q's dtype.
    - lists: lists of key blocks, one for each ``block_q`` queries.
    - heads: the row of lists and the token mask of each query head.
    - scale: of the scores.
    - block_q, block_kv: tokens per block.
    - offset: query t stands at position ``t + offset``; S - T if None.
    - segments: (q_ids [B, T], kv_ids [B, S]); a query sees its own segment.
    - tiles: those of :func:`forward_tiles` if None.
    - interpret: Pallas' settings for interpreting the kernel on a CPU; None compiles it.

    Returns out, [B, T, Hq, D] in q's dtype, and lse, [B, Hq, T rounded up to 128], float32.
    """
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    offset = kv_len - q_len if offset is None else offset
    tiles = tiles or forward_tiles(head_dim, block_q, block_kv)
    warpgroups, tile_kv, stages = tiles.warpgroups, tiles.tile_kv, tiles.stages
    rows = warpgroups * ROWS
    num_tiles = pl.cdiv(q_len, rows)
    padded = pl.cdiv(q_len, 128) * 128
    log2_scale = scale * math.log2(math.e)
    if segments is not None:
        segments = pad_segments(*segments, padded, pl.cdiv(kv_len, tile_kv) * tile_kv)

    def kernel(q_ref, k_ref, v_ref, *rest):
        *list_refs, row_ref, mask_ref = rest[:6]
        segment_refs: Any = rest[6:8] if segments else (None, None)
        (q_segment_ref, kv_segment_ref), (out_ref, lse_ref) = segment_refs, rest[-2:]
        b, kv_head = lax.axis_index("batch"), lax.axis_index("kv_heads")
        # The longest lists of a causal mask come last: they start first.
        tile = num_tiles - 1 - lax.axis_index("q")
        head = kv_head * group + lax.axis_index("group")
        steps, full_steps, first_key = walk(
            Lists(*list_refs), b, row_ref[head], tile,
            rows=rows, block=block_q, step=tile_kv, listed_block=block_kv,
        )  # fmt: skip

        def body(q_smem, k_smem, v_smem, lse_smem, q_segment_smem, kv_segment_smem, barriers):
            q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
            warpgroup = lax.axis_index("warpgroup")

            # One warpgroup has the tensor cores from its product of weights and values until its next
            # product of queries and keys is under way. Meanwhile the other computes its softmax.
            def pass_turn():
                if warpgroups == 2:
                    plgpu.barrier_arrive(turn)

            def await_turn():
                if warpgroups == 2:
                    plgpu.barrier_wait(turn)

            def swap_turns():
                pass_turn()
                await_turn()

            @pl.when(warpgroup < warpgroups)
            def _compute():
                share_registers(warpgroups, compute=True)
                first = tile * rows + warpgroup * ROWS
                q_tile, ready = q_smem.at[warpgroup], q_ready.at[warpgroup]
                plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(first, ROWS), head], q_tile, ready)
                if segments:
                    q_segment_tile = q_segment_smem.at[warpgroup]
                    plgpu.copy_gmem_to_smem(q_segment_ref.at[b, pl.ds(first, ROWS)], q_segment_tile, ready)
                plgpu.barrier_wait(ready)
                by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
                q_segment = plgpu.layout_cast(q_segment_tile[...], by_row) if segments else None
                bounds = row_bounds(first + offset, ROWS, [mask_ref[head, n] for n in range(4)])

                def step(t, carry, masked):
                    acc, top, total = carry
                    slot = lax.rem(t, stages)
                    plgpu.barrier_wait(k_ready.at[slot])
                    scores = multiply(
                        q_smem.at[anew(warpgroup)],
                        k_smem.at[slot].transpose((1, 0)),
                        meanwhile=swap_turns,
                    )
                    kv_segment = (
                        plgpu.layout_cast(kv_segment_smem.at[slot][...], by_column) if segments else None
                    )
                    release(k_free.at[slot], interpret=interpret)
                    if segments:
                        scores = jnp.where(same_segment(q_segment, kv_segment), scores, -jnp.inf)
                    if masked:
                        scores = jnp.where(visible(bounds, first_key(t), tile_kv), scores, -jnp.inf)
                    new_top = jnp.maximum(top, scores.max(axis=1) * log2_scale)
                    decay = jnp.exp2(top - new_top)
                    weights = jnp.exp2(scores * log2_scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
                    total = total * decay + weights.sum(axis=1)
                    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                    weights = weights.astype(v.dtype)
                    # No part of the softmax may move into the turn that begins here.
                    acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
                    pass_turn()
                    plgpu.barrier_wait(v_ready.at[slot])
                    await_turn()
                    acc = multiply_add(acc, weights, v_smem.at[slot], interpret=interpret)
                    release(v_free.at[slot], interpret=interpret)
                    return acc, new_top, total

                carry = (
                    plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
                )
                pl.when(warpgroup == 1)(swap_turns)  # from here on the second is half a step behind the first
                carry = lax.fori_loop(0, full_steps, functools.partial(step, masked=False), carry)
                acc, top, total = lax.fori_loop(
                    full_steps, steps, functools.partial(step, masked=True), carry
                )
                pl.when(warpgroup == 0)(swap_turns)

                inverse = jnp.where(total > 0, 1 / total, 0.0)
                q_tile[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(q.dtype)
                lse_tile = lse_smem.at[warpgroup]
                lse_tile[...] = jnp.where(total > 0, top + jnp.log(total) * math.log2(math.e), -jnp.inf)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile, out_ref.at[b, pl.ds(first, ROWS), head])
                plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[b, head, pl.ds(first, ROWS)])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(warpgroup == warpgroups)
            def _memory():
                share_registers(warpgroups, compute=False)

                @pl.loop(0, steps)
                def _(t):
                    keys = pl.ds(first_key(t), tile_kv)
                    with_k = [(kv_segment_ref.at[b, keys], kv_segment_smem)] if segments else []
                    bring(t, (k_ref.at[b, keys, kv_head], k_smem), *with_k, free=k_free, ready=k_ready)
                    bring(t, (v_ref.at[b, keys, kv_head], v_smem), free=v_free, ready=v_ready)

        transforms = tile_transforms(q.dtype)
        loads = 2 if segments else 1
        pl.run_scoped(
            body,
            plgpu.SMEM((warpgroups, ROWS, head_dim), q.dtype, transforms=transforms),
            plgpu.SMEM((stages, tile_kv, head_dim), k.dtype, transforms=transforms),
            plgpu.SMEM((stages, tile_kv, head_dim), v.dtype, transforms=transforms),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.SMEM((warpgroups, ROWS), jnp.int32) if segments else None,
            plgpu.SMEM((stages, tile_kv), jnp.int32) if segments else None,
            (
                plgpu.Barrier(num_arrivals=loads, num_barriers=warpgroups),
                plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2) if warpgroups == 2 else None,
            ),
            collective_axes="warpgroup",
        )

    out, lse = launch(
        kernel,
        "forward",
        warpgroups=warpgroups + 1,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads, padded), jnp.float32),
        ],
        grid=(batch, kv_heads, num_tiles, group),
        # The last axis runs fastest: heads that read the same keys run side by side.
        grid_names=("batch", "kv_heads", "q", "group"),
    )(q, k, v, *lists, *heads, *(segments or ()))
    return out, lse
