"""Block-sparse attention for every device: only listed blocks are visited, forward and backward.

Queries are cut into *items*: one block of queries, of all the query heads that share a list and a KV head
(``items.py``). An item visits its list some blocks at a time with an online softmax, so nothing of size T x T
is ever stored; a short list is visited in one step, with a plain softmax. Items are sorted by the length of
their lists and taken a chunk at a time: a chunk is one batched product, and lasts as long as its longest
list.

The backward pass recomputes the weights from lse. dQ follows the same lists. dK and dV follow the transposed
lists and sum over the query heads of a KV head on the way, so the order of additions is fixed.

Source: FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), on lists.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsparse.device import product_dtype
from jsparse.implementations.interface import Visible
from jsparse.implementations.xla.items import (
    Items,
    Lists,
    Part,
    from_key_items,
    from_query_items,
    join_heads,
    key_items,
    parts,
    query_items,
)
from jsparse.implementations.xla.list_loop import cut_in_pieces, over_lists, sum_by_owner
from jsparse.masks.transposed import transposed_lists


def forward(q, k, v, visible: Visible, scale, q_segment_ids=None, kv_segment_ids=None):
    """out [B, T, Hq, D] in q's dtype, lse [B, T, Hq] float32."""
    batch, _, num_heads, _ = q.shape
    outs, lses, heads = [], [], []
    for part in parts(visible, num_heads, k.shape[2]):
        queries = query_items((q,), part, q_segment_ids)
        keys = key_items((k, v), part, kv_segment_ids)
        out, lse = _forward(queries, keys, part, scale)
        outs.append(from_query_items(out, part, batch))
        lses.append(from_query_items(lse, part, batch))
        heads.append(part.q_heads)
    return join_heads(outs, heads, num_heads), join_heads(lses, heads, num_heads)


def backward(q, k, v, visible: Visible, scale, q_segment_ids, kv_segment_ids, out, lse, d_out, d_lse):
    """The gradients of q, k and v."""
    batch, _, num_heads, _ = q.shape
    # d_scores = weights * (d_weights - delta), where lse adds its own part to delta.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    # exp(score - inf) = 0: a query that sees nothing has no weights.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    dqs, dks, dvs, q_heads, kv_heads = [], [], [], [], []
    for part in parts(visible, num_heads, k.shape[2]):
        queries = query_items((q, d_out, lse, delta), part, q_segment_ids)
        keys = key_items((k, v), part, kv_segment_ids)
        dqs.append(from_query_items(_backward_queries(queries, keys, part, scale), part, batch))
        q_heads.append(part.q_heads)
    for part in parts(visible, num_heads, k.shape[2], by_key=True):
        queries = query_items((q, d_out, lse, delta), part, q_segment_ids)
        keys = key_items((k, v), part, kv_segment_ids)
        dk, dv = _backward_keys(queries, keys, part, scale)
        dks.append(from_key_items(dk, part, batch))
        dvs.append(from_key_items(dv, part, batch))
        kv_heads.append(part.kv_heads)
    return (
        join_heads(dqs, q_heads, num_heads).astype(q.dtype),
        join_heads(dks, kv_heads, k.shape[2]).astype(k.dtype),
        join_heads(dvs, kv_heads, v.shape[2]).astype(v.dtype),
    )


# --- the three passes over lists ---
#
# Every product is rows times columns, or rows times rows: XLA on a CPU takes two to three times as long if it
# must transpose the left side. So the last pass computes its scores by key.


def _forward(queries: Items, keys: Items, part: Part, scale):
    (q,), (k, v) = queries.values, keys.values
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_scale, score_scale = _split_scale(q, scale, dtype)

    def start(items):
        return _rows(q, items) * q_scale

    # The start is finite, so exp(-inf - lowest) = 0 where nothing is seen. Without a test for that case, XLA
    # can fuse the largest score with the exponents.
    lowest = float(jnp.finfo(dtype).min)

    def init(q_rows):
        shape = q_rows.shape[:-1]
        return jnp.full(shape, lowest, dtype), jnp.zeros(shape, dtype), jnp.zeros(q_rows.shape, dtype)

    def step(q_rows, carry, items, blocks, listed, masked):
        scores = _by_rows(q_rows, _columns(k, blocks), dtype) * score_scale
        if masked:
            scores = _hide(scores, _visible(queries, items[:, None], keys, blocks, part, listed))
        top = jnp.max(scores, axis=-1, initial=lowest)
        if carry is not None:
            top = jnp.maximum(top, carry[0])
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=-1)
        acc = _product(weights, _columns(v, blocks), dtype)
        if carry is not None:
            decay = jnp.exp(carry[0] - top)
            total = total + carry[1] * decay
            acc = acc + carry[2] * decay[..., None]
        return top, total, acc

    def finish(carry):
        top, total, acc = carry
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        lse = (top + jnp.log(total)).astype(jnp.float32)
        return _from_rows(out.astype(q.dtype), q), _from_rows(lse, q)

    return over_lists(
        part.lists,
        (start, init, step, finish),
        scores_per_entry=_scores_per_entry(q, k),
        entry_tokens=k.shape[2],
        alike=_alike(queries, keys),
    )


