"""Block-sparse attention for every device: only listed blocks are visited, forward and backward.

Queries are cut into *items*: one block of queries, of all the query heads that share a list and a KV head. An
item visits its list one block at a time with an online softmax, so that nothing of size T x T is ever stored.
Items are sorted by the length of their lists and taken a chunk at a time: a chunk is one batched product, and
ends with its longest list.

The backward pass recomputes the weights from lse. dQ goes over the same lists; dK and dV go over the
transposed lists and sum over the query heads of a KV head on the way, so that the result does not depend on
any order of additions. Algorithm: FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), on lists.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsparse.block_mask import BlockMask, offset_entries, transposed_lists
from jsparse.masks import TokenMask

# Scores of one chunk: large enough to keep the cores busy, small enough to stay in the cache.
_CHUNK_SCORES = 1 << 20


class _Lists(NamedTuple):
    """For each item, which items of the other side to visit: entries start .. start + count of index."""

    index: Any
    start: Any
    count: Any
    full_count: Any


class _Part(NamedTuple):
    """Query heads that run together, the KV heads that they read, and the lists that they follow."""

    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    token_mask: TokenMask
    lists: _Lists  # from query items to KV items
    classes: int  # sets of KV heads with lists of their own
    batched: bool  # every sequence has lists of its own


class _Items(NamedTuple):
    """Blocks of a sequence, [N items, B, H KV heads, M rows, ...], and what the element mask has to know."""

    values: tuple[Any, ...]
    position: Any  # [N], of the first token of each item
    segment: Any  # [N, B, block] or None


def forward(q, k, v, mask: BlockMask, scale, q_segment_ids=None, kv_segment_ids=None):
    """out [B, T, Hq, D] in q's dtype, lse [B, T, Hq] float32."""
    out = jnp.zeros(q.shape, q.dtype)
    lse = jnp.zeros(q.shape[:3], jnp.float32)
    for part in _parts(mask, q.shape[2], k.shape[2]):
        queries = _query_items((q,), part, mask, q_segment_ids)
        keys = _key_items((k, v), part, mask, kv_segment_ids)
        part_out, part_lse = _forward(queries, keys, part, mask, scale)
        heads = np.asarray(part.q_heads)
        out = out.at[:, :, heads].set(_from_query_items(part_out.astype(q.dtype), part, mask, q.shape[0]))
        lse = lse.at[:, :, heads].set(_from_query_items(part_lse, part, mask, q.shape[0]))
    return out, lse


def backward(q, k, v, mask: BlockMask, scale, q_segment_ids, kv_segment_ids, out, lse, d_out, d_lse):
    """The gradients of q, k and v."""
    # d_scores = weights * (d_weights - delta), where lse adds its own part to delta.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    # exp(score - inf) = 0: a query that sees nothing has no weights.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for part in _parts(mask, q.shape[2], k.shape[2]):
        queries = _query_items((q, d_out, lse, delta), part, mask, q_segment_ids)
        keys = _key_items((k, v), part, mask, kv_segment_ids)
        heads, kv_heads = np.asarray(part.q_heads), np.asarray(part.kv_heads)
        part_dq = _backward_queries(queries, keys, part, mask, scale)
        dq = dq.at[:, :, heads].set(_from_query_items(part_dq, part, mask, q.shape[0]))
        part_dk, part_dv = _backward_keys(queries, keys, part, mask, scale)
        dk = dk.at[:, :, kv_heads].add(_from_key_items(part_dk, part, mask, q.shape[0]))
        dv = dv.at[:, :, kv_heads].add(_from_key_items(part_dv, part, mask, q.shape[0]))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


# --- the three passes over lists ---
#
# Every product is written as rows [m, c] times columns [c, k], with the operand transposed once beforehand
# where need be: XLA on a CPU takes up to three times as long for the other orders.


