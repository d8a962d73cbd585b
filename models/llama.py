"""The Llama family: one model class, whose attention is an argument."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import jsparse
from jsparse.models import checkpoint
from jsparse.models.choices import REMAT as REMAT
from jsparse.models.config import LlamaConfig
from jsparse.models.frozen_base import is_quantized
from jsparse.models.layers import Attend, DecoderLayer, Embedding, Linear, LoRAParam, RMSNorm
from jsparse.models.lora import has_lora
from jsparse.models.masking import ModelMask, layer_masks
from jsparse.models.rope import rope_tables
from jsparse.models.sharding import keep_tokens_split, put_parameter

Tokens = Int[Array | np.ndarray, "B T"]


class Llama(nnx.Module):
    """A decoder-only transformer of the Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3.

    ``Llama(config, rngs=nnx.Rngs(0))`` has random weights, normal with ``config.initializer_range``;
    ``from_pretrained`` reads a checkpoint. It computes in the dtype of its parameters; norms, rotations and
    softmax inside are float32, and logits are float32. The sub-modules are named as in Hugging Face's
    checkpoints, with ``lm_head`` None when it is tied to the embedding. An adapter on such a head makes it a
    Linear that has the adapter, but no kernel.

    >>> config = LlamaConfig.tiny()
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 257)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        made = {"rngs": rngs, "dtype": dtype}
        std = config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=std, **made)
        self.layers = nnx.List([DecoderLayer(config, **made) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, "embed", eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head: Linear | None = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), std=std, **made)

    def __call__(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        segment_ids: Tokens | None = None,
        mask: ModelMask | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Next-token logits, float32, of whole sequences: no cache.

        ``mask`` None is causal attention with each layer's own sliding window. A TokenMask, one TokenMask for
        each query head, or a BlockMask narrows it further, the same way in every layer. So does a sequence of
        one entry per layer, each a sequence of TokenMasks or a BlockMask. ``segment_ids`` separate packed
        documents. ``positions`` (0, 1, 2, ... by default) affect RoPE only; masks count places
        in the sequence.

        Raises ValueError for ids outside the vocabulary (where tokens are concrete: JAX would clamp them
        silently), for shapes that differ, and for a mask that the model's heads or windows cannot take.
        """
        attend = self.attend(mask, segment_ids)
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}, tokens {tokens.shape}; they must be equal"
            )
        return self.logits(self.hidden(tokens, positions, attend))

    def attend(self, mask: ModelMask | None = None, segment_ids: Tokens | None = None) -> Attend:
        """The ``attend`` argument of ``hidden`` for whole sequences, arguments as in ``__call__``."""
        masks = layer_masks(self.config, mask)
        ids = None if segment_ids is None else jnp.asarray(segment_ids)

        def attend(layer, q, k, v):
            return jsparse.attention(q, k, v, masks[layer], q_segment_ids=ids, kv_segment_ids=ids)

        return attend

    def hidden(
        self,
        tokens: Tokens,
        positions: Tokens | None,
        attend: Attend,
        *,
        remat: str = "none",
        trained: Any = LoRAParam,
    ) -> Float[Array, "B T embed"]:
        """The hidden states after the final norm, with attention left to the caller.

        ``attend(layer, q, k, v)`` gets the layer's number, queries [B, T, Hq, D] and keys [B, T, Hk, D], both
        normed and rotated, and values, and returns [B, T, Hq, D]. It applies masks, caches and windows.

        ``remat`` says what is kept for the backward pass: "none" recomputes nothing; "layers" keeps the input
        of each layer and recomputes the rest, for a third more time; "attention" also keeps attention's
        output, the most expensive part of a long context; "dots" keeps all products with weights. Except with
        "none", ``attend`` is traced more than once and must be pure. ``trained`` is the filter
        (``nnx.split``) of the layers' parameters whose gradients are taken, so their gradients are finished,
        and their inputs freed, before the backward pass reaches the previous layer.
        """
        self._check_tokens(tokens)
        if remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(map(repr, REMAT))}, not {remat!r}")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        elif positions.shape != tokens.shape:
            raise ValueError(
                f"positions has shape {positions.shape}, tokens {tokens.shape}; they must be equal"
            )
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, jnp.asarray(positions))
        # The embedding may be wider than the rest: training looks rows up in the float32 that it updates.
        x = keep_tokens_split(self.embed_tokens(tokens).astype(self.norm.scale[...].dtype))
        for number, layer in enumerate(self.layers):
            run = layer if remat == "none" else _rematerialized(layer, remat, trained)
            x = keep_tokens_split(run(x, cos, sin, functools.partial(attend, number)))
        return self.norm(x)

    def logits(
        self, hidden: Float[Array, "... embed"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "... vocab"]:
        """Scores of every vocabulary entry, float32.

        ``dropout_key`` takes the place of the key that ``set_dropout_keys`` gave the head's adapter.
        """
        head = self.lm_head
        if head is None or self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding[...].astype(hidden.dtype)
            scores = jnp.einsum("...e,ve->...v", hidden, table, preferred_element_type=jnp.float32)
        else:
            kernel = head.kernel[...].astype(hidden.dtype)
            scores = jnp.einsum("...e,ev->...v", hidden, kernel, preferred_element_type=jnp.float32)
        if head is not None and head.lora_a is not None and head.lora_b is not None:
            low_rank = head.drop(hidden, dropout_key) @ head.lora_a[...].astype(hidden.dtype)
            up = head.lora_b[...].astype(hidden.dtype)
            scores += head.lora_scale * jnp.einsum(
                "...r,rv->...v", low_rank, up, preferred_element_type=jnp.float32
            )
        return scores

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype=None, mesh: Mesh | None = None) -> "Llama":
        """The model in a Hugging Face folder: ``config.json`` and safetensors, in one file or in shards.

        ``directory`` may also be an id on the Hugging Face Hub (see :func:`jsparse.hub.model_folder`).
        Quantized weights are decoded. ``dtype`` None takes the dtype that config.json gives, or else that of
        the file. Stop tokens in ``generation_config.json`` override those of the config. On a ``mesh`` each
        parameter lies where ``jsparse.models.sharding`` says, and no device ever holds more than its part.

        Raises FileNotFoundError for a folder, config, weights or shard that is missing (pickled weights do
        not count), ValueError for a config that cannot be represented and for tensors that do not fit it.
        """
        config = checkpoint.load_config(directory)
        graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
        abstract = dict(nnx.to_flat_state(state))
        place = functools.partial(put_parameter, mesh=mesh)
        parameters = checkpoint.load_parameters(directory, config, abstract, dtype=dtype, place=place)
        return nnx.merge(graph, nnx.from_flat_state(parameters))

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write a Hugging Face folder that ``from_pretrained`` and transformers read to the same logits.

        Weights keep their dtype. A crash while writing leaves what was there, and other files
        (``tokenizer.json``) stay. Raises ValueError for a model with LoRA adapters or a quantized base: call
        merge_lora, or dequantize_base, first.
        """
        if has_lora(self):
            raise ValueError(
                "the model has LoRA adapters, which a Llama checkpoint cannot hold; call merge_lora first"
            )
        if is_quantized(self):
            raise ValueError(
                "the model's base is quantized, which a Llama checkpoint cannot hold; "
                "call dequantize_base first"
            )
        parameters = dict(nnx.to_flat_state(nnx.state(self, nnx.Param)))
        checkpoint.save(self.config, parameters, directory, max_shard_bytes=max_shard_bytes)

    def _check_tokens(self, tokens):
        if not isinstance(tokens, jax.Array | np.ndarray):
            raise TypeError(
                f"tokens must be an array of integers of shape [B, T], not {type(tokens).__name__}"
            )
        if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be an array of integers of shape [B, T], neither of them zero, "
                f"not {tokens.dtype}{list(tokens.shape)}"
            )
        if isinstance(tokens, Tracer):
            return  # inside jit there is no value to look at; serve and train check on the host
        ids = np.asarray(tokens)
        bad = np.unique(ids[(ids < 0) | (ids >= self.config.vocab_size)])
        if bad.size:
            shown = ", ".join(str(token) for token in bad[:5]) + (", ..." if bad.size > 5 else "")
            raise ValueError(
                f"tokens has ids {shown}; allowed are 0 to {self.config.vocab_size - 1} (vocab_size)"
            )


_POLICIES = {
    "layers": None,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _rematerialized(layer, remat: str, trained):
    graph, params, rest = nnx.split(layer, trained, ...)

    def run(x, cos, sin, attend):
        def again(params, rest, x):
            return nnx.merge(graph, params, rest)(x, cos, sin, attend)

        tied, x = _made_together((params, x))
        return jax.checkpoint(again, policy=_POLICIES[remat])(tied, rest, x)

    return run


@jax.custom_vjp
def _made_together(values):
    """The same values, with their gradients computed together.

    Otherwise XLA would postpone the products that give the gradients of a layer's parameters to the end of
    the step, and keep their operands, for every layer, until then.
    """
    return values


_made_together.defvjp(
    lambda values: (values, None), lambda _, gradients: (lax.optimization_barrier(gradients),)
)
