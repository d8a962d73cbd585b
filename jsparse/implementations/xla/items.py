"""Heads and blocks laid out as items, for ``passes.py``: blocks of one side of attention with their lists.

A query item is one block of queries of all the query heads that share a list and a KV head; a KV item is one
block of keys of the KV heads of such a class. Blocks stay as they lie in memory, ``[items, B, block, ...]``:
callers that take a slice also transpose it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jsparse.arrays import HostOrDevice, take_heads
from jsparse.device import device_kind
from jsparse.implementations.interface import Visible
from jsparse.integers import power_of_two_from, power_of_two_up_to
from jsparse.masks.block_mask import BlockMask, default_block_sizes, follow
from jsparse.masks.token_mask import HeadMasks, TokenMask
from jsparse.masks.transposed import offset_entries


class Lists(NamedTuple):
    """For each item, which items of the other side to visit: entries start .. start + count of index."""

    index: HostOrDevice  # [L]
    start: HostOrDevice  # [N items]
    count: HostOrDevice
    full_count: HostOrDevice

    @property
    def known(self) -> bool:
        """Whether they are known while tracing: NumPy arrays."""
        return isinstance(self.count, np.ndarray)


class Part(NamedTuple):
    """Query heads that run together, the KV heads that they read, and the lists that they follow."""

    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    lists: Lists  # from query items to KV items
    classes: int  # sets of KV heads with lists of their own
    batched: bool  # every sequence has lists of its own
    mask: BlockMask  # lengths and block sizes; its lists are not read
    token_mask: TokenMask


class Items(NamedTuple):
    """Blocks of a sequence, and what the element mask has to know."""

    values: tuple[Any, ...]  # [N items, B, block, H KV heads, ...]
    position: HostOrDevice  # [N], of the first token of each item
    segment: HostOrDevice | None  # [N, B, block] or None


def in_own_blocks(visible: Visible) -> Visible:
    """Token masks on a CPU, where each part has its own block sizes; lists to follow elsewhere.

    A token mask shows the same keys whatever the blocks. So if the lists of a BlockMask are exactly those of
    its token masks, a CPU takes the token masks instead.
    """
    if device_kind() != "cpu":
        return follow(visible, *default_block_sizes(visible.q_len, visible.kv_len))
    return visible.exact or visible if isinstance(visible, BlockMask) else visible


def parts(visible: Visible, num_q_heads: int, num_kv_heads: int, *, by_key: bool = False) -> list[Part]:
    """Heads that share a static row run as one part; heads with their own lists all run as one part.

    - by_key: whether the items of the pass are blocks of keys.
    """
    visible = in_own_blocks(visible)
    if isinstance(visible, BlockMask):
        return _parts_of_lists(visible, num_q_heads, num_kv_heads)
    made = []
    for mask, q_heads, kv_heads in _sharing(visible.per_head(num_q_heads), num_kv_heads):
        group = len(q_heads) // len(kv_heads)
        sizes = block_sizes(mask, visible.q_len, visible.kv_len, group, by_key=by_key)
        lists = follow(HeadMasks(mask, visible.q_len, visible.kv_len), *sizes)
        made.append(_static_part(lists, q_heads, kv_heads, mask, 0))
    return made


def _parts_of_lists(mask: BlockMask, num_q_heads: int, num_kv_heads: int) -> list[Part]:
    if mask.head_rows is None:
        return [_part_of_all(mask, num_q_heads, num_kv_heads)]
    return [
        _static_part(mask, q_heads, kv_heads, mask.token_masks[row], row)
        for row, q_heads, kv_heads in _sharing(mask.head_rows, num_kv_heads)
    ]


def _sharing(row_of_head: Sequence, num_kv_heads: int) -> Iterator[tuple[Any, list[int], list[int]]]:
    """For each row that heads follow: (row, the query heads that follow it, the KV heads that they read)."""
    group = len(row_of_head) // num_kv_heads
    for row in dict.fromkeys(row_of_head):
        q_heads = [head for head, its_row in enumerate(row_of_head) if its_row == row]
        whole = [
            head
            for head in range(num_kv_heads)
            if set(range(head * group, (head + 1) * group)) <= set(q_heads)
        ]
        # Query heads that are only a part of their KV head's group get their own copy of the KV head.
        yield (
            row,
            q_heads,
            whole if len(whole) * group == len(q_heads) else [head // group for head in q_heads],
        )


def _part_of_all(mask: BlockMask, num_q_heads: int, num_kv_heads: int) -> Part:
    num_rows = mask.kv_start.shape[-2]
    start, count, full_count = mask.kv_start, mask.kv_count, mask.kv_full_count
    batched = start.ndim == 3
    classes = min(num_rows, num_kv_heads)
    kv_class = np.arange(num_rows) * classes // num_rows
    if batched:
        kv_class = np.arange(start.shape[0])[:, None] * classes + kv_class
    offset = np.broadcast_to(kv_class[..., None] * mask.num_kv_blocks, start.shape)
    offset = offset.reshape(-1).astype(np.int32)
    start, count, full_count = (x.reshape(-1) for x in (start, count, full_count))
    lists = Lists(offset_entries(mask.kv_index, start, offset), start, count, full_count)
    q_heads, kv_heads = tuple(range(num_q_heads)), tuple(range(num_kv_heads))
    return Part(q_heads, kv_heads, lists, classes, batched, mask, mask.token_masks[0])


def _static_part(mask: BlockMask, q_heads, kv_heads, token_mask: TokenMask, row: int) -> Part:
    return Part(tuple(q_heads), tuple(kv_heads), _row(mask, row), 1, False, mask, token_mask)


def _row(mask: BlockMask, row: int) -> Lists:
    """The lists of one row, without the entries of others."""
    index, begin, count = mask.kv_index, mask.kv_start[row], mask.kv_count[row]
    if isinstance(index, np.ndarray):
        index, begin = index[begin[0] : begin[-1] + count[-1]], begin - begin[0]
    return Lists(index, begin, count, mask.kv_full_count[row])


def block_sizes(
    token_mask: TokenMask, q_len: int, kv_len: int, group: int = 1, *, by_key: bool = False
) -> tuple[int, int]:
    """(block_q, block_kv) that suit a CPU, where ``group`` query heads share a KV head.

    Blocks are small compared to what a query sees, so few keys are visited in vain. But products of fewer
    than 128 rows (of an item's own tokens) are slow, and those of more than 512 are no faster.
    """
    span = min(n for n in (kv_len, token_mask.window, token_mask.group_size) if n is not None)
    visited = min(max(power_of_two_up_to(span // 8), 64), 512)
    own = max(visited, 128)
    block_q, block_kv = (visited, own) if by_key else (own, visited)
    block_q = max(power_of_two_up_to(block_q // group), 16)
    return min(block_q, _holding(q_len)), min(block_kv, _holding(kv_len))


def _holding(length: int) -> int:
    """The smallest power of two, at least 16, that holds a sequence."""
    return max(16, power_of_two_from(length))


def query_items(arrays, part: Part, segment_ids) -> Items:
    mask, batch = part.mask, arrays[0].shape[0]
    rows = part.lists.start.shape[0] // (mask.num_q_blocks * (batch if part.batched else 1))
    values = tuple(_split_queries(x, part, rows) for x in arrays)
    position = _positions(mask.num_q_blocks, mask.block_q, mask.kv_len - mask.q_len, values[0].shape[0])
    return Items(values, position, _split_segments(segment_ids, part, rows, mask.block_q))


def _split_queries(x, part: Part, rows: int):
    """[B, T, Hq, ...] to [items, B, block_q, H, G, ...]; items are sequences (if batched) x rows x blocks."""
    block = part.mask.block_q
    x = _pad(take_heads(x, part.q_heads), block)
    batch, heads, tail = x.shape[0], len(part.kv_heads) // part.classes, x.shape[3:]
    group = x.shape[2] // (rows * heads)
    x = x.reshape(batch, -1, block, rows, heads, group, *tail)
    x = jnp.moveaxis(x, (3, 1, 0, 2), (0, 1, 2, 3))
    if part.batched:
        x = jnp.moveaxis(x, 2, 0)[:, :, :, None]
    return x.reshape(-1, 1 if part.batched else batch, block, heads, group, *tail)


def from_query_items(x, part: Part, batch: int):
    """The inverse: [items, B, block_q, H, G, ...] to [B, T, the part's query heads, ...]."""
    mask = part.mask
    heads, group, tail = x.shape[3], x.shape[4], x.shape[5:]
    sequences = batch if part.batched else 1
    x = x.reshape(sequences, -1, mask.num_q_blocks, batch // sequences, mask.block_q, heads, group, *tail)
    x = jnp.moveaxis(x, (0, 3, 2, 4, 1), (0, 1, 2, 3, 4))
    return x.reshape(batch, mask.num_q_blocks * mask.block_q, -1, *tail)[:, : mask.q_len]


def key_items(arrays, part: Part, segment_ids) -> Items:
    mask = part.mask
    values = tuple(_split_keys(x, part) for x in arrays)
    position = _positions(mask.num_kv_blocks, mask.block_kv, 0, values[0].shape[0])
    return Items(values, position, _split_segments(segment_ids, part, part.classes, mask.block_kv))


def _split_keys(x, part: Part):
    """[B, S, Hk, D] to [items, B, block_kv, H, D]; items are sequences (if batched) x classes x blocks."""
    block = part.mask.block_kv
    x = _pad(take_heads(x, part.kv_heads), block)
    batch, dim = x.shape[0], x.shape[3]
    x = x.reshape(batch, -1, block, part.classes, x.shape[2] // part.classes, dim)
    x = jnp.moveaxis(x, (3, 1, 0, 2), (0, 1, 2, 3))
    if part.batched:
        x = jnp.moveaxis(x, 2, 0)[:, :, :, None]
    return x.reshape(-1, 1 if part.batched else batch, *x.shape[-3:])


def from_key_items(x, part: Part, batch: int):
    """The inverse: [items, B, block_kv, H, D] to [B, S, the part's KV heads, D]."""
    mask = part.mask
    sequences = batch if part.batched else 1
    x = x.reshape(sequences, part.classes, mask.num_kv_blocks, batch // sequences, *x.shape[2:])
    x = jnp.moveaxis(x, (0, 3, 2, 4, 1), (0, 1, 2, 3, 4))
    return x.reshape(batch, mask.num_kv_blocks * mask.block_kv, -1, x.shape[-1])[:, : mask.kv_len]


def _split_segments(segment_ids, part: Part, copies: int, block: int):
    """[B, T] to [items, B, block]."""
    if segment_ids is None:
        return None
    x = _pad(segment_ids, block)
    x = jnp.swapaxes(x.reshape(x.shape[0], -1, block), 0, 1)
    if part.batched:
        x = jnp.swapaxes(x, 0, 1)[:, None, :, None]
        return jnp.broadcast_to(x, (x.shape[0], copies, *x.shape[2:])).reshape(-1, 1, block)
    return jnp.tile(x, (copies, 1, 1))


def _positions(num_blocks: int, block: int, offset: int, num_items: int):
    return jnp.asarray(np.arange(num_items, dtype=np.int32) % num_blocks * block + offset)


def _pad(x, block: int):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


# Taking single heads makes a copy, and adding to single heads is slower still for XLA on a CPU. Mostly, heads
# come in one piece.


def join_heads(pieces, heads: list[tuple[int, ...]], num_heads: int):
    """The sum of pieces [B, T, H, ...], each at its heads, in an array of ``num_heads``."""
    listed = [head for some in heads for head in some]
    if sorted(listed) == list(range(num_heads)):
        whole = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=2)
        return take_heads(whole, tuple(int(place) for place in np.argsort(listed)))
    total = jnp.zeros((*pieces[0].shape[:2], num_heads, *pieces[0].shape[3:]), pieces[0].dtype)
    for piece, some in zip(pieces, heads, strict=True):
        total = total.at[:, :, np.asarray(some)].add(piece)
    return total
