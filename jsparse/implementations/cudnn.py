"""Plain causal attention by cuDNN, through ``jax.nn.dot_product_attention``: dense, and fast at that."""

import jax

from jsparse.device import device_kind, hopper
from jsparse.implementations.interface import Call, Visible
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import causal
from jsparse.mesh import SEQUENCE_AXIS
from jsparse.pallas_kernels.measured import cudnn_is_faster


def limit(call: Call) -> str | None:
    """Why cuDNN cannot take this call, or None if it can."""
    if call.devices > 1:
        return (
            f"cuDNN is not called where the mesh axis {SEQUENCE_AXIS!r} splits the tokens over "
            f"{call.devices} devices"
        )
    masks = call.visible.exact if isinstance(call.visible, BlockMask) else call.visible
    if masks is None or any(mask != causal() for mask in masks.distinct()):
        return "cuDNN takes causal() for every head, and no chosen lists"
    if call.q.shape[1] != call.k.shape[1]:
        return f"cuDNN takes as many queries as keys, not {call.q.shape[1]} and {call.k.shape[1]}"
    if call.segments:
        return "cuDNN takes no segment ids"
    if call.return_lse:
        return "cuDNN gives no differentiable lse"
    return None


def is_faster(call: Call) -> bool:
    """Whether cuDNN was measured to be faster than the kernels on this device."""
    return hopper() and cudnn_is_faster(device_kind(), call.q.shape[-1], call.q.shape[1])


def forward(q, k, v, visible: Visible, scale, q_segment_ids=None, kv_segment_ids=None):
    """out [B, T, Hq, D], and None for lse. It has its own rule for differentiation."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn"), None