def _forward(queries: _Items, keys: _Items, part: _Part, mask: BlockMask, scale):
    (q,) = queries.values
    k, v = keys.values
    k_columns = jnp.swapaxes(k, -1, -2)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def init(i):
        shape = (i.shape[0], *q.shape[1:4])
        return (
            jnp.full(shape, -jnp.inf, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((*shape, q.shape[-1]), dtype),
        )

    def step(carry, i, j, listed, masked):
        top, total, acc = carry
        scores = _product(q[i], k_columns[j], dtype) * scale
        scores = _hide(scores, _visible(queries, i, keys, j, listed, masked, part.token_mask, mask))
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        finite_top = jnp.where(new_top == -jnp.inf, 0, new_top)  # -inf - -inf is not a number
        weights = jnp.exp(scores - finite_top[..., None])
        decay = jnp.exp(top - finite_top)
        total = total * decay + jnp.sum(weights, axis=-1)
        acc = acc * decay[..., None] + _product(weights.astype(v.dtype), v[j], dtype)
        return new_top, total, acc

    def finish(carry):
        top, total, acc = carry
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        return out.astype(q.dtype), (top + jnp.log(total)).astype(jnp.float32)

    return _over_lists(
        part.lists, init, step, finish, chunk=_chunk(q, k), mask_all=queries.segment is not None
    )


def _backward_queries(queries: _Items, keys: _Items, part: _Part, mask: BlockMask, scale):
    q, d_out, lse, delta = queries.values
    k, v = keys.values
    k_columns, v_columns = jnp.swapaxes(k, -1, -2), jnp.swapaxes(v, -1, -2)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def init(i):
        return jnp.zeros((i.shape[0], *q.shape[1:]), dtype)

    def step(dq, i, j, listed, masked):
        scores = _product(q[i], k_columns[j], dtype) * scale
        scores = _hide(scores, _visible(queries, i, keys, j, listed, masked, part.token_mask, mask))
        weights = jnp.exp(scores - lse[i][..., None])
        d_weights = _product(d_out[i], v_columns[j], dtype)
        d_scores = weights * (d_weights - delta[i][..., None]) * scale
        return dq + _product(d_scores.astype(k.dtype), k[j], dtype)

    return _over_lists(
        part.lists, init, step, lambda dq: dq, chunk=_chunk(q, k), mask_all=queries.segment is not None
    )


def _backward_keys(queries: _Items, keys: _Items, part: _Part, mask: BlockMask, scale):
    q, d_out, lse, delta = queries.values
    k, v = keys.values
    q_columns, d_out_columns = jnp.swapaxes(q, -1, -2), jnp.swapaxes(d_out, -1, -2)
    k_columns, v_columns = jnp.swapaxes(k, -1, -2), jnp.swapaxes(v, -1, -2)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    owner, pieces = _pieces(_Lists(*transposed_lists(*part.lists, num_kv_items=k.shape[0])))

    def init(piece):
        shape = (piece.shape[0], *k_columns.shape[1:])
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def step(carry, piece, i, listed, masked):
        # As columns, for scores by query: masks of segments by key take XLA on a CPU as long as all the rest.
        dk, dv = carry
        j = owner[piece]
        scores = _product(q[i], k_columns[j], dtype) * scale
        scores = _hide(scores, _visible(queries, i, keys, j, listed, masked, part.token_mask, mask))
        weights = jnp.exp(scores - lse[i][..., None])
        dv = dv + _product(d_out_columns[i], weights.astype(d_out.dtype), dtype)
        d_weights = _product(d_out[i], v_columns[j], dtype)
        d_scores = weights * (d_weights - delta[i][..., None]) * scale
        return dk + _product(q_columns[i], d_scores.astype(q.dtype), dtype), dv

    def finish(carry):
        return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), carry)

    parts = _over_lists(pieces, init, step, finish, chunk=_chunk(q, k), mask_all=queries.segment is not None)
    return _sum_by_owner(parts, owner, k.shape[0])


def _sum_by_owner(parts, owner, num_owners: int):
    """The sum of each owner's pieces, in their order.

    A loop, and not ``segment_sum``: that adds by atomics on a GPU, in any order, and, told that the owners
    are sorted, becomes more machine code than ptxas compiles in minutes.
    """

    def add(piece, totals):
        to = owner[piece]
        return jax.tree.map(lambda total, x: total.at[to].set(total[to] + x[piece]), totals, parts)

    zeros = jax.tree.map(lambda x: jnp.zeros((num_owners, *x.shape[1:]), x.dtype), parts)
    return lax.fori_loop(0, owner.shape[0], add, zeros)


def _over_lists(lists: _Lists, init, step, finish, *, chunk: int, mask_all: bool):
    """A loop over all items, ``chunk`` at a time: init(items), then for each entry of their lists
    step(carry, items, entries, listed, masked), then finish(carry).

    First the blocks that need no element mask, then the others (``masked``); ``listed`` tells which items of
    the chunk have that many blocks. With ``mask_all`` every block is masked.
    """
    num_items = lists.start.shape[0]
    chunk = min(chunk, num_items)
    xp = np if isinstance(lists.count, np.ndarray) else jnp
    order = xp.argsort(lists.count, stable=True).astype(np.int32)
    place = xp.argsort(order).astype(np.int32)
    padding = xp.broadcast_to(order[:1], -num_items % chunk)
    index, start, count, full_count = (jnp.asarray(x) for x in lists)
    index = jnp.pad(index, (0, 1))  # lists may all be empty
    if mask_all:
        full_count = jnp.zeros_like(full_count)

    def one_chunk(items):
        begin, full, total = start[items], full_count[items], count[items]

        def visit(carry, first, last, masked):
            def body(t, carry):
                # Items whose list has ended look at a block of their own again, and not at another's.
                entry = jnp.minimum(first + t, jnp.maximum(last - 1, begin))
                return step(carry, items, index[entry], first + t < last, masked)

            return lax.fori_loop(0, jnp.max(last - first), body, carry)

        carry = visit(init(items), begin, begin + full, masked=False)
        return finish(visit(carry, begin + full, begin + total, masked=True))

    chunks = jnp.asarray(xp.concatenate([padding, order]).reshape(-1, chunk))
    results = lax.map(one_chunk, chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[padding.shape[0] :][place], results)