def _backward_queries(queries: Items, keys: Items, part: Part, scale):
    q, (k, v) = queries.values[0], keys.values
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_scale, score_scale = _split_scale(q, scale, dtype)

    def start(items):
        q_rows, *others = (_rows(x, items) for x in queries.values)
        return q_rows * q_scale, *others

    def init(own):
        return jnp.zeros(own[0].shape, dtype)

    def step(own, dq, items, blocks, listed, masked):
        q_rows, d_out_rows, lse_rows, delta_rows = own
        k_rows = _columns(k, blocks)
        scores = _by_rows(q_rows, k_rows, dtype) * score_scale
        if masked:
            scores = _hide(scores, _visible(queries, items[:, None], keys, blocks, part, listed))
        weights = jnp.exp(scores - lse_rows[..., None])
        d_weights = _by_rows(d_out_rows, _columns(v, blocks), dtype)
        d_scores = weights * (d_weights - delta_rows[..., None]) * score_scale
        more = _product(d_scores, k_rows, dtype)
        return more if dq is None else dq + more

    return over_lists(
        part.lists,
        (start, init, step, lambda dq: _from_rows(dq * q_scale, q)),
        scores_per_entry=_scores_per_entry(q, k),
        entry_tokens=k.shape[2],
        alike=_alike(queries, keys),
        backward=True,
    )


def _backward_keys(queries: Items, keys: Items, part: Part, scale):
    q, (k, v) = queries.values[0], keys.values
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    owner, pieces = cut_in_pieces(Lists(*transposed_lists(*part.lists, num_kv_items=k.shape[0])))
    owners, group, alike = jnp.asarray(owner), q.shape[4], _alike(queries, keys)
    q_scale, score_scale = _split_scale(q, scale, dtype)

    def start(some):
        items = owners[some]
        return _columns(k, items[:, None]), _columns(v, items[:, None])

    def init(own):
        return jnp.zeros(own[0].shape, dtype), jnp.zeros(own[1].shape, dtype)

    def step(own, carry, some, blocks, listed, masked):
        k_rows, v_rows = own
        q_rows, d_out_rows, lse_columns, delta_columns = (_many_rows(x, blocks) for x in queries.values)
        q_rows = q_rows * q_scale
        # Transposed once, not for each key.
        lse_columns, delta_columns = lax.optimization_barrier((lse_columns, delta_columns))

        def split(x):
            return x.reshape(*x.shape[:-1], group, -1)

        scores = split(_by_rows(k_rows, q_rows, dtype)) * score_scale  # [n, B, H, block_kv, G, W * block_q]
        if masked:
            visible = _visible(queries, blocks, keys, owners[some][:, None], part, listed, by_key=True)
            scores = jnp.where(visible[:, :, None, :, None], scores, -jnp.inf)
        weights = jnp.exp(scores - split(lse_columns)[..., None, :, :])
        d_weights = split(_by_rows(v_rows, d_out_rows, dtype))
        d_scores = weights * (d_weights - split(delta_columns)[..., None, :, :]) * score_scale
        weights, d_scores = (x.reshape(*x.shape[:4], -1) for x in (weights, d_scores))
        dk, dv = _product(d_scores, q_rows, dtype), _product(weights, d_out_rows, dtype)
        return (dk, dv) if carry is None else (carry[0] + dk, carry[1] + dv)

    def finish(carry):
        return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 3), carry)

    sums = over_lists(
        pieces,
        (start, init, step, finish),
        scores_per_entry=_scores_per_entry(q, k),
        entry_tokens=q.shape[2] * group,
        alike=alike and (lambda some, blocks: alike(blocks, owners[some][:, None])),
        backward=True,
    )
    return sum_by_owner(sums, owner, k.shape[0])


def _scores_per_entry(q, k) -> int:
    """How many scores a query item and a KV item have."""
    return math.prod(q.shape[1:5]) * k.shape[2]


# --- taking items out, and products of them ---


