"""A gate for each KV head between full and streaming attention, and what the gates are trained to reduce."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

import jsparse
from jsparse.models import Llama, LlamaConfig
from jsparse.models.layers import Attend
from jsparse.models.masking import layer_masks


def mixed_attend(
    config: LlamaConfig, gates: Float[Array, "layers kv_heads"], *, sink: int, window: int
) -> Attend:
    """The ``attend`` argument of ``Llama.hidden`` that mixes full and streaming attention, one gate per KV
    head::

        out = gate * full + (1 - gate) * streaming

    for the query heads of each KV head. ``full`` is causal attention, within the layer's own sliding window
    if it has one; ``streaming`` sees the first ``sink`` and the last ``window`` keys. They are mixed in
    float32, differentiably in the gates.

    Raises ValueError unless the gates have the shape of the model's KV heads.

    Source: DuoAttention (arXiv 2410.10819). Its code streams by blocks of 128 tokens; here the mask is exact.

    >>> from flax import nnx
    >>> config = LlamaConfig.tiny()
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.arange(9)[None]
    >>> opened = mixed_attend(config, jnp.ones((2, 2)), sink=1, window=2)
    >>> bool(jnp.allclose(model.hidden(tokens, None, opened), model.hidden(tokens, None, model.attend())))
    True
    """
    expected = (config.num_hidden_layers, config.num_key_value_heads)
    if gates.shape != expected:
        raise ValueError(f"gates is {gates.shape}, but must be {expected}: one per layer and KV head")
    full_masks = layer_masks(config, None)
    streaming_mask = jsparse.streaming(sink, window)

    def attend(layer, q, k, v):
        full = jsparse.attention(q, k, v, full_masks[layer])
        streaming = jsparse.attention(q, k, v, streaming_mask)
        gate = jnp.repeat(gates[layer], q.shape[2] // k.shape[2])[:, None]
        return (gate * full + (1 - gate) * streaming).astype(q.dtype)

    return attend


def gate_loss(
    gates: Float[Array, "layers kv_heads"],
    model: Llama,
    tokens: Int32[Array | np.ndarray, "B T"],
    is_answer: Bool[Array | np.ndarray, "B T"],
    *,
    sink: int,
    window: int,
    l1: float | Float32[Array, ""],
    remat: bool = False,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The loss that the gates are trained to reduce, and its first part, the distance::

        distance = mean over answer tokens and features of (hidden_full - hidden_mixed)²
        loss = distance + l1 * mean |gate|

    The hidden states are the model's last ones, after the final norm, at the token before each answer token,
    from which it is predicted. Those of the full model have no gradient. DuoAttention's paper (arXiv
    2410.10819) writes a sum over all gates; its code takes the mean, as we do, and ``l1=0.05`` is meant for
    the mean. Its code also counts the questions, not only the answers.

    With open gates the loss is their price alone:

    >>> from flax import nnx
    >>> config = LlamaConfig.tiny()
    >>> model, tokens = Llama(config, rngs=nnx.Rngs(0)), jnp.arange(9)[None]
    >>> loss, distance = gate_loss(jnp.ones((2, 2)), model, tokens, tokens > 6, sink=1, window=2, l1=0.5)
    >>> float(loss), float(distance)
    (0.5, 0.0)
    """
    full = jax.lax.stop_gradient(model.hidden(tokens, None, model.attend()))
    attend = mixed_attend(model.config, gates, sink=sink, window=window)
    mixed = model.hidden(tokens, None, attend, remat="layers" if remat else "none")
    squares = jnp.square(full.astype(jnp.float32) - mixed.astype(jnp.float32)).mean(axis=-1)
    predicts_answer = jnp.roll(is_answer, -1, axis=1).at[:, -1].set(False)
    distance = jnp.where(predicts_answer, squares, 0.0).sum() / jnp.maximum(predicts_answer.sum(), 1)
    return distance + l1 * jnp.abs(gates).mean(), distance
