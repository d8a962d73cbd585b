"""Dense masked attention that anyone can read; every other implementation must agree with it."""

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.implementations.interface import Visible
from jsparse.masks.block_mask import BlockMask


def forward(q, k, v, visible: Visible, scale, q_segment_ids=None, kv_segment_ids=None):
    """out [B, T, Hq, D] and lse [B, T, Hq] by the definition, from a [B, Hq, T, S] array of scores.

    Over the visible keys, out = softmax(scale * q kᵀ) v and lse = log sum exp(scale * q kᵀ). Computed in
    float32, or in float64 if q is. JAX differentiates it by itself.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    heads_per_kv = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(dtype), heads_per_kv, axis=2) for x in (k, v))
    shown = visible_keys(visible, q.shape[2])
    if q_segment_ids is not None and kv_segment_ids is not None:
        shown = shown & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])

    scores = scale * jnp.einsum("bthd,bshd->bhts", q.astype(dtype), k, precision="highest")
    seen = jnp.any(shown, axis=-1)
    scores = jnp.where(shown, scores, jnp.where(seen[..., None], -jnp.inf, 0))  # an empty row stays finite
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(shown, jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    lse = jnp.where(seen, lse, -jnp.inf)
    return out.astype(q.dtype), jnp.swapaxes(lse, 1, 2).astype(jnp.float32)


def visible_keys(visible: Visible, num_q_heads: int):
    """The whole mask, bool [1 or B, Hq, T, S]: shown by the head's token mask, and in a listed block."""
    q_position = np.arange(visible.q_len)[:, None] + visible.kv_len - visible.q_len
    kv_position = np.arange(visible.kv_len)
    if isinstance(visible, BlockMask):
        rows, row_of_head = visible.token_masks, visible.row_of_head(num_q_heads)
    else:
        rows = visible.distinct()
        row_of_head = [rows.index(mask) for mask in visible.per_head(num_q_heads)]
    shown = jnp.asarray(np.stack([mask(q_position, kv_position) for mask in rows]))[None]
    if isinstance(visible, BlockMask):
        shown = shown & _listed_keys(visible)
    return shown[:, np.asarray(row_of_head)]


def _listed_keys(mask: BlockMask):
    """Which keys lie in the blocks listed for each query, bool [1 or B, R, T, S]."""
    num_lists = int(np.prod(mask.kv_start.shape))
    index, start, count = (jnp.asarray(x).reshape(-1) for x in (mask.kv_index, mask.kv_start, mask.kv_count))
    entry = jnp.arange(index.shape[0])
    owner = jnp.searchsorted(start, entry, side="right") - 1
    listed = entry - start[owner] < count[owner]
    blocks = jnp.zeros((num_lists, mask.num_kv_blocks), bool).at[owner, index].max(listed)
    blocks = blocks.reshape(-1, *mask.kv_start.shape[-2:], mask.num_kv_blocks)
    elements = jnp.repeat(jnp.repeat(blocks, mask.block_q, axis=2), mask.block_kv, axis=3)
    return elements[:, :, : mask.q_len, : mask.kv_len]
