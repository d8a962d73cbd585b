"""The element mask inside a kernel, on tiles of scores in the layout of a wgmma accumulator."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def row_bounds(first_position, rows: int, token_mask):
    """What ``visible`` needs to know about ``rows`` queries from a position on; made once, before the loop.

    token_mask: sink, window, group size and group shift, scalars.
    """
    sink, window, size, shift = token_mask
    q = first_position + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    group_start = lax.div(q + shift, size) * size - shift
    return q, q - window, group_start, sink


def visible(bounds, first_key, keys: int):
    """Which of the ``keys`` keys from ``first_key`` on each row sees, bool [rows, keys]."""
    q, window_end, group_start, sink = bounds
    shape = (q.shape[0], keys)

    def by_row(x):
        return lax.broadcast_in_dim(x, shape, [0])

    k = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return ((k < sink) | (k > by_row(window_end))) & (k <= by_row(q)) & (k >= by_row(group_start))


def same_segment(row_segment, column_segment):
    """bool [rows, columns], from the segment ids of the rows and of the columns."""
    shape = (row_segment.shape[0], column_segment.shape[0])
    return lax.broadcast_in_dim(row_segment, shape, [0]) == lax.broadcast_in_dim(column_segment, shape, [1])


def key_bounds(first_key, rows: int, token_mask):
    """What ``visible_to`` needs to know about ``rows`` keys from ``first_key`` on: which queries see each.

    They are one interval. It starts at the key's own position and ends where its group or window ends; for a
    sink, where its group ends.
    """
    sink, window, size, shift = token_mask
    k = first_key + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    group_end = (lax.div(k + shift, size) + 1) * size - shift
    return k, jnp.where(k < sink, group_end, jnp.minimum(group_end, k + window))


def visible_to(bounds, first_position, queries: int):
    """Which of the ``queries`` queries from a position on see each key, bool [keys, queries]."""
    k, end = bounds
    shape = (k.shape[0], queries)

    def by_row(x):
        return lax.broadcast_in_dim(x, shape, [0])

    q = first_position + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return (by_row(k) <= q) & (q < by_row(end))


def pad_segments(q_ids: Array, kv_ids: Array, q_len: int, kv_len: int) -> tuple[Array, Array]:
    """Whole tiles of segment ids. The ids of the padding do not matter, since no mask shows it."""
    q_ids = jnp.pad(q_ids.astype(jnp.int32), ((0, 0), (0, q_len - q_ids.shape[1])))
    return q_ids, jnp.pad(kv_ids.astype(jnp.int32), ((0, 0), (0, kv_len - kv_ids.shape[1])))
