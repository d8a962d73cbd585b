"""Names for the arrays in dataclasses that are pytrees, and taking heads of an array.

Tree functions put shapes, placeholders and shardings where arrays stand, and rebuild the dataclass with them.
A type checked at run time would refuse those, so the names below say to readers and to a type checker what a
field holds, and nothing at run time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

AnyArray = jax.Array | np.ndarray

if TYPE_CHECKING:
    # Of any shape; the field's comment gives it. Known while tracing, or perhaps not.
    DeviceArray = Array
    HostOrDevice = Array | np.ndarray
else:
    DeviceArray = HostOrDevice = Any


def take_heads(x: Any, heads: Sequence[int]) -> Any:
    """``x[:, :, heads]`` of ``[B, T, H, ...]``; heads in order, one after another, are a slice.

    >>> take_heads(np.arange(4).reshape(1, 1, 4), (1, 2)).tolist()
    [[[1, 2]]]
    """
    first, last = heads[0], heads[0] + len(heads)
    if list(heads) != list(range(first, last)):
        return x[:, :, np.asarray(heads)]
    return x if last - first == x.shape[2] else x[:, :, first:last]
