"""Block-sparse attention, backward: the gradients of the keys and the values, over the transposed lists.

Algorithm: FlashAttention-2 (arXiv 2307.08691), algorithm 2, in two kernels: no sum crosses programs, and the
result is the same every time. This one computes dK and dV, ``backward_queries`` computes dQ. A program holds
a tile of keys and walks the queries that see it, one query head of the group after another. A memory
warpgroup fills rings of tiles of q and of d_out, which the compute warpgroups share. Scores are transposed,
keys by queries: one product leaves the weights in the registers where the next one takes them.
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

from jsparse.pallas_kernels.hopper.masking import key_bounds, pad_segments, same_segment, visible_to
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

ROWS = 64  # keys that a warpgroup holds: the height of one wgmma


@dataclasses.dataclass(frozen=True)
class KeysTiles:
    """What a program holds.

    - warpgroups: for computing, with ROWS keys each.
    - split: two warpgroups split the work on the same ROWS keys instead.
    - tile_q: queries per step.
    - stages: tiles of q and of d_out in the rings.
    """

    warpgroups: int
    split: bool
    tile_q: int
    stages: int


def keys_tiles(head_dim: int, block_q: int, block_kv: int) -> KeysTiles:
    """The tiles for one shape.

    The gradients of 64 keys of head_dim 256 fill two warpgroups' registers: one computes dK, the other dV.
    """
    if head_dim == 256:
        return KeysTiles(warpgroups=2, split=True, tile_q=64, stages=2)
    widest = 128 if head_dim == 64 else 64
    return KeysTiles(
        warpgroups=2 if block_kv % (2 * ROWS) == 0 else 1,
        split=False,
        tile_q=widest if block_q % widest == 0 else 64,
        stages=2,
    )


def backward_keys(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    lse: Array,
    delta: Array,
    transposed: Lists,
    heads: Heads,
    *,
    scale: float,
    block_q: int,
    block_kv: int,
    offset: int | None = None,
    segments: tuple[Array, Array] | None = None,
    tiles: KeysTiles | None = None,
    interpret=None,
) -> tuple[Array, Array]:
    """The gradients of the keys and the values, summed over the query heads of a group::

        dv = p' d_out      dk = scale * ds' q      ds = p * (d_out v' - delta)

    with the weights ``p`` of the forward pass; 0 for a key that no query sees.

    - q, d_out: [B, T, Hq, D], of one dtype.
    - k, v: [B, S, Hk, D], of the same dtype.
    - lse: [B, Hq, T rounded up to 128 and to whole blocks], float32: that of :func:`forward`, but +inf for a
      query that sees nothing and beyond T.
    - delta: like lse: ``sum(out * d_out)`` minus the gradient of the natural lse.
    - transposed: lists of query blocks, one for each ``block_kv`` keys.
    - heads, scale, block_q, block_kv, offset, segments, interpret: as for :func:`forward`.
    - tiles: those of :func:`keys_tiles` if None.

    Returns dk and dv, [B, S, Hk, D] in k's dtype.
    """
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    offset = kv_len - q_len if offset is None else offset
    tiles = tiles or keys_tiles(head_dim, block_q, block_kv)
    warpgroups, split, tile_q, stages = tiles.warpgroups, tiles.split, tiles.tile_q, tiles.stages
    holders = 1 if split else warpgroups  # of keys
    rows = holders * ROWS
    num_tiles = pl.cdiv(kv_len, rows)
    log2_scale = scale * math.log2(math.e)
    if segments is not None:
        segments = pad_segments(*segments, lse.shape[2], num_tiles * rows)

    def kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *rest):
        *list_refs, row_ref, mask_ref = rest[:6]
        segment_refs: Any = rest[6:8] if segments else (None, None)
        (q_segment_ref, kv_segment_ref), (dk_ref, dv_ref) = segment_refs, rest[-2:]
        b, kv_head = lax.axis_index("batch"), lax.axis_index("kv_heads")
        tile = lax.axis_index("keys")  # the longest lists of a causal mask come first

        def walk_head(head):
            return walk(
                Lists(*list_refs), b, row_ref[head], tile,
                rows=rows, block=block_kv, step=tile_q, listed_block=block_q,
            )  # fmt: skip

        def body(k_smem, v_smem, q_smem, d_out_smem, lse_smem, delta_smem, *rest):
            kv_segment_smem, q_segment_smem, barriers = rest
            kv_ready, q_ready, d_out_ready, q_free, d_out_free, k_free = barriers
            warpgroup = lax.axis_index("warpgroup")

            def compute(make_dk: bool, make_dv: bool):
                share_registers(warpgroups, compute=True)
                holder = 0 if split else warpgroup
                first = tile * rows + holder * ROWS
                keys = pl.ds(first, ROWS)
                by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
                plgpu.barrier_wait(kv_ready.at[holder])
                if segments:
                    kv_segment = plgpu.layout_cast(kv_segment_smem.at[holder][...], by_row)

                def one_head(g, carry):
                    before, grads = carry
                    head = kv_head * group + g
                    steps, full_steps, first_query = walk_head(head)
                    bounds = key_bounds(first, ROWS, [mask_ref[head, n] for n in range(4)])

                    def step(t, grads, masked):
                        dk, dv = grads
                        slot = lax.rem(before + t, stages)
                        q_tile, d_out_tile = q_smem.at[slot], d_out_smem.at[slot]
                        plgpu.barrier_wait(q_ready.at[slot])
                        mine = anew(holder)
                        scores = multiply(k_smem.at[mine], q_tile.transpose((1, 0)))
                        lse = plgpu.layout_cast(lse_smem.at[slot][...], by_column)
                        exponents = scores * log2_scale - lax.broadcast_in_dim(lse, scores.shape, [1])
                        if segments:
                            q_segment = plgpu.layout_cast(q_segment_smem.at[slot][...], by_column)
                            exponents = jnp.where(same_segment(kv_segment, q_segment), exponents, -jnp.inf)
                        if masked:
                            seen = visible_to(bounds, first_query(t) + offset, tile_q)
                            exponents = jnp.where(seen, exponents, -jnp.inf)
                        weights = jnp.exp2(exponents)
                        plgpu.barrier_wait(d_out_ready.at[slot])
                        if make_dv:
                            dv = multiply_add(dv, weights.astype(q.dtype), d_out_tile, interpret=interpret)
                        if make_dk:
                            d_out_columns = d_out_tile.transpose((1, 0))
                            d_weights = multiply(v_smem.at[mine], d_out_columns)
                            delta = plgpu.layout_cast(delta_smem.at[slot][...], by_column)
                            d_scores = weights * (d_weights - lax.broadcast_in_dim(delta, scores.shape, [1]))
                        release(d_out_free.at[slot], interpret=interpret)
                        if make_dk:
                            dk = multiply_add(dk, d_scores.astype(q.dtype), q_tile, interpret=interpret)
                        release(q_free.at[slot], interpret=interpret)
                        return dk, dv

                    grads = lax.fori_loop(0, full_steps, functools.partial(step, masked=False), grads)
                    grads = lax.fori_loop(full_steps, steps, functools.partial(step, masked=True), grads)
                    return before + steps, grads

                def zeros():
                    return plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)

                grads = zeros() if make_dk else None, zeros() if make_dv else None
                _, (dk, dv) = lax.fori_loop(0, group, one_head, (jnp.int32(0), grads))

                # If the work is split, only the maker of dK reads V, but both read K: the maker of dV waits
                # for the other.
                k_tile, v_tile = k_smem.at[holder], v_smem.at[holder]
                if make_dk:
                    if split:
                        release(k_free, interpret=interpret)
                    v_tile[...] = (dk * scale).astype(k.dtype)
                if make_dv:
                    if split:
                        plgpu.barrier_wait(k_free)
                    k_tile[...] = dv.astype(k.dtype)
                plgpu.commit_smem()
                if make_dk:
                    plgpu.copy_smem_to_gmem(v_tile, dk_ref.at[b, keys, kv_head])
                if make_dv:
                    plgpu.copy_smem_to_gmem(k_tile, dv_ref.at[b, keys, kv_head])
                plgpu.wait_smem_to_gmem(0)

            if split:
                pl.when(warpgroup == 0)(lambda: compute(make_dk=True, make_dv=False))
                pl.when(warpgroup == 1)(lambda: compute(make_dk=False, make_dv=True))
            else:
                pl.when(warpgroup < warpgroups)(lambda: compute(make_dk=True, make_dv=True))

            @pl.when(warpgroup == warpgroups)
            def _memory():
                share_registers(warpgroups, compute=False)
                for holder in range(holders):
                    keys = pl.ds(tile * rows + holder * ROWS, ROWS)
                    for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                        source = ref.at[b, keys, kv_head]
                        plgpu.copy_gmem_to_smem(source, smem.at[holder], kv_ready.at[holder])
                    if segments:
                        ids = kv_segment_ref.at[b, keys]
                        plgpu.copy_gmem_to_smem(ids, kv_segment_smem.at[holder], kv_ready.at[holder])

                def one_head(g, before):
                    head = kv_head * group + g
                    steps, _, first_query = walk_head(head)

                    @pl.loop(0, steps)
                    def _(t):
                        queries = pl.ds(first_query(t), tile_q)
                        with_q = [(lse_ref.at[b, head, queries], lse_smem)]
                        if segments:
                            with_q.append((q_segment_ref.at[b, queries], q_segment_smem))
                        q_tile, d_out_tile = q_ref.at[b, queries, head], d_out_ref.at[b, queries, head]
                        delta_tile = delta_ref.at[b, head, queries]
                        bring(before + t, (q_tile, q_smem), *with_q, free=q_free, ready=q_ready)
                        bring(
                            before + t,
                            (d_out_tile, d_out_smem),
                            (delta_tile, delta_smem),
                            free=d_out_free,
                            ready=d_out_ready,
                        )

                    return before + steps

                lax.fori_loop(0, group, one_head, jnp.int32(0))

        transforms = tile_transforms(q.dtype)
        pl.run_scoped(
            body,
            plgpu.SMEM((holders, ROWS, head_dim), k.dtype, transforms=transforms),
            plgpu.SMEM((holders, ROWS, head_dim), v.dtype, transforms=transforms),
            plgpu.SMEM((stages, tile_q, head_dim), q.dtype, transforms=transforms),
            plgpu.SMEM((stages, tile_q, head_dim), d_out.dtype, transforms=transforms),
            plgpu.SMEM((stages, tile_q), jnp.float32),
            plgpu.SMEM((stages, tile_q), jnp.float32),
            plgpu.SMEM((holders, ROWS), jnp.int32) if segments else None,
            plgpu.SMEM((stages, tile_q), jnp.int32) if segments else None,
            (
                plgpu.Barrier(num_arrivals=3 if segments else 2, num_barriers=holders),
                plgpu.Barrier(num_arrivals=3 if segments else 2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier() if split else None,
            ),
            collective_axes="warpgroup",
        )

    dk, dv = launch(
        kernel,
        "backward_keys",
        warpgroups=warpgroups + 1,
        interpret=interpret,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)],
        grid=(batch, kv_heads, num_tiles),
        grid_names=("batch", "kv_heads", "keys"),
    )(q, k, v, d_out, lse, delta, *transposed, *heads, *(segments or ()))
    return dk, dv
