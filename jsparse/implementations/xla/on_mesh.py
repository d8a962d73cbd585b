"""The portable implementation on each device's own sequences and heads, where a mesh is in context.

XLA would split what ``passes.py`` computes by itself, but it cannot see that the items of a list stay with
their sequence and head, and gathers them. So the mesh's shares are cut as for the GPU kernels.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsparse.implementations.xla import passes
from jsparse.masks.block_mask import BlockMask
from jsparse.mesh import split_over_mesh


def forward(q, k, v, mask: BlockMask, scale, q_segment_ids, kv_segment_ids):
    """What ``passes.forward`` computes."""

    def run(mask, q, k, v, q_ids, kv_ids):
        return passes.forward(q, k, v, mask, scale, q_ids, kv_ids)

    return _split(run, mask, (q, k, v, q_segment_ids, kv_segment_ids), ("bthd", "bth"))


def backward(q, k, v, mask: BlockMask, scale, q_segment_ids, kv_segment_ids, out, lse, d_out, d_lse):
    """What ``passes.backward`` computes."""

    def run(mask, q, k, v, q_ids, kv_ids, out, lse, d_out, d_lse):
        return passes.backward(q, k, v, mask, scale, q_ids, kv_ids, out, lse, d_out, d_lse)

    operands = q, k, v, q_segment_ids, kv_segment_ids, out, lse, d_out, d_lse
    return _split(run, mask, operands, ("bthd", "bthd", "bthd"))


def _split(run: Callable, mask: BlockMask, operands, outputs: tuple[str, ...]) -> tuple:
    """run(the mask of a device's own heads and sequences, *its share of the operands)."""
    kv_heads, num_rows = operands[1].shape[2], mask.kv_start.shape[-2]
    own_rows = mask.head_rows is None and num_rows > 1  # shared by the heads evenly and in order
    lists = {name: getattr(mask, name) for name in ("kv_index", "kv_start", "kv_count", "kv_full_count")}
    if not (own_rows or any(isinstance(x, jax.Array) for x in lists.values())):
        lists = {}  # known while tracing and the same for all: compiled in
    leaves, structure = jax.tree.flatten((operands, lists, jnp.arange(kv_heads)))

    def run_share(*leaves):
        operands, lists, heads = jax.tree.unflatten(structure, leaves)
        share = dataclasses.replace(mask, **lists)
        if mask.head_rows is None or heads.shape[0] == kv_heads:
            rows = share.kv_start.shape[-2]
            return run(dataclasses.replace(share, token_masks=mask.token_masks[:rows]), *operands)
        head_rows = np.reshape(mask.head_rows, (kv_heads // heads.shape[0], -1)).tolist()
        return switch(
            heads[0] // heads.shape[0],
            [tuple(rows) for rows in head_rows],
            lambda rows: lambda *operands: run(_of_heads(share, rows), *operands),
            *operands,
        )

    row_axes = ("b" if mask.kv_start.ndim == 3 else "") + ("h" if own_rows else ".") + "."
    axes = ["bthd"[: x.ndim] for x in jax.tree.leaves(operands)]
    axes += jax.tree.leaves({name: "." if name == "kv_index" else row_axes for name in lists}) + ["h"]
    # Every device must get whole rows.
    shares = min(kv_heads, num_rows) if own_rows else kv_heads
    return split_over_mesh(run_share, tuple(leaves), tuple(axes), outputs, num_heads=shares)


def _of_heads(mask: BlockMask, head_rows: tuple[int, ...]) -> BlockMask:
    """The mask of these heads alone, without the rows of others."""
    rows = sorted(set(head_rows))
    return dataclasses.replace(
        mask,
        kv_start=mask.kv_start[np.asarray(rows)],
        kv_count=mask.kv_count[np.asarray(rows)],
        kv_full_count=mask.kv_full_count[np.asarray(rows)],
        head_rows=tuple(rows.index(row) for row in head_rows),
        token_masks=tuple(mask.token_masks[row] for row in rows),
    )


def switch(index, cases: list, branch: Callable[..., Callable], *operands):
    """``branch(cases[index])(*operands)``: a ``lax.switch`` that has a branch only for each distinct case.

    >>> bool(switch(jnp.int32(1), ["sin", "cos", "sin"], lambda name: getattr(jnp, name), 0.0) == 1)
    True
    """
    distinct = list(dict.fromkeys(cases))
    if len(distinct) == 1:
        return branch(distinct[0])(*operands)
    which = jnp.asarray([distinct.index(case) for case in cases])[index]
    return lax.switch(which, [branch(case) for case in distinct], *operands)
