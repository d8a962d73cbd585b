"""Dense masked attention that anyone can read: what every other implementation must agree with."""

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.masks.block_mask import BlockMask


def forward(q, k, v, mask: BlockMask, scale, q_segment_ids=None, kv_segment_ids=None):
    """out [B, T, Hq, D] and lse [B, T, Hq] by the definition, from a [B, Hq, T, S] array of scores.

    out = softmax(scale * q kᵀ over the visible keys) v, lse = log sum exp of the same scores. Computed in
    float32, or in float64 where q is. Differentiated by JAX itself.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    heads_per_kv = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(dtype), heads_per_kv, axis=2) for x in (k, v))
    visible = visible_keys(mask, q.shape[2])
    if q_segment_ids is not None and kv_segment_ids is not None:
        visible = visible & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])

    scores = scale * jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k, precision="highest")
    seen = jnp.any(visible, axis=-1)
    scores = jnp.where(visible, scores, jnp.where(seen[..., None], -jnp.inf, 0))  # an empty row stays finite
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    lse = jnp.where(seen, lse, -jnp.inf)
    return out.astype(q.dtype), jnp.swapaxes(lse, 1, 2).astype(jnp.float32)


def visible_keys(mask: BlockMask, num_q_heads: int):
    """The whole mask, bool [1 or B, Hq, T, S]: block listed, and shown by the row's token mask."""
    num_lists = int(np.prod(mask.kv_start.shape))
    index, start, count = (jnp.asarray(x).reshape(-1) for x in (mask.kv_index, mask.kv_start, mask.kv_count))
    entry = jnp.arange(index.shape[0])
    owner = jnp.searchsorted(start, entry, side="right") - 1
    listed = entry - start[owner] < count[owner]
    blocks = jnp.zeros((num_lists, mask.num_kv_blocks), bool).at[owner, index].max(listed)
    blocks = blocks.reshape(-1, *mask.kv_start.shape[-2:], mask.num_kv_blocks)
    elements = jnp.repeat(jnp.repeat(blocks, mask.block_q, axis=2), mask.block_kv, axis=3)
    elements = elements[:, :, : mask.q_len, : mask.kv_len]

    q_position = np.arange(mask.q_len)[:, None] + mask.kv_len - mask.q_len
    tokens = np.stack([row(q_position, np.arange(mask.kv_len)) for row in mask.token_masks])
    rows = mask.head_rows
    if rows is None:
        num_rows = mask.kv_start.shape[-2]
        rows = [head * num_rows // num_q_heads for head in range(num_q_heads)]
    return (elements & tokens)[:, np.asarray(rows)]
