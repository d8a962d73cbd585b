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

from jsparse.arrays import HostOrDevice
from jsparse.integers import cdiv, power_of_two_from
from jsparse.masks.row_lists import row_lists, wholly_visible
from jsparse.masks.token_mask import HeadMasks, TokenMask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_index", "kv_start", "kv_count", "kv_full_count"],
    meta_fields=["q_len", "kv_len", "block_q", "block_kv", "head_rows", "token_masks"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of key blocks, one for each mask row and query block. A pytree.

    A query sees a key if the key's block is listed for the query's block *and* the row's ``TokenMask`` shows
    it. Queries are aligned to the end of the keys: query ``t`` stands at position ``t + kv_len - q_len``.

    The lists lie one after another in one flat array, so a head that visits four blocks per query block is
    not padded to one that visits a thousand. With ``R`` rows and ``nq = ceil(q_len / block_q)``:

    - ``kv_index`` int32 [L]: the block numbers of all lists;
    - ``kv_start``, ``kv_count`` int32 [R, nq] or [B, R, nq]: list ``(r, i)`` is
      ``kv_index[kv_start[r, i] : kv_start[r, i] + kv_count[r, i]]``, in which no block appears twice;
    - ``kv_full_count``, of the same shape: how many blocks, the first of the list, are wholly visible and
      need no element mask (apart from segment ids).

    Static fields:

    - ``q_len``, ``kv_len``, ``block_q``, ``block_kv``: lengths and block sizes in tokens.
    - ``token_masks``: one per row.
    - ``head_rows``: the row of each query head. None means that the query heads share the rows evenly and in
      order, which fits one row for all heads, one per KV head, or one per query head.
    - ``exact``: for a mask from ``from_token_masks``, the token masks that these lists show exactly; an
      implementation may then choose its own block sizes. None for chosen lists, and also after
      ``dataclasses.replace`` and tree functions, which may have put other lists here.

    Lists made from token masks are NumPy arrays: known while tracing, and compiled in. Lists from
    ``from_indices`` are JAX arrays, perhaps traced: other lists of the same capacity compile nothing. Two
    masks are equal only if they are the same object.
    """

    kv_index: HostOrDevice
    kv_start: HostOrDevice
    kv_count: HostOrDevice
    kv_full_count: HostOrDevice
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    head_rows: tuple[int, ...] | None
    token_masks: tuple[TokenMask, ...]
    exact: HeadMasks | None = dataclasses.field(default=None, init=False)

    @property
    def num_q_blocks(self) -> int:
        return cdiv(self.q_len, self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        return cdiv(self.kv_len, self.block_kv)

    def row_of_head(self, num_q_heads: int) -> tuple[int, ...]:
        """The row that each query head follows.

        >>> BlockMask.from_token_masks(TokenMask(), 8, 8).row_of_head(3)
        (0, 0, 0)
        """
        if self.head_rows is not None:
            return self.head_rows
        num_rows = self.kv_start.shape[-2]
        return tuple(head * num_rows // num_q_heads for head in range(num_q_heads))

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

        Computed in closed form: time and memory grow with the lists, and no array of T x T elements, or of
        T / block x T / block blocks, is ever made. Heads with equal masks share a row.

        - masks: one for all query heads, or one per query head.
        - q_len, kv_len: how many queries and keys there are.
        - block_q, block_kv: how many tokens a block of queries and a block of keys holds.

        Returns a mask with NumPy lists. Equal arguments may give the same object.

        Raises ValueError for masks of another type, and for lengths and sizes that are not positive integers.

        >>> from jsparse import streaming
        >>> mask = BlockMask.from_token_masks(streaming(sink=1, window=4), 16, 16, block_q=4, block_kv=4)
        >>> mask.kv_index.tolist(), mask.kv_count.tolist(), mask.kv_full_count.tolist()
        ([0, 0, 1, 0, 1, 2, 0, 2, 3], [[1, 2, 3, 3]], [[0, 0, 0, 0]])
        """
        _check_geometry(q_len, kv_len, block_q, block_kv)
        masks = HeadMasks.from_masks(masks, q_len, kv_len).masks
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
        """The lists that a selector chose, with a fixed capacity of M blocks per list.

        There are R rows: one for all heads, one per KV head, or one per query head.

        - kv_index: [R, nq, M] or [B, R, nq, M], block numbers, all different within a list. Entries from
          ``kv_count`` on are not read.
        - kv_count: [R, nq] or [B, R, nq], how many blocks each list has.
        - q_len, kv_len, block_q, block_kv: lengths and block sizes in tokens.
        - token_mask: applies inside the listed blocks, except the first ``kv_full_count`` of each list.
        - kv_full_count: of kv_count's shape. Every query of the block sees this many blocks whole, so their
          element mask is skipped. None means 0.

        Returns a mask with JAX lists.

        Raises ValueError for shapes that do not fit. Where the arrays are not traced, it also does so for a
        count beyond M, a block number out of range, a block listed twice, and one called wholly visible that
        is not. Traced lists cannot be checked: they are the caller's responsibility.

        >>> index, count = np.array([[[0, -1], [1, 0]]]), np.array([[1, 2]])
        >>> BlockMask.from_indices(index, count, q_len=8, kv_len=8, block_q=4, block_kv=4).kv_start.tolist()
        [[0, 2]]
        """
        _check_geometry(q_len, kv_len, block_q, block_kv)
        nq = cdiv(q_len, block_q)
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


def build_block_mask(
    masks: TokenMask | tuple[TokenMask, ...], q_len: int, kv_len: int, block_q: int, block_kv: int
) -> BlockMask:
    """What ``BlockMask.from_token_masks`` returns, computed again at each call."""
    exact = HeadMasks(masks, q_len, kv_len)
    rows = exact.distinct()
    lists = [row_lists(mask, q_len, kv_len, block_q, block_kv) for mask in rows]
    counts = np.stack([count for _, count, _ in lists])
    starts = np.cumsum(counts.reshape(-1), dtype=np.int64) - counts.reshape(-1)
    if starts[-1] + counts[-1, -1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"the lists hold more than 2**31 blocks: raise block_q={block_q} or block_kv={block_kv}"
        )
    mask = BlockMask(
        kv_index=np.concatenate([index for index, _, _ in lists]),
        kv_start=starts.reshape(counts.shape).astype(np.int32),
        kv_count=counts,
        kv_full_count=np.stack([full for _, _, full in lists]),
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        head_rows=None if isinstance(masks, TokenMask) else tuple(rows.index(mask) for mask in masks),
        token_masks=rows,
    )
    object.__setattr__(mask, "exact", exact)
    return mask


# The same object for the same masks, which then compiles once.
_from_token_masks = functools.lru_cache(maxsize=16)(build_block_mask)
# Lists that implementations make for themselves. They have their own cache and cannot evict those of users.
_own_lists = functools.lru_cache(maxsize=32)(build_block_mask)


def follow(visible: BlockMask | HeadMasks, block_q: int, block_kv: int) -> BlockMask:
    """The lists to follow: a BlockMask as it is, or the lists of token masks in these block sizes."""
    if isinstance(visible, BlockMask):
        return visible
    return _own_lists(visible.masks, visible.q_len, visible.kv_len, block_q, block_kv)


def default_block_sizes(q_len: int, kv_len: int) -> tuple[int, int]:
    """(block_q, block_kv) for token masks: 128, or for a shorter sequence the power of two that holds it."""
    block_q, block_kv = (min(128, max(16, power_of_two_from(n))) for n in (q_len, kv_len))
    return block_q, block_kv


def _check_geometry(q_len, kv_len, block_q, block_kv):
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("block_q", block_q), ("block_kv", block_kv)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")


def _check_lists(kv_index, kv_count, kv_full_count, token_mask, q_len, kv_len, block_q, block_kv):
    capacity, num_kv_blocks = kv_index.shape[-1], cdiv(kv_len, block_kv)
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
    whole = wholly_visible(token_mask, q_block, kv_index, q_len, kv_len, block_q, block_kv)
    wrong = (np.arange(capacity) < kv_full_count[..., None]) & ~whole
    if np.any(wrong):
        raise ValueError(
            f"kv_full_count calls block {kv_index[wrong][0]} wholly visible for query block "
            f"{q_block[wrong][0]}, but {token_mask} hides a part of it"
        )
