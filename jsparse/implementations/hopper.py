"""Attention on the Hopper kernels: what they can take, and how their arguments are made.

Four things stand between ``attention`` and a kernel. A length that TMA cannot copy, or a head_dim for which
there is no kernel, is padded with zeros. Lists and token masks become int32 arrays
(``jsparse.pallas_kernels.lists``). An axis that ``jax.vmap`` maps is folded into the batch, since TMA handles
five axes at most. And on a mesh each device runs the kernel on its own sequences and heads (``shard_map``),
since no compiler can look into a kernel to split it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.device import device_kind, kernel_limit
from jsparse.implementations.interface import Call, Visible
from jsparse.masks.block_mask import BlockMask, follow
from jsparse.masks.transposed import offset_entries, transposed_lists
from jsparse.mesh import split_over_mesh
from jsparse.pallas_kernels import measured
from jsparse.pallas_kernels.lists import HEAD_DIMS, UNLIMITED, Heads, Lists

_BLOCK = 64


def limit(call: Call, *, interpret: bool) -> str | None:
    """Why the kernels cannot take this call, or None if they can."""
    q, mask = call.q, call.visible
    if (reason := kernel_limit(interpret=interpret)) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16) and not (interpret and q.dtype == jnp.float32):
        return f"the GPU kernels take bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > HEAD_DIMS[-1]:
        return f"the GPU kernels take head_dim up to {HEAD_DIMS[-1]}, not {q.shape[-1]}"
    if isinstance(mask, BlockMask):
        for name, size in (("block_q", mask.block_q), ("block_kv", mask.block_kv)):
            if size % _BLOCK:
                return f"the GPU kernels take blocks of a multiple of {_BLOCK} tokens, not {name}={size}"
    if call.scale <= 0:
        return f"the GPU kernels take a positive scale, not {call.scale}"
    return None


def block_sizes(q_len: int, kv_len: int) -> tuple[int, int]:
    """(block_q, block_kv) of lists made for token masks: two warpgroups of 64 queries each share a list."""
    return 128, 128


def forward(q, k, v, visible: Visible, scale, q_segment_ids, kv_segment_ids, *, interpret: bool):
    """out [B, T, Hq, D] in q's dtype, lse [B, T, Hq] float32, natural logarithm."""
    from jsparse.pallas_kernels.hopper.forward import forward, forward_tiles

    mask = follow(visible, *block_sizes(visible.q_len, visible.kv_len))
    arrays, segments = _pad(q, k, v), _segments(q_segment_ids, kv_segment_ids)
    kernel = _kernel(forward, forward_tiles, arrays[0].shape[-1], mask, scale, interpret)
    out, lse = _launch(kernel, mask, _row_lists(mask), arrays, (), segments, ("bthd", "bht"))
    return out[:, : mask.q_len, :, : q.shape[-1]], lse[:, :, : mask.q_len].swapaxes(1, 2) * np.log(2)


def backward(q, k, v, visible: Visible, scale, q_ids, kv_ids, out, lse, d_out, d_lse, *, interpret: bool):
    """The gradients of q, k and v."""
    from jsparse.pallas_kernels.hopper.backward_keys import backward_keys, keys_tiles
    from jsparse.pallas_kernels.hopper.backward_queries import backward_queries, queries_tiles

    mask = follow(visible, *block_sizes(visible.q_len, visible.kv_len))
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    # Rows that see nothing, or only fill up the last block, have no weights: exp2(score - inf) = 0.
    padding = (0, 0), (0, 0), (0, -mask.q_len % math.lcm(128, mask.block_q))
    base2 = jnp.where(lse == -jnp.inf, jnp.inf, lse / np.log(2)).swapaxes(1, 2)
    base2 = jnp.pad(base2, padding, constant_values=jnp.inf)
    rows = base2, jnp.pad(delta.swapaxes(1, 2), padding)
    arrays, segments = _pad(q, k, v, d_out.astype(q.dtype)), _segments(q_ids, kv_ids)

    dim, padded = q.shape[-1], arrays[0].shape[-1]
    kernel = _kernel(backward_queries, queries_tiles, padded, mask, scale, interpret)
    (dq,) = _launch(kernel, mask, _row_lists(mask), arrays, rows, segments, ("bthd",))
    kernel = _kernel(backward_keys, keys_tiles, padded, mask, scale, interpret)
    dk, dv = _launch(kernel, mask, _column_lists(mask), arrays, rows, segments, ("bthd", "bthd"))
    return dq[:, : mask.q_len, :, :dim], dk[:, : mask.kv_len, :, :dim], dv[:, : mask.kv_len, :, :dim]


def _kernel(kernel: Callable, choose: Callable, head_dim: int, mask: BlockMask, scale, interpret) -> Callable:
    """The kernel as a function of arrays, lists, heads and segments only, which returns a tuple."""
    blocks = {"block_q": mask.block_q, "block_kv": mask.block_kv}
    tiles = measured.tiles(kernel.__name__, device_kind(), choose, head_dim=head_dim, **blocks)
    options = {"scale": scale, "offset": mask.kv_len - mask.q_len, "tiles": tiles} | blocks
    options["interpret"] = interpreter() if interpret else None

    def run(*operands, segments):
        results = kernel(*operands, segments=segments or None, **options)
        return results if isinstance(results, tuple) else (results,)

    return run


