"""What the attention kernels read to know where to go: lists of blocks, and what each head sees in them."""

from typing import NamedTuple

from jax import Array


class Lists(NamedTuple):
    """For each block of one side, the blocks of the other side to visit. All int32.

    List ``(b, r, i)`` is ``index[start[b, r, i] :][: count[b, r, i]]``; its first ``full_count[b, r, i]``
    blocks need no element mask.
    """

    index: Array  # [L], at least one entry
    start: Array  # [B or 1, R, n]
    count: Array
    full_count: Array


class Heads(NamedTuple):
    """What a kernel has to know of each query head. All int32.

    A query at position ``q`` sees a key at ``k`` where ``k <= q``, and ``k < sink or k > q - window``, and
    ``k >= (q + shift) // size * size - shift``, the first position of the query's group.
    """

    row: Array  # [Hq], the row of lists that the head follows
    token_mask: Array  # [Hq, 4]: sink, window, group size and shift; UNLIMITED for no window and no groups


UNLIMITED = 1 << 30
