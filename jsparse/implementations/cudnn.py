"""Plain causal attention by cuDNN, through ``jax.nn.dot_product_attention``: dense, and good at that."""

import jax

from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import causal


def limit(q, k, mask: BlockMask, q_segment_ids, return_lse: bool) -> str | None:
    """Why cuDNN cannot take this call, or None where it can."""
    if any(row != causal() for row in mask.token_masks) or isinstance(mask.kv_index, jax.Array):
        return "cuDNN takes causal() for every head, and no chosen lists"
    if q.shape[1] != k.shape[1]:
        return f"cuDNN takes as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
    if q_segment_ids is not None:
        return "cuDNN takes no segment ids"
    if return_lse:
        return "cuDNN gives no differentiable lse"
    return None


def attention(q, k, v, scale: float):
    """out [B, T, Hq, D]. Differentiable by its own rule."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
