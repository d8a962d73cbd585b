"""What an implementation of attention is, and how one of a table is chosen for a call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jsparse.arrays import HostOrDevice
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import HeadMasks

# What an implementation is given: lists that a user made, or token masks, for which it makes its own lists.
Visible = BlockMask | HeadMasks


class Call(NamedTuple):
    """What the choice of an implementation depends on.

    - q [B, T, Hq, D], k [B, S, Hk, D]: arrays, or their shapes and dtypes.
    - visible: the mask.
    - scale: the factor of the scores.
    - segments: whether there are segment ids.
    - return_lse: whether lse is wanted.
    - devices: how many devices share the tokens of a sequence.
    """

    q: HostOrDevice
    k: HostOrDevice
    visible: Visible
    scale: float
    segments: bool = False
    return_lse: bool = False
    devices: int = 1


def no_limit(*call) -> None:
    """The limit of an implementation that takes every call."""
    return None


def always(*call) -> bool:
    """Tried for every call that names no implementation."""
    return True


def never(*call) -> bool:
    """Only for calls that name it."""
    return False


class Implementation(NamedTuple):
    """One way to compute attention: a row of the table.

    - name: what users call it.
    - forward: ``forward(q, k, v, visible, scale, q_segment_ids, kv_segment_ids)`` returns out [B, T, Hq, D]
      and lse [B, T, Hq], which may be None if ``limit`` refuses calls that want it.
    - backward: ``backward(the same, out, lse, d_out, d_lse)`` returns the gradients of q, k and v. None if
      JAX differentiates ``forward`` by itself.
    - block_sizes: ``block_sizes(q_len, kv_len)`` returns the (block_q, block_kv) of lists that suit it. None
      if it follows no lists: it then gets whole arrays, on a mesh too.
    - limit: ``limit(call)`` says why it cannot take a call, or returns None.
    - by_default: ``by_default(call)`` says whether it is tried for calls that name no implementation.
    """

    name: str
    forward: Callable
    backward: Callable | None = None
    block_sizes: Callable[[int, int], tuple[int, int]] | None = None
    limit: Callable[..., str | None] = no_limit
    by_default: Callable[..., bool] = always


def choose(table: Sequence[Any], name: str | None, *call) -> Any:
    """The row of this name, or, if it is None, the first row that is tried by default and can take the call.

    - table: rows with ``name``, ``limit(*call)`` and ``by_default(*call)``, in order of preference.
    - name: the implementation that was asked for, or None.
    - call: what the choice depends on.

    Raises ValueError for a name that no row has. Raises NotImplementedError, which says why, if the row that
    was asked for cannot take the call.

    >>> table = (Implementation("fast", print, limit=lambda n: "too long" if n > 4 else None),
    ...          Implementation("slow", print))
    >>> [choose(table, None, n).name for n in (4, 5)]
    ['fast', 'slow']
    """
    names = tuple(row.name for row in table)
    if name is not None and name not in names:
        raise ValueError(f"implementation must be None or one of {names}, not {name!r}")
    reasons = []
    for row in table:
        if row.name == name or (name is None and row.by_default(*call)):
            if (reason := row.limit(*call)) is None:
                return row
            reasons.append(f"implementation={row.name!r}: {reason}")
    raise NotImplementedError("; ".join(reasons))
