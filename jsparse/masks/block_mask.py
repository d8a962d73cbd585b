"""For each head and each block of queries, the list of key blocks to visit."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from jsparse.masks.token_mask import TokenMask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_index", "kv_start", "kv_count", "kv_full_count"],
    meta_fields=["q_len", "kv_len", "block_q", "block_kv", "head_rows", "token_masks"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of key blocks, one list for each mask row and query block. A pytree.

    A query sees a key where the key's block is listed for the query's block *and* the row's ``TokenMask``
    shows it. Queries are aligned to the end of the keys: query ``t`` stands at position ``t + kv_len -
    q_len``.

    The lists lie one after another in one flat array, so that a head that visits four blocks a row does not
    pad to a head that visits a thousand. With ``R`` rows and ``nq = ceil(q_len / block_q)``:

    - ``kv_index`` int32 [L]: the block numbers of all lists;
    - ``kv_start``, ``kv_count`` int32 [R, nq] or [B, R, nq]: list ``(r, i)`` is
      ``kv_index[kv_start[r, i] : kv_start[r, i] + kv_count[r, i]]``, in which no block stands twice;
    - ``kv_full_count``, of the same shape: that many blocks at the head of the list are wholly visible and
      need no element mask (segment ids aside).

    Static: the lengths, the block sizes, ``token_masks`` (one a row), and ``head_rows``, the row of each
    query head. ``head_rows`` None means that the query heads share the rows evenly and in order, which fits
    one row for all heads, one a KV head, or one a query head.

    Lists made from token masks are NumPy arrays: known while tracing, and compiled in. Lists from
    ``from_indices`` are JAX arrays, perhaps traced: other lists of the same capacity compile nothing. Two
    masks are equal only if they are the same object.
    """

    kv_index: Any
    kv_start: Any
    kv_count: Any
    kv_full_count: Any
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    head_rows: tuple[int, ...] | None
    token_masks: tuple[TokenMask, ...]

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    @staticmethod
    def from_token_masks(
        masks: TokenMask | Sequence[TokenMask],
        q_len: int,
        kv_len: int,
        *,
        block_q: int = 128,
        block_kv: int = 128,
    ) -> "BlockMask":
        """The blocks in which a token mask shows at least one key to at least one query.

        Computed in closed form: time and memory are those of the lists, and no array of T x T elements, nor
        of T / block x T / block blocks, is ever made. Heads with equal masks share a row.

        masks: one for all query heads, or one a query head.

        >>> from jsparse import streaming
        >>> mask = BlockMask.from_token_masks(streaming(sink=1, window=4), 16, 16, block_q=4, block_kv=4)
        >>> mask.kv_index.tolist(), mask.kv_count.tolist(), mask.kv_full_count.tolist()
        ([0, 0, 1, 0, 1, 2, 0, 2, 3], [[1, 2, 3, 3]], [[0, 0, 0, 0]])
        """
        masks = masks if isinstance(masks, TokenMask) else tuple(masks)
        _check_geometry(q_len, kv_len, block_q, block_kv)
        return _from_token_masks(masks, q_len, kv_len, block_q, block_kv)

    @staticmethod
    def from_indices(
        kv_index: Int[Any, "*R nq M"],
        kv_count: Int[Any, "*R nq"],
        *,
        q_len: int,
        kv_len: int,
        block_q: int,
        block_kv: int,
        token_mask: TokenMask = TokenMask(),
        kv_full_count: Int[Any, "*R nq"] | None = None,
    ) -> "BlockMask":
        """The lists that a selector chose, at a fixed capacity of M blocks a list.

        kv_index [R, nq, M] or [B, R, nq, M]: block numbers, all different within a list; what stands at and
        after ``kv_count`` is not read. kv_count [R, nq] or [B, R, nq]. R rows: one for all heads, one a KV
        head or one a query head. ``token_mask`` applies inside the listed blocks, save the first
        ``kv_full_count`` (of kv_count's shape; none if None) of each list: these every query of the block
        sees whole, and their element mask is skipped.

        Raises ValueError for shapes that do not fit, and, where the arrays are not traced, for a count beyond
        M, a block number out of range, one listed twice, or one called wholly visible that is not. Traced
        lists cannot be checked: the caller answers for them.

        >>> index, count = np.array([[[0, -1], [1, 0]]]), np.array([[1, 2]])
        >>> BlockMask.from_indices(index, count, q_len=8, kv_len=8, block_q=4, block_kv=4).kv_start.tolist()
        [[0, 2]]
        """
        _check_geometry(q_len, kv_len, block_q, block_kv)
        nq = -(-q_len // block_q)
        shape = tuple(kv_index.shape)
        if len(shape) not in (3, 4) or shape[-2] != nq or shape[-1] < 1:
            raise ValueError(
                f"kv_index must be [R, {nq}, M] or [B, R, {nq}, M] for q_len={q_len}, not {list(shape)}"
            )
        if tuple(kv_count.shape) != shape[:-1]:
            raise ValueError(
                f"kv_count must be {list(shape[:-1])} for this kv_index, not {list(kv_count.shape)}"
            )
        if kv_full_count is None:
            kv_full_count = np.zeros(shape[:-1], np.int32)
        if tuple(kv_full_count.shape) != shape[:-1]:
            raise ValueError(
                f"kv_full_count must be {list(shape[:-1])} like kv_count, not {list(kv_full_count.shape)}"
            )
        capacity = shape[-1]
        lists = kv_index, kv_count, kv_full_count
        if not any(isinstance(x, Tracer) for x in lists):
            index, count, full = (np.asarray(x) for x in lists)
            _check_lists(index, count, full, token_mask, q_len, kv_len, block_q, block_kv)
        starts = np.arange(0, np.prod(shape), capacity, dtype=np.int32).reshape(shape[:-1])
        return BlockMask(
            kv_index=jnp.asarray(kv_index, jnp.int32).reshape(-1),
            kv_start=jnp.asarray(starts),
            kv_count=jnp.asarray(kv_count, jnp.int32),
            kv_full_count=jnp.asarray(kv_full_count, jnp.int32),
            q_len=q_len,
            kv_len=kv_len,
            block_q=block_q,
            block_kv=block_kv,
            head_rows=None,
            token_masks=(token_mask,) * shape[-3],
        )


def build_block_mask(masks, q_len: int, kv_len: int, block_q: int, block_kv: int) -> BlockMask:
    """What ``BlockMask.from_token_masks`` gives, made anew at each call."""
    per_head = (masks,) if isinstance(masks, TokenMask) else masks
    if not per_head or not all(isinstance(mask, TokenMask) for mask in per_head):
        raise ValueError(f"masks must be a TokenMask or a sequence of them, one a query head, not {masks!r}")
    rows = tuple(dict.fromkeys(per_head))
    lists = [_row_lists(mask, q_len, kv_len, block_q, block_kv) for mask in rows]
    counts = np.stack([count for _, count, _ in lists])
    starts = np.cumsum(counts.reshape(-1), dtype=np.int64) - counts.reshape(-1)
    if starts[-1] + counts[-1, -1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"the lists hold more than 2**31 blocks: raise block_q={block_q} or block_kv={block_kv}"
        )
    return BlockMask(
        kv_index=np.concatenate([index for index, _, _ in lists]),
        kv_start=starts.reshape(counts.shape).astype(np.int32),
        kv_count=counts,
        kv_full_count=np.stack([full for _, _, full in lists]),
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        head_rows=None if isinstance(masks, TokenMask) else tuple(rows.index(mask) for mask in per_head),
        token_masks=rows,
    )


# The same object for the same masks, so that nothing compiles twice.
_from_token_masks = functools.lru_cache(maxsize=16)(build_block_mask)


def _row_lists(mask, q_len, kv_len, block_q, block_kv):
    """(index [L], count [nq], full_count [nq]) of one token mask: all full blocks of a list come first.

    The keys that a block of queries at positions first..last sees are two intervals, the sinks and the rest,
    cut at the start of the first query's group. Of those blocks, the ones that every query sees whole are two
    intervals again. So a list is six ranges of blocks: two full ones, and what they leave over of the visible
    ones.
    """
    block = np.arange(-(-q_len // block_q), dtype=np.int64)
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

    # Blocks that all queries see whole: [full_a_lo, full_a_hi) among the sinks and [full_b_lo, full_b_hi)
    # after.
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

    # Between the sinks and the rest is a gap, unless they touch.
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


def _check_geometry(q_len, kv_len, block_q, block_kv):
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("block_q", block_q), ("block_kv", block_kv)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")


def _check_lists(kv_index, kv_count, kv_full_count, token_mask, q_len, kv_len, block_q, block_kv):
    capacity, num_kv_blocks = kv_index.shape[-1], -(-kv_len // block_kv)
    if kv_count.min() < 0 or kv_count.max() > capacity:
        raise ValueError(f"kv_count must lie in 0..{capacity}, not {kv_count.min()}..{kv_count.max()}")
    listed = np.arange(capacity) < kv_count[..., None]
    if not np.all((kv_index >= 0) & (kv_index < num_kv_blocks) | ~listed):
        wrong = kv_index[listed & ((kv_index < 0) | (kv_index >= num_kv_blocks))][0]
        raise ValueError(f"kv_index lists block {wrong}, but the blocks are 0..{num_kv_blocks - 1}")
    in_order = np.sort(np.where(listed, kv_index, num_kv_blocks + np.arange(capacity)), axis=-1)
    if np.any(in_order[..., 1:] == in_order[..., :-1]):
        raise ValueError("kv_index lists a block twice for one query block")

    wrong = (kv_full_count < 0) | (kv_full_count > kv_count)
    if np.any(wrong):
        raise ValueError(
            f"kv_full_count must lie in 0..kv_count, not {kv_full_count[wrong][0]} of {kv_count[wrong][0]}"
        )
    q_block = np.broadcast_to(np.arange(kv_index.shape[-2])[:, None], kv_index.shape)
    whole = _wholly_visible(token_mask, q_block, kv_index, q_len, kv_len, block_q, block_kv)
    wrong = (np.arange(capacity) < kv_full_count[..., None]) & ~whole
    if np.any(wrong):
        raise ValueError(
            f"kv_full_count calls block {kv_index[wrong][0]} wholly visible for query block "
            f"{q_block[wrong][0]}, but {token_mask} hides a part of it"
        )


def _wholly_visible(mask, q_block, kv_block, q_len, kv_len, block_q, block_kv):
    """Where every query of a block sees every key of another, elementwise over block numbers."""
    first, last = q_block * block_q, np.minimum((q_block + 1) * block_q, q_len) - 1
    first, last = first + kv_len - q_len, last + kv_len - q_len
    low, high = kv_block * block_kv, (kv_block + 1) * block_kv - 1
    # Causality hides the most from the first query, a window or a group from the last. A block that ends past
    # the keys ends past the first query too.
    whole = high <= first
    if mask.window is not None:
        start = last - mask.window + 1  # of the last query's window
        whole = whole & ((high < mask.sink) | (low >= start) | (mask.sink >= start))
    if mask.group_size is not None:
        group = (low + mask.group_shift) // mask.group_size
        whole = whole & (group == (last + mask.group_shift) // mask.group_size)
    return whole


def transposed_lists(
    kv_item: Int[Any, " L"],
    start: Int[Any, " N"],
    count: Int[Any, " N"],
    full_count: Int[Any, " N"],
    num_kv_items: int,
) -> tuple[Any, Any, Any, Any]:
    """For each KV block, the query blocks that list it: (q_index [L], q_start, q_count, q_full_count).

    kv_item holds the KV block of each list entry. Arrays may be NumPy or traced; lists of wholly visible
    blocks stay in front. Entries that no list reaches (padding) come last, in no list.
    """
    xp = np if all(isinstance(x, np.ndarray) for x in (kv_item, start, count, full_count)) else jnp
    entry = xp.arange(kv_item.shape[0], dtype=np.int32)
    # Starts never fall, and of lists with the same start only the last can have entries. Entries before the
    # first start, or past the end of their list, belong to none.
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
    """The entries of list n, raised by offset[n]: from block numbers to item numbers."""
    if not np.any(offset):
        return index
    xp = np if isinstance(index, np.ndarray) and isinstance(start, np.ndarray) else jnp
    owner = xp.searchsorted(start, xp.arange(index.shape[0], dtype=np.int32), side="right") - 1
    return index + xp.asarray(offset)[owner]