def _rows(x, items):
    """[N, B, block, H, G, ...] at items [n]: [n, B, H, G * block, ...]."""
    x = jnp.moveaxis(_taken(x, items), 2, 4)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _from_rows(x, like):
    """The inverse of _rows."""
    block, heads, group = like.shape[2:5]
    x = x.reshape(*x.shape[:2], heads, group, block, *x.shape[4:])
    return jnp.moveaxis(x, 4, 2)


def _many_rows(x, items):
    """[N, B, block, H, G, ...] at items [n, W]: [n, B, H, G * W * block, ...]."""
    x = jnp.moveaxis(_taken(x, items), (2, 4, 5, 1, 3), (1, 2, 3, 4, 5))
    return x.reshape(*x.shape[:3], -1, *x.shape[6:])


def _columns(x, items):
    """[N, B, block, H, D] at items [n, W]: [n, B, H, W * block, D]."""
    x = jnp.moveaxis(_taken(x, items), (2, 4, 1, 3), (1, 2, 3, 4))
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _taken(x, items):
    return x[items].astype(product_dtype(x.dtype))


def _split_scale(q, scale, dtype) -> tuple[float, float]:
    """The factors of (queries, scores): of queries, which are fewer, if their dtype loses nothing by it."""
    return (scale, 1.0) if product_dtype(q.dtype) == dtype else (1.0, scale)


def _by_rows(rows, other_rows, dtype):
    """rows [..., m, c] times the transpose of other_rows [..., n, c]."""
    return jnp.einsum("nbhmc,nbhkc->nbhmk", rows, other_rows, preferred_element_type=dtype)


def _product(weights, rows, dtype):
    """weights [..., m, c] times rows [..., c, k], weights in the dtype of rows."""
    return jnp.matmul(weights.astype(rows.dtype), rows, preferred_element_type=dtype)


# --- the element mask ---


def _visible(queries: Items, q_items, keys: Items, kv_items, part: Part, listed, *, by_key: bool = False):
    """Which keys of kv_items [n, V] the queries of q_items [n, W] see: bool [n, B or 1, queries, keys].

    There are W * block_q queries and V * block_kv keys, and one of V and W is 1. ``listed`` [n, V] says which
    items exist. With ``by_key``, it is [n, W], and the result is transposed.
    """
    mask = part.mask
    q_position = (queries.position[q_items][..., None] + np.arange(mask.block_q)).reshape(len(q_items), 1, -1)
    kv_position = keys.position[kv_items][..., None] + np.arange(mask.block_kv)
    kv_position = kv_position.reshape(len(kv_items), 1, -1)

    def pairs(of_queries, of_keys):
        if by_key:
            return of_queries[..., None, :], of_keys[..., :, None]
        return of_queries[..., :, None], of_keys[..., None, :]

    # No mask shows a later key, so none shows the tail that fills up the last block.
    visible = part.token_mask(*pairs(q_position, kv_position))
    if queries.segment is not None:
        assert keys.segment is not None
        of_queries, of_keys = (
            jnp.swapaxes(segment[items], 1, 2).reshape(len(items), segment.shape[1], -1)
            for segment, items in ((queries.segment, q_items), (keys.segment, kv_items))
        )
        of_queries, of_keys = pairs(of_queries, of_keys)
        visible = visible & (of_queries == of_keys)
    listed_tokens = jnp.repeat(listed, mask.block_q if by_key else mask.block_kv, axis=1)
    # The heads share it: computed once, not at each use of the scores.
    return lax.optimization_barrier(visible & listed_tokens[:, None, None])


def _alike(queries: Items, keys: Items) -> Callable | None:
    """A function that says whether all tokens of some items are of one segment, in each sequence.

    It takes query items [n] or [n, W] and KV items [n, V]; one of V and W is 1. None without segments.
    """
    if queries.segment is None:
        return None
    assert keys.segment is not None
    segments = queries.segment, keys.segment
    low, high = ([reduce(ids, axis=-1) for ids in segments] for reduce in (jnp.min, jnp.max))  # [N, B]

    def alike(q_items, kv_items):
        q_items = q_items.reshape(q_items.shape[0], -1)
        same = (low[0][q_items] == high[1][kv_items]) & (high[0][q_items] == low[1][kv_items])
        return jnp.all(same & (low[0][q_items] == high[0][q_items]))

    return alike


def _hide(scores, visible):
    """-inf where not visible [n, B or 1, block_q, keys]; scores [n, B, H, G * block_q, keys]."""
    group = scores.shape[3] // visible.shape[2]
    return jnp.where(jnp.tile(visible[:, :, None], (1, 1, 1, group, 1)), scores, -jnp.inf)
