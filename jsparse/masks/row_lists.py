"""The lists of one token mask in closed form, and which blocks it shows whole."""

import numpy as np

from jsparse.integers import cdiv


def row_lists(mask, q_len, kv_len, block_q, block_kv):
    """(index [L], count [nq], full_count [nq]) of one token mask: all full blocks of a list come first.

    The keys that a block of queries at positions first..last sees form two intervals, the sinks and the rest,
    cut at the start of the first query's group. The blocks that every query sees whole form two intervals
    within them. So a list is six ranges of blocks: two full ones, and the four that they leave of the visible
    ones.
    """
    block = np.arange(cdiv(q_len, block_q), dtype=np.int64)
    first = block * block_q + kv_len - q_len
    last = np.minimum((block + 1) * block_q, q_len) - 1 + kv_len - q_len
    window = kv_len if mask.window is None else mask.window
    sink = 0 if mask.window is None else mask.sink

    def group_start(position):
        if mask.group_size is None:
            return np.zeros_like(position)
        start = (position + mask.group_shift) // mask.group_size * mask.group_size - mask.group_shift
        return np.maximum(start, 0)

    # Blocks with something to see: [sink_lo, sink_hi) and [rest_lo, end). Queries before key 0 see nothing.
    seeing = np.maximum(first, 0)
    lowest = group_start(seeing)
    end = np.where(last < 0, 0, last // block_kv + 1)
    sink_end = np.minimum(sink, last + 1)
    sink_lo = np.minimum(lowest // block_kv, end)
    sink_hi = np.where(sink_end > lowest, -(-sink_end // block_kv), sink_lo)
    rest_lo = np.minimum(np.maximum(lowest, seeing - window + 1) // block_kv, end)

    # Blocks that all queries see whole: [full_a_lo, full_a_hi) among the sinks, [full_b_lo, full_b_hi) after.
    full_lo = -(-group_start(last) // block_kv)
    full_hi = np.maximum((first + 1) // block_kv, 0)
    window_lo = last - window + 1
    all_visible = window_lo <= sink
    full_a_lo = np.minimum(full_lo, full_hi)
    full_a_hi = np.where(all_visible, full_a_lo, np.clip(sink // block_kv, full_a_lo, full_hi))
    full_b_lo = np.where(all_visible, full_a_lo, np.maximum(full_a_hi, -(-window_lo // block_kv)))
    full_b_lo = np.maximum(full_b_lo, full_a_hi)
    full_b_hi = np.maximum(full_hi, full_b_lo)

    # An empty full range may lie anywhere: move it to the edge of what is visible.
    no_a, no_b = full_a_hi <= full_a_lo, full_b_hi <= full_b_lo
    full_a_lo, full_a_hi = np.where(no_a, sink_lo, full_a_lo), np.where(no_a, sink_lo, full_a_hi)
    full_b_lo, full_b_hi = np.where(no_b, end, full_b_lo), np.where(no_b, end, full_b_hi)

    # There is a gap between the sinks and the rest, unless they touch.
    touching = sink_hi >= rest_lo
    lo = np.where(touching, np.minimum(sink_lo, rest_lo), sink_lo)
    gap_lo = np.where(touching, full_a_hi, sink_hi)
    gap_hi = np.where(touching, full_a_hi, rest_lo)
    ranges = [
        (full_a_lo, full_a_hi),
        (full_b_lo, full_b_hi),
        (lo, full_a_lo),
        (full_a_hi, gap_lo),
        (gap_hi, full_b_lo),
        (full_b_hi, end),
    ]
    range_lo = np.stack([lo for lo, _ in ranges], axis=1)
    size = np.maximum(np.stack([hi for _, hi in ranges], axis=1) - range_lo, 0).astype(np.int32)
    offset = np.cumsum(size.reshape(-1)) - size.reshape(-1)
    shift = (range_lo.reshape(-1) - offset).astype(np.int32)
    index = np.arange(size.sum(), dtype=np.int32) + np.repeat(shift, size.reshape(-1))
    return index, size.sum(axis=1, dtype=np.int32), size[:, :2].sum(axis=1, dtype=np.int32)


def wholly_visible(mask, q_block, kv_block, q_len, kv_len, block_q, block_kv):
    """Whether every query of ``q_block`` sees every key of ``kv_block``, elementwise over block numbers."""
    first, last = q_block * block_q, np.minimum((q_block + 1) * block_q, q_len) - 1
    first, last = first + kv_len - q_len, last + kv_len - q_len
    low, high = kv_block * block_kv, (kv_block + 1) * block_kv - 1
    # Causality hides the most from the first query, a window or a group from the last. A block that reaches
    # past the last key also reaches past the first query, so it is never whole.
    whole = high <= first
    if mask.window is not None:
        start = last - mask.window + 1  # of the last query's window
        whole = whole & ((high < mask.sink) | (low >= start) | (mask.sink >= start))
    if mask.group_size is not None:
        group = (low + mask.group_shift) // mask.group_size
        whole = whole & (group == (last + mask.group_shift) // mask.group_size)
    return whole
