"""What the attention kernels read to know where to go: lists of blocks, and what each head sees in them."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax import Array, lax

HEAD_DIMS = (64, 128, 256)  # that the kernels support

if TYPE_CHECKING:
    Arrays = Array | np.ndarray
else:
    Arrays = Any  # tree functions put flags and axes here, which a type checked at run time would refuse


class Lists(NamedTuple):
    """For each block of one side, the blocks of the other side to visit. All int32.

    List ``(b, r, i)`` is ``index[start[b, r, i] :][: count[b, r, i]]``; its first ``full_count[b, r, i]``
    blocks need no element mask.
    """

    index: Arrays  # [L], at least one entry
    start: Arrays  # [B or 1, R, n]
    count: Arrays
    full_count: Arrays


class Heads(NamedTuple):
    """What a kernel needs to know about each query head. All int32.

    A query at position ``q`` sees a key at ``k`` if ``k <= q``, and ``k < sink or k > q - window``, and
    ``k >= (q + shift) // size * size - shift``, the first position of the query's group.
    """

    row: Array  # [Hq], the row of lists that the head follows
    token_mask: Array  # [Hq, 4]: sink, window, group size and shift; UNLIMITED for no window and no groups


UNLIMITED = 1 << 30


def walk(lists: Any, batch, row, tile, *, rows: int, block: int, step: int, listed_block: int) -> tuple:
    """How a kernel follows the list of its ``tile`` of ``rows`` tokens, ``step`` tokens at a time.

    - lists: Lists of references. They list blocks of ``listed_block`` tokens, one list per ``block`` tokens.

    Returns the number of steps, how many steps at the start need no element mask, and ``first(t)``, the first
    token of step t.
    """
    steps_a_block = listed_block // step
    where = (batch if lists.start.shape[0] > 1 else 0, row, lax.div(tile, block // rows))
    start = lists.start[where]

    def first(t):
        listed = lists.index[start + lax.div(t, steps_a_block)]
        return listed * listed_block + lax.rem(t, steps_a_block) * step

    return lists.count[where] * steps_a_block, lists.full_count[where] * steps_a_block, first