def interpreter():
    """How the kernels are interpreted: with the race detector, which costs little."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


def _pad(*arrays):
    """Pads to a multiple of 8 tokens, a tile's height in shared memory, and to the next head_dim of a kernel.

    No mask shows the added keys, and the results of the added queries are cut off.
    """
    dim = arrays[0].shape[-1]
    columns = next(size for size in HEAD_DIMS if size >= dim) - dim
    return tuple(jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, columns))) for x in arrays)


def _row_lists(mask: BlockMask) -> Lists:
    """For each block of queries, the blocks of keys; [1, R, nq] if all sequences share the lists."""
    shape = (-1, *mask.kv_start.shape[-2:])
    index = _not_empty(mask.kv_index)
    return Lists(index, *(x.reshape(shape) for x in (mask.kv_start, mask.kv_count, mask.kv_full_count)))


def _column_lists(mask: BlockMask) -> Lists:
    """For each block of keys, the blocks of queries; [1 or B, R, nkv]."""
    num_q, num_kv = mask.num_q_blocks, mask.num_kv_blocks
    start, count, full_count = (x.reshape(-1) for x in (mask.kv_start, mask.kv_count, mask.kv_full_count))
    num_rows = start.shape[0] // num_q
    offset = (np.arange(start.shape[0]) // num_q * num_kv).astype(np.int32)
    items = offset_entries(mask.kv_index, start, offset)
    owner, *columns = transposed_lists(items, start, count, full_count, num_rows * num_kv)
    shape = (-1, mask.kv_start.shape[-2], num_kv)
    return Lists(_not_empty(owner % num_q), *(x.reshape(shape) for x in columns))


def _not_empty(index):
    return index if index.shape[0] else np.zeros(1, np.int32)


def _heads(mask: BlockMask, num_q_heads: int) -> Heads:
    rows = mask.row_of_head(num_q_heads)
    of_row = [
        (
            0 if m.window is None else m.sink,
            UNLIMITED if m.window is None else min(m.window, UNLIMITED),
            UNLIMITED if m.group_size is None else min(m.group_size, UNLIMITED),
            m.group_shift,
        )
        for m in mask.token_masks
    ]
    return Heads(jnp.asarray(rows, jnp.int32), jnp.asarray([of_row[row] for row in rows], jnp.int32))


def _segments(q_ids, kv_ids) -> tuple:
    return () if q_ids is None else (q_ids, kv_ids)


def _launch(kernel: Callable, mask, lists: Lists, arrays, rows, segments, outputs: tuple[str, ...]) -> tuple:
    """The kernel's results, with mapped axes folded into the batch and each device computing its share.

    - arrays: [B, T or S, H, D].
    - rows: [B, Hq, Tp].
    - segments: [B, T] and [B, S], or none.
    - outputs: the axes of each result.
    """
    lists = Lists(*(jnp.asarray(x, jnp.int32) for x in lists))

    @jax.custom_batching.custom_vmap
    def call(arrays, rows, lists, segments):
        heads = _heads(mask, arrays[0].shape[2])
        operands = (arrays, rows, lists, heads, segments)
        of_list = "b.." if lists.start.shape[0] == arrays[0].shape[0] > 1 else "..."
        axes = (
            ("bthd",) * len(arrays),
            ("bht",) * len(rows),
            (".", of_list, of_list, of_list),
            ("h", "h."),
            ("b.",) * len(segments),
        )
        leaves, structure = jax.tree.flatten(operands)

        def run(*leaves):
            arrays, rows, lists, heads, segments = jax.tree.unflatten(structure, leaves)
            return kernel(*arrays, *rows, lists, heads, segments=segments)

        kv_heads = arrays[1].shape[2]
        return split_over_mesh(run, tuple(leaves), tuple(jax.tree.leaves(axes)), outputs, num_heads=kv_heads)

    @call.def_vmap
    def fold(size, mapped, arrays, rows, lists, segments):
        def merge(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        batch = arrays[0].shape[1 if mapped[0][0] else 0]
        arrays, rows, segments = (
            jax.tree.map(merge, values, flags)
            for values, flags in ((arrays, mapped[0]), (rows, mapped[1]), (segments, mapped[3]))
        )
        results = call(arrays, rows, _fold_lists(lists, mapped[2], size, batch), segments)
        return (
            tuple(x.reshape(size, -1, *x.shape[1:]) for x in results),
            (True,) * len(results),
        )

    return call(arrays, rows, lists, segments)


def _fold_lists(lists: Lists, mapped: Lists, size: int, batch: int) -> Lists:
    """The lists of ``size`` batches as those of one batch; lists that all sequences share stay shared."""
    if not any(mapped) and lists.start.shape[0] == 1:
        return lists
    index, *rest = (
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in zip(lists, mapped, strict=True)
    )
    shift = jnp.arange(size, dtype=jnp.int32)[:, None, None, None] * index.shape[1]
    rest = [rest[0] + shift, *rest[1:]]
    rest = [jnp.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(-1, *x.shape[2:]) for x in rest]
    return Lists(index.reshape(-1), *rest)
