"""The portable implementation on each device's own sequences and heads, if a mesh is in context.

XLA would by itself split what ``passes.py`` computes. But it cannot see that the items of a list stay with
their sequence and head, and would gather them. So each device's share is cut as for the GPU kernels.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsparse.implementations.interface import Visible
from jsparse.implementations.xla import items, passes
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import HeadMasks
from jsparse.mesh import split_over_mesh

_LISTS = ("kv_index", "kv_start", "kv_count", "kv_full_count")


def forward(q, k, v, visible: Visible, scale, q_segment_ids, kv_segment_ids):
    """What ``passes.forward`` computes."""

    def run(visible, q, k, v, q_ids, kv_ids):
        return passes.forward(q, k, v, visible, scale, q_ids, kv_ids)

    return _split(run, visible, (q, k, v, q_segment_ids, kv_segment_ids), ("bthd", "bth"))


def backward(q, k, v, visible: Visible, scale, q_segment_ids, kv_segment_ids, out, lse, d_out, d_lse):
    """What ``passes.backward`` computes."""

    def run(visible, q, k, v, q_ids, kv_ids, out, lse, d_out, d_lse):
        return passes.backward(q, k, v, visible, scale, q_ids, kv_ids, out, lse, d_out, d_lse)

    operands = q, k, v, q_segment_ids, kv_segment_ids, out, lse, d_out, d_lse
    return _split(run, visible, operands, ("bthd", "bthd", "bthd"))


def _split(run: Callable, visible: Visible, operands, outputs: tuple[str, ...]) -> tuple:
    """``run(what a device's own heads and sequences see, *its share of the operands)`` on each device."""
    visible = items.in_own_blocks(visible)
    kv_heads = shares = operands[1].shape[2]
    lists, list_axes = {}, {}  # lists known while tracing and the same for all are compiled in
    if isinstance(visible, BlockMask):
        own_rows = visible.head_rows is None and len(visible.token_masks) > 1  # shared evenly and in order
        lists = {name: getattr(visible, name) for name in _LISTS}
        if not own_rows and not any(isinstance(x, jax.Array) for x in lists.values()):
            lists = {}
        row_axes = ("b" if visible.kv_start.ndim == 3 else "") + ("h" if own_rows else ".") + "."
        list_axes = {name: "." if name == "kv_index" else row_axes for name in lists}
        if own_rows:  # every device must get whole rows
            shares = min(kv_heads, len(visible.token_masks))
    leaves, structure = jax.tree.flatten((operands, lists, jnp.arange(kv_heads)))

    def run_share(*leaves):
        operands, lists, heads = jax.tree.unflatten(structure, leaves)
        share = _with_lists(visible, lists) if isinstance(visible, BlockMask) and lists else visible
        rows = share.head_rows if isinstance(share, BlockMask) else share.masks
        if not isinstance(rows, tuple) or heads.shape[0] == kv_heads:
            return run(share, *operands)
        count = len(rows) // (kv_heads // heads.shape[0])
        return switch(
            heads[0] // heads.shape[0],
            [rows[first : first + count] for first in range(0, len(rows), count)],
            lambda rows: lambda *operands: run(_of_heads(share, rows), *operands),
            *operands,
        )

    axes = ["bthd"[: x.ndim] for x in jax.tree.leaves(operands)] + jax.tree.leaves(list_axes) + ["h"]
    return split_over_mesh(run_share, tuple(leaves), tuple(axes), outputs, num_heads=shares)


def _with_lists(mask: BlockMask, lists: dict) -> BlockMask:
    """The mask with a device's share of its lists."""
    num_rows = lists["kv_start"].shape[-2]
    return dataclasses.replace(mask, **lists, token_masks=mask.token_masks[:num_rows])


def _of_heads(visible: Visible, rows: tuple) -> Visible:
    """What some heads see, without the rows of others. ``rows`` are their token masks or rows of lists."""
    if isinstance(visible, HeadMasks):
        return dataclasses.replace(visible, masks=rows)
    followed = sorted(set(rows))
    chosen = np.asarray(followed, np.int32)
    return dataclasses.replace(
        visible,
        kv_start=visible.kv_start[chosen],
        kv_count=visible.kv_count[chosen],
        kv_full_count=visible.kv_full_count[chosen],
        head_rows=tuple(followed.index(row) for row in rows),
        token_masks=tuple(visible.token_masks[row] for row in followed),
    )


def switch(index, cases: list, branch: Callable[..., Callable], *operands):
    """``branch(cases[index])(*operands)``: a ``lax.switch`` with one branch for each distinct case.

    >>> bool(switch(jnp.int32(1), ["sin", "cos", "sin"], lambda name: getattr(jnp, name), 0.0) == 1)
    True
    """
    distinct = list(dict.fromkeys(cases))
    if len(distinct) == 1:
        return branch(distinct[0])(*operands)
    which = jnp.asarray([distinct.index(case) for case in cases])[index]
    return lax.switch(which, [branch(case) for case in distinct], *operands)
