"""The element mask inside a kernel, on tiles of scores in the layout of a wgmma accumulator."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def row_bounds(first_position, rows: int, token_mask):
    """What ``visible`` has to know of ``rows`` queries from a position on: made once, before the loop.

    token_mask: sink, window, group size and group shift, scalars.
    """
    sink, window, size, shift = token_mask
    q = first_position + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    group_start = lax.div(q + shift, size) * size - shift
    return q, q - window, group_start, sink


def visible(bounds, first_key, keys: int):
    """Which of ``keys`` keys from ``first_key`` on the rows see, bool [rows, keys]."""
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
