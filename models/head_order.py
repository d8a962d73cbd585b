"""The same model with its KV heads in another order: retrieval heads first, streaming heads last."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from jsparse.models.frozen_base import is_quantized
from jsparse.models.llama import Llama
from jsparse.models.lora import has_lora


def reorder_heads(
    model: Llama, streaming_heads: Bool[np.ndarray, "layers kv_heads"]
) -> tuple[Llama, Bool[np.ndarray, "layers kv_heads"]]:
    """A model that computes the same, whose streaming heads stand last in each layer, and the new pattern.

    Attention treats its heads alike, so they may stand in any order, as long as each KV head keeps its group
    of query heads and its rows of the output projection::

        out = sum over KV heads h of  attend(x Wq[h], x Wk[h], x Wv[h]) Wo[h]

    In each layer the columns of q_proj (a whole group for each KV head), k_proj and v_proj, their biases, and
    the rows of o_proj are permuted alike, retrieval heads first; within each kind the order stays. The heads
    of either kind are then one slice. Logits are the same up to rounding, as o_proj adds its heads in another
    order. ``model`` does not change.

    - streaming_heads: True where a KV head streams, as from ``HeadPattern.threshold``. A layer may have no
      streaming heads, or no others.

    Returns the model, which shares with ``model`` the parameters that are not permuted, and the pattern,
    permuted in the same way.

    Raises ValueError for a pattern that is not boolean or does not have the shape of the model's heads, and
    for a model with LoRA adapters or a quantized base.

    Source: DuoAttention (arXiv 2410.10819), which reorders the weights of the models it deploys in this way.

    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig.tiny(num_hidden_layers=1)
    >>> model, streams = reorder_heads(
    ...     Llama(config, rngs=nnx.Rngs(0)), np.array([[True, False]])
    ... )
    >>> streams
    array([[False,  True]])
    """
    streams = np.asarray(streaming_heads)
    expected = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    if streams.dtype != bool:
        raise ValueError(
            f"streaming_heads must be boolean, as from HeadPattern.threshold, not {streams.dtype}"
        )
    if streams.shape != expected:
        raise ValueError(
            f"streaming_heads is {streams.shape}, but must be {expected}: "
            f"the model has {expected[0]} layers of {expected[1]} KV heads"
        )
    if has_lora(model):
        raise ValueError("the model has LoRA adapters, which are not reordered; call merge_lora first")
    if is_quantized(model):
        raise ValueError("the model's base is quantized, which is not reordered; call dequantize_base first")

    orders = np.argsort(streams, axis=1, kind="stable")
    reordered = nnx.clone(model)
    for layer, order in zip(reordered.layers, orders, strict=True):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            _reorder(projection.kernel, order, axis=1)
            if projection.bias is not None:
                _reorder(projection.bias, order, axis=0)
        _reorder(attention.o_proj.kernel, order, axis=0)  # its bias is added to the sum over heads
    return reordered, np.take_along_axis(streams, orders, axis=1)


def _reorder(parameter: nnx.Param, order: np.ndarray, axis: int) -> None:
    """Permute the equal parts of an axis, one for each KV head: one head's columns, or its group's."""
    value = parameter[...]
    parts = value.reshape(*value.shape[:axis], len(order), -1, *value.shape[axis + 1 :])
    parameter[...] = jnp.take(parts, order, axis=axis).reshape(value.shape)
