"""The layers of a Llama as Flax NNX modules: linear maps, RMS norm, attention except the attending, MLP.

Kernels are stored [in, out]. Every parameter carries the logical names of its axes (embed, heads, kv_heads,
mlp, vocab) as ``out_sharding`` metadata, which ``nnx.get_partition_spec`` reads; nothing is sharded here, and
no mesh is needed.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jsparse.device import device_kind
from jsparse.models.config import LlamaConfig
from jsparse.models.rope import apply_rope
from jsparse.models.weight_codes import coded_matmul

_PIECES = 4  # of the inputs of a single row

Attend = Callable[[int, Array, Array, Array], Array]


class LoRAParam(nnx.Param):
    """A low-rank adapter's parameter: select it with ``nnx.state(model, LoRAParam)``."""


class FrozenCodes(nnx.Variable):
    """A kernel's codes, or their scales: no nnx.Param, as they are neither trained nor saved."""


class DropoutKey(nnx.Variable):
    """The random key with which an adapter drops its inputs, while there is one."""


def logical_axes(*names: str | None) -> dict:
    """Metadata that names a parameter's axes. Eager sharding is off: flax would ask for a mesh at once."""
    return {"out_sharding": names, "eager_sharding": False}


class Linear(nnx.Module):
    """``x @ kernel + bias``, and, while an adapter is attached, ``+ scale * (dropout(x) @ lora_a) @ lora_b``.

    Computes in the dtype of x. In a frozen base of 4 or 8 bits, ``codes`` and ``scales`` stand for the
    kernel, which is None.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        axes: tuple[str, str],
        *,
        bias: bool = False,
        std: float,
        rngs: nnx.Rngs,
        dtype,
    ):
        kernel = std * jax.random.normal(rngs.params(), (in_size, out_size), dtype)
        self.in_size, self.out_size, self.axes = in_size, out_size, axes
        self.kernel = nnx.Param(kernel, **logical_axes(*axes))
        self.codes: FrozenCodes | None = nnx.data(None)
        self.scales: FrozenCodes | None = nnx.data(None)
        self.coded_dtype: jnp.dtype | None = None  # of the kernel that the codes stand for
        self.bias = nnx.Param(jnp.zeros((out_size,), dtype), **logical_axes(axes[1])) if bias else None
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_rslora = False  # whether the scale is alpha / sqrt(rank), not alpha / rank
        self.lora_dropout = 0.0
        self.dropout_key: DropoutKey | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        if self.codes is not None and self.scales is not None:
            y = coded_matmul(x, self.codes[...], self.scales[...])
        else:
            y = times(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low_rank = self.drop(x) @ self.lora_a[...].astype(x.dtype)
            y = y + self.lora_scale * (low_rank @ self.lora_b[...].astype(x.dtype))
        return y

    def drop(self, x: Float[Array, "... in"], key: jax.Array | None = None) -> Float[Array, "... in"]:
        """What the adapter sees of x: with a key, ``key`` or else the layer's own, x after dropout."""
        if self.dropout_key is None:
            return x
        key = self.dropout_key[...] if key is None else key
        kept = jax.random.bernoulli(key, 1 - self.lora_dropout, x.shape)
        return jnp.where(kept, x / (1 - self.lora_dropout), 0)


def times(x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "*batch out"]:
    """``x @ kernel``.

    On a CPU the inputs of a single row are cut into pieces, a batch of products. With a large kernel jax 0.12
    computes that up to 1.7 times as fast as one product; jax 0.10 equally fast or a little faster.

    >>> times(jnp.ones((1, 8)), jnp.ones((8, 2))).tolist()
    [[8.0, 8.0]]
    """
    inputs = kernel.shape[0]
    single = x.dtype == jnp.float32 and x.size == inputs and inputs % _PIECES == 0
    if not single or device_kind() != "cpu":
        return x @ kernel
    parts = x.reshape(_PIECES, 1, -1) @ kernel.reshape(_PIECES, inputs // _PIECES, -1)
    # Added one by one, not reduced: XLA then adds where the sum is used.
    return functools.reduce(jnp.add, parts).reshape(*x.shape[:-1], -1)


def adaptable_layers(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(dotted path, module) of every Linear that can carry an adapter: ``linear_layers``, then lm_head.

    A head that is tied to the embedding is among them once it has an adapter.
    """
    yield from linear_layers(model)
    head = getattr(model, "lm_head", None)
    if isinstance(head, Linear):
        yield "lm_head", head


def linear_layers(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(dotted path, module) of every Linear except lm_head: the loss reads its kernel directly."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and name != "lm_head":
            yield name, module


class RMSNorm(nnx.Module):
    """``scale * x / sqrt(mean(x²) + eps)`` over the last axis, computed in float32, in the dtype of x."""

    def __init__(self, size: int, axis: str | None, *, eps: float, dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype), **logical_axes(axis))

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)


class Embedding(nnx.Module):
    """One row per token id."""

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float, rngs: nnx.Rngs, dtype):
        table = std * jax.random.normal(rngs.params(), (vocab_size, hidden_size), dtype)
        self.embedding = nnx.Param(table, **logical_axes("vocab", "embed"))

    def __call__(self, tokens):
        return self.embedding[...][tokens]


class SelfAttention(nnx.Module):
    """Projections, per-head norms and RoPE around the caller's attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype):
        embed, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        made = {"std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        bias = config.qkv_bias
        self.q_proj = Linear(embed, heads * self.head_dim, ("embed", "heads"), bias=bias, **made)
        self.k_proj = Linear(embed, kv_heads * self.head_dim, ("embed", "kv_heads"), bias=bias, **made)
        self.v_proj = Linear(embed, kv_heads * self.head_dim, ("embed", "kv_heads"), bias=bias, **made)
        self.o_proj = Linear(
            heads * self.head_dim, embed, ("heads", "embed"), bias=config.attention_bias, **made
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, None, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(self.head_dim, None, eps=config.rms_norm_eps, dtype=dtype)
        else:
            self.q_norm = self.k_norm = None

    def __call__(self, x, cos, sin, attend):
        q, k, v = (self._split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def _split_heads(self, x):
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype):
        made = {"bias": config.mlp_bias, "std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        embed, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(embed, inner, ("embed", "mlp"), **made)
        self.up_proj = Linear(embed, inner, ("embed", "mlp"), **made)
        self.down_proj = Linear(inner, embed, ("mlp", "embed"), **made)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype):
        self.input_layernorm = RMSNorm(config.hidden_size, "embed", eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = SelfAttention(config, rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, "embed", eps=config.rms_norm_eps, dtype=dtype
        )
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))
