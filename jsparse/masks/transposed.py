"""Lists of key blocks turned into lists of query blocks, and block numbers into item numbers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int


def transposed_lists(
    kv_item: Int[Any, " L"],
    start: Int[Any, " N"],
    count: Int[Any, " N"],
    full_count: Int[Any, " N"],
    num_kv_items: int,
) -> tuple[Any, Any, Any, Any]:
    """For each KV block, the query blocks that list it: (q_index [L], q_start, q_count, q_full_count).

    ``kv_item`` holds the KV block of each list entry. Arrays may be NumPy or traced. Wholly visible blocks
    still come first in each list. Entries that no list reaches (padding) come last, in no list.
    """
    xp = np if all(isinstance(x, np.ndarray) for x in (kv_item, start, count, full_count)) else jnp
    entry = xp.arange(kv_item.shape[0], dtype=np.int32)
    # Starts never decrease, and among lists with the same start only the last can have entries. Entries
    # before the first start, or past the end of their list, belong to no list.
    owner = (xp.searchsorted(start, entry, side="right") - 1).astype(np.int32)
    offset = xp.where(owner < 0, np.iinfo(np.int32).max, entry - start[owner])
    listed, full = offset < count[owner], offset < full_count[owner]
    key = xp.where(listed, 2 * kv_item + 1 - full, 2 * num_kv_items)
    ordered = xp.argsort(key, stable=True)
    key = key[ordered]
    edges = xp.searchsorted(key, xp.arange(2 * num_kv_items + 1, dtype=key.dtype)).astype(np.int32)
    begin, middle, end = edges[:-1:2], edges[1::2], edges[2::2]
    return owner[ordered], begin, end - begin, middle - begin


def offset_entries(index: Int[Any, " L"], start: Int[Any, " N"], offset: Int[Any, " N"]) -> Any:
    """Adds offset[n] to the entries of list n, which turns block numbers into item numbers."""
    if not np.any(offset):
        return index
    xp = np if isinstance(index, np.ndarray) and isinstance(start, np.ndarray) else jnp
    owner = xp.searchsorted(start, xp.arange(index.shape[0], dtype=np.int32), side="right") - 1
    return index + xp.asarray(offset)[owner]
