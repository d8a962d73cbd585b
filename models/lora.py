"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, in place."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from flax import nnx

from jsparse.integers import require_integer
from jsparse.models.frozen_base import dequantize_base, is_quantized
from jsparse.models.layers import DropoutKey, Linear, LoRAParam, linear_layers, logical_axes


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float | int,
    rngs: nnx.Rngs,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    dropout: float | int = 0.0,
) -> None:
    """Attach adapters to every linear layer that one of ``targets`` names.

    From now on it computes ``x W + b + (alpha / rank) (x A) B``. A [in, rank] is normal with variance ``1 /
    in``, B [rank, out] is zero, so the model's output does not change at first. Both are LoRAParam in
    float32, whatever the model's dtype, and are cast where they are used.

    A target is the last name of layers ("q_proj"), or a pattern (``fnmatch``) of their whole dotted paths:
    "layers.*.mlp.up_proj", "layers.0.self_attn.*", or "*" for all. ``lm_head`` is not among them.

    ``dropout`` is as in PEFT: A sees each element of x with probability ``1 - dropout``, divided by that, and
    otherwise zero; W sees all of x. Without a key from ``set_dropout_keys`` nothing is dropped.

    Raises ValueError for a rank or alpha that is not positive, a dropout outside [0, 1), for targets that
    match no linear layer, and for a model that has adapters already; then nothing is attached.

    >>> from jsparse.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0))
    >>> add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj", "layers.*.mlp.*"))
    >>> model.layers[0].self_attn.q_proj.lora_a.shape
    (32, 2)
    """
    require_integer("rank", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), not {dropout!r}")
    linears = dict(linear_layers(model))
    _check_targets(targets, linears)
    if has_lora(model):
        raise ValueError("the model has LoRA adapters already; merge_lora(model) folds them in")
    for path, linear in linears.items():
        if any(_names(target, path) for target in targets):
            a = linear.in_size**-0.5 * jax.random.normal(rngs.params(), (linear.in_size, rank), jnp.float32)
            b = jnp.zeros((rank, linear.out_size), jnp.float32)
            linear.lora_a = LoRAParam(a, **logical_axes(linear.axes[0], None))
            linear.lora_b = LoRAParam(b, **logical_axes(None, linear.axes[1]))
            linear.lora_scale = alpha / rank
            linear.lora_dropout = float(dropout)


def merge_lora(model: nnx.Module) -> None:
    """Fold every adapter into its kernel, ``W + (alpha / rank) A B`` in float32, and remove it.

    In a frozen base of 4 or 8 bits, W is what its codes stand for, as when the adapters were trained. The
    whole model then has ordinary kernels again, in the dtype they had.

    Raises ValueError if there is no adapter.
    """
    if not has_lora(model):
        raise ValueError("the model has no LoRA adapters to merge")
    if is_quantized(model):
        dequantize_base(model)
    for _, linear in linear_layers(model):
        if linear.lora_a is not None and linear.lora_b is not None:
            kernel = linear.kernel[...]
            update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest")
            merged = kernel.astype(jnp.float32) + linear.lora_scale * update
            linear.kernel[...] = merged.astype(kernel.dtype)
            linear.lora_a = linear.lora_b = linear.dropout_key = None
            linear.lora_scale = linear.lora_dropout = 0.0


def set_dropout_keys(model: nnx.Module, key: jax.Array | None) -> None:
    """Let the adapters drop their inputs, each by a key of its own made from ``key``; None ends it.

    For the training step, on the model that it has just merged, inside ``jit``: the keys are part of the
    model's state, and go with its layers into ``jax.checkpoint``. Adapters without dropout get none.

    >>> from jsparse.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0))
    >>> add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(1), dropout=0.1)
    >>> set_dropout_keys(model, jax.random.key(0))  # training
    >>> set_dropout_keys(model, None)  # evaluation
    """
    for index, (_, linear) in enumerate(linear_layers(model)):
        if key is None or not linear.lora_dropout:
            linear.dropout_key = None
        else:
            linear.dropout_key = DropoutKey(jax.random.fold_in(key, index))


def has_lora(model: nnx.Module) -> bool:
    """Whether any linear layer carries an adapter."""
    return any(linear.lora_a is not None for _, linear in linear_layers(model))


def _names(target, path):
    return target == path.rsplit(".", 1)[-1] or fnmatchcase(path, target)


def _check_targets(targets: Sequence[str], linears: dict[str, Linear]) -> None:
    if isinstance(targets, str):
        raise ValueError(f"targets must be a sequence of names, not the string {targets!r}")
    unmatched = [target for target in targets if not any(_names(target, path) for path in linears)]
    if unmatched or not targets:
        names = sorted({path.rsplit(".", 1)[-1] for path in linears})
        paths = list(linears)
        raise ValueError(
            f"targets {unmatched or list(targets)} match no linear layer; allowed are {', '.join(names)}, "
            f"and patterns with * that match a path like {paths[0]} (the last is {paths[-1]})"
        )
