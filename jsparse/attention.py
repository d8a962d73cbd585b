"""Block-sparse attention (dense placeholder, being replaced)."""

import jax
import jax.numpy as jnp

from jsparse.masks import TokenMask


def attention(
    q, k, v, mask, *, scale=None, q_segment_ids=None, kv_segment_ids=None, implementation=None, return_lse=False
):
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    masks = [mask] * heads if isinstance(mask, TokenMask) else list(mask)
    q_pos = jnp.arange(q_len)[:, None] + kv_len - q_len
    visible = jnp.stack([m(q_pos, jnp.arange(kv_len)) for m in masks])[None]
    if q_segment_ids is not None:
        visible = visible & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * (dim**-0.5 if scale is None else scale)
    s = jnp.where(visible, s, -1e30)
    p = jnp.where(visible, jax.nn.softmax(s, axis=-1), 0)
    out = jnp.einsum("bhts,bshd->bthd", p.astype(v.dtype), v)
    return (out, jax.nn.logsumexp(s, axis=-1).swapaxes(1, 2)) if return_lse else out