def _pieces(lists: _Lists):
    """(owner [P], the same lists cut into P pieces of bounded length).

    A sink's key block is listed by every query block: left whole, it would keep a chunk of short lists
    waiting.
    """
    xp = np if isinstance(lists.count, np.ndarray) else jnp
    num_items, num_entries = lists.start.shape[0], lists.index.shape[0]
    length = max(1, -(-num_entries // num_items))
    last = xp.cumsum(-(-lists.count // length))
    num_pieces = int(last[-1]) if xp is np else num_items + num_entries // length
    piece = xp.arange(max(1, num_pieces), dtype=np.int32)
    owner = xp.minimum(xp.searchsorted(last, piece, side="right"), num_items - 1).astype(np.int32)
    skipped = (piece - last[owner] + -(-lists.count[owner] // length)) * length
    return jnp.asarray(owner), _Lists(
        lists.index,
        (lists.start[owner] + skipped).astype(np.int32),
        xp.clip(lists.count[owner] - skipped, 0, length).astype(np.int32),
        xp.clip(lists.full_count[owner] - skipped, 0, length).astype(np.int32),
    )


def _chunk(q, k) -> int:
    return max(1, _CHUNK_SCORES // (math.prod(q.shape[1:4]) * k.shape[3]))


def _product(rows, columns, dtype):
    return jnp.matmul(rows, columns, preferred_element_type=dtype)


def _visible(
    queries: _Items, i, keys: _Items, j, listed, masked: bool, token_mask: TokenMask, mask: BlockMask
):
    """Which of KV items j the query items i see, bool [n, 1 or B, block_q or 1, block_kv or 1]."""
    listed = listed[:, None, None, None]
    if not masked:
        return listed
    q_position = queries.position[i][:, None, None] + np.arange(mask.block_q)[:, None]
    kv_position = keys.position[j][:, None, None] + np.arange(mask.block_kv)
    # No mask shows a later key, and so none of the tail that fills up the last block.
    visible = token_mask(q_position, kv_position)[:, None] & listed
    if queries.segment is not None:
        visible = visible & (queries.segment[i][..., :, None] == keys.segment[j][..., None, :])
    return visible


def _hide(scores, visible):
    """-inf where not visible; scores [n, B, H, G * block_q, block_kv]."""
    n, batch, heads, _, columns = scores.shape
    visible = visible[:, :, None, None]
    split = scores.reshape(n, batch, heads, -1, max(visible.shape[-2], 1), columns)
    return jnp.where(visible, split, -jnp.inf).reshape(scores.shape)


# --- laying heads and blocks out as items, and back ---


def _parts(mask: BlockMask, num_q_heads: int, num_kv_heads: int) -> list[_Part]:
    """Heads that share static rows run as one part; heads with lists of their own all run as one part."""
    group = num_q_heads // num_kv_heads
    num_rows, nq = mask.kv_start.shape[-2:]
    start, count, full_count = mask.kv_start, mask.kv_count, mask.kv_full_count
    if mask.head_rows is None:
        batched = start.ndim == 3
        classes = min(num_rows, num_kv_heads)
        kv_class = np.arange(num_rows) * classes // num_rows
        if batched:
            kv_class = np.arange(start.shape[0])[:, None] * classes + kv_class
        offset = (
            np.broadcast_to(kv_class[..., None] * mask.num_kv_blocks, start.shape)
            .reshape(-1)
            .astype(np.int32)
        )
        start, count, full_count = (x.reshape(-1) for x in (start, count, full_count))
        lists = _Lists(offset_entries(mask.kv_index, start, offset), start, count, full_count)
        q_heads, kv_heads = tuple(range(num_q_heads)), tuple(range(num_kv_heads))
        return [_Part(q_heads, kv_heads, mask.token_masks[0], lists, classes, batched)]

    parts = []
    for row in range(num_rows):
        q_heads = tuple(head for head in range(num_q_heads) if mask.head_rows[head] == row)
        whole = [
            head
            for head in range(num_kv_heads)
            if set(range(head * group, (head + 1) * group)) <= set(q_heads)
        ]
        # Heads that take only a part of their KV head's group bring their own copy of it.
        kv_heads = (
            tuple(whole) if len(whole) * group == len(q_heads) else tuple(head // group for head in q_heads)
        )
        index, begin = mask.kv_index, start[row]
        if isinstance(index, np.ndarray):
            index, begin = index[begin[0] : begin[-1] + count[row, -1]], begin - begin[0]
        lists = _Lists(index, begin, count[row], full_count[row])
        parts.append(_Part(q_heads, kv_heads, mask.token_masks[row], lists, 1, False))
    return parts


def _query_items(arrays, part: _Part, mask: BlockMask, segment_ids) -> _Items:
    rows = part.lists.start.shape[0] // (mask.num_q_blocks * (arrays[0].shape[0] if part.batched else 1))
    values = tuple(_split_queries(x, part, mask, rows) for x in arrays)
    position = _positions(mask.num_q_blocks, mask.block_q, mask.kv_len - mask.q_len, values[0].shape[0])
    return _Items(values, position, _split_segments(segment_ids, part, rows, mask.block_q))


def _split_queries(x, part: _Part, mask: BlockMask, rows: int):
    """[B, T, Hq, ...] to [items, B, H, G * block_q, ...]; items: sequences (if batched) x rows x blocks."""
    x = _pad(x[:, :, np.asarray(part.q_heads)], mask.block_q)
    batch, heads, tail = x.shape[0], len(part.kv_heads) // part.classes, x.shape[3:]
    group = x.shape[2] // (rows * heads)
    x = x.reshape(batch, -1, mask.block_q, rows, heads, group, *tail)
    x = jnp.moveaxis(x, (3, 1, 0, 4, 5, 2), (0, 1, 2, 3, 4, 5))
    if part.batched:
        x = jnp.moveaxis(x, 2, 0)[:, :, :, None]
    return x.reshape(-1, 1 if part.batched else batch, heads, group * mask.block_q, *tail)


def _from_query_items(x, part: _Part, mask: BlockMask, batch: int):
    """The inverse of _split_queries."""
    heads, tail = x.shape[2], x.shape[4:]
    group = x.shape[3] // mask.block_q
    sequences = batch if part.batched else 1
    x = x.reshape(sequences, -1, mask.num_q_blocks, batch // sequences, heads, group, mask.block_q, *tail)
    x = jnp.moveaxis(x, (0, 3, 2, 6, 1, 4, 5), (0, 1, 2, 3, 4, 5, 6))
    return x.reshape(batch, mask.num_q_blocks * mask.block_q, -1, *tail)[:, : mask.q_len]


def _key_items(arrays, part: _Part, mask: BlockMask, segment_ids) -> _Items:
    values = tuple(_split_keys(x, part, mask) for x in arrays)
    position = _positions(mask.num_kv_blocks, mask.block_kv, 0, values[0].shape[0])
    return _Items(values, position, _split_segments(segment_ids, part, part.classes, mask.block_kv))


def _split_keys(x, part: _Part, mask: BlockMask):
    """[B, S, Hk, D] to [items, B, H, block_kv, D]: items are sequences (where batched) x classes x blocks."""
    x = _pad(x[:, :, np.asarray(part.kv_heads)], mask.block_kv)
    batch, dim = x.shape[0], x.shape[3]
    x = x.reshape(batch, -1, mask.block_kv, part.classes, x.shape[2] // part.classes, dim)
    x = jnp.moveaxis(x, (3, 1, 0, 4, 2, 5), (0, 1, 2, 3, 4, 5))
    if part.batched:
        x = jnp.moveaxis(x, 2, 0)[:, :, :, None]
    return x.reshape(-1, 1 if part.batched else batch, *x.shape[-3:])


def _from_key_items(x, part: _Part, mask: BlockMask, batch: int):
    """The inverse of _split_keys."""
    sequences = batch if part.batched else 1
    x = x.reshape(sequences, part.classes, mask.num_kv_blocks, batch // sequences, *x.shape[2:])
    x = jnp.moveaxis(x, (0, 3, 2, 5, 1, 4, 6), (0, 1, 2, 3, 4, 5, 6))
    return x.reshape(batch, mask.num_kv_blocks * mask.block_kv, -1, x.shape[-1])[:, : mask.kv_len]


def _split_segments(segment_ids, part: _Part, copies: int, block: int):
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
