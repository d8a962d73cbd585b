"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, in place."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jsparse.checks import require_fraction
from jsparse.integers import require_integer
from jsparse.models.frozen_base import dequantize_base, is_quantized
from jsparse.models.layers import (
    DropoutKey,
    Linear,
    LoRAParam,
    adaptable_layers,
    linear_layers,
    logical_axes,
)
from jsparse.models.peft_names import (
    ALL_LINEAR,
    HEAD,
    check_alpha,
    check_pattern,
    module_name,
    pattern_value,
    unmatched_keys,
)


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float | int,
    rngs: nnx.Rngs,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    dropout: float | int = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float | int] | None = None,
    layers: Sequence[int] | None = None,
    exclude: Collection[str] = (),
) -> None:
    """Attach adapters to every linear layer that one of ``targets`` names.

    From now on it computes ``x W + b + scale (x A) B``, with ``scale = alpha / rank``. A [in, rank] is normal
    with variance ``1 / in``, B [rank, out] is zero, so the model's output does not change at first. Both are
    LoRAParam in float32, whatever the model's dtype, and are cast where they are used.

    - targets: the last names of layers ("q_proj"), or patterns (``fnmatch``) of their whole dotted paths:
      "layers.*.mlp.up_proj", "layers.0.self_attn.*". "*" and "all-linear" stand for all layers but the head,
      "lm_head" for the head. A head that is tied to the embedding gets an adapter of its own; the embedding
      stays as it is.
    - dropout: as in PEFT: A sees each element of x with probability ``1 - dropout``, divided by that, and
      otherwise zero; W sees all of x. Without a key from ``set_dropout_keys`` nothing is dropped.
    - rslora: ``scale = alpha / sqrt(rank)`` (arXiv 2312.03732).
    - rank_pattern, alpha_pattern: other ranks and alphas for some layers, by PEFT's rule: the first key
      counts that is a regular expression for the end of the layer's name, from a dot on: "down_proj",
      "layers.0.self_attn.q_proj", r"layers\\.[01]\\..*".
    - layers: of the decoder's layers, only these get adapters. None: all. The head is none of them.
    - exclude: dotted paths of layers that get none.

    Raises ValueError for a rank or alpha that is not positive, a dropout outside [0, 1), for targets and
    patterns that match no layer that is left, for layers that the model does not have, and for a model that
    has adapters already; then nothing is attached.

    >>> from jsparse.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0))
    >>> add_lora(
    ...     model,
    ...     rank=2,
    ...     alpha=4,
    ...     rngs=nnx.Rngs(1),
    ...     targets=("q_proj", "layers.*.mlp.*"),
    ...     rank_pattern={"up_proj": 8},
    ... )
    >>> model.layers[0].self_attn.q_proj.lora_a.shape, model.layers[0].mlp.up_proj.lora_a.shape
    ((32, 2), (32, 8))
    """
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    require_integer("rank", rank)
    check_pattern("rank_pattern", rank_pattern, require_integer)
    check_alpha("alpha", alpha)
    check_pattern("alpha_pattern", alpha_pattern, check_alpha)
    require_fraction("dropout", dropout)
    if has_lora(model):
        raise ValueError("the model has LoRA adapters already; merge_lora(model) folds them in")
    linears = dict(linear_layers(model))
    adaptable = [*linears, HEAD] if hasattr(model, HEAD) else list(linears)
    _check_targets(targets, adaptable)
    _check_layers(layers, linears)
    among = [path for path in adaptable if path not in exclude and _in_layers(path, layers)]
    left = {target: [path for path in among if _names(target, path)] for target in targets}
    if not all(left.values()):
        nothing = [target for target, paths in left.items() if not paths]
        raise ValueError(
            f"targets {nothing} match no linear layer among layers={layers} without exclude={sorted(exclude)}"
        )
    chosen = [path for path in among if any(path in paths for paths in left.values())]
    names = [module_name(path) for path in chosen]
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        unmatched = unmatched_keys(pattern, names)
        if unmatched:
            raise ValueError(
                f"{name} {unmatched} match no layer with an adapter; allowed are "
                f"{', '.join(sorted({one.rsplit('.', 1)[-1] for one in names}))}, "
                f"and expressions for the end of a name like {names[0]}"
            )
    if HEAD in chosen:
        linears[HEAD] = _head(model)
    for path, name in zip(chosen, names, strict=True):
        own_rank = pattern_value(rank_pattern, name, rank)
        _attach(linears[path], own_rank, rngs)
        own_alpha = pattern_value(alpha_pattern, name, alpha)
        linears[path].lora_scale = own_alpha / (math.sqrt(own_rank) if rslora else own_rank)
        linears[path].lora_rslora = rslora
        linears[path].lora_dropout = float(dropout)


def merge_lora(model: nnx.Module) -> None:
    """Fold every adapter into its kernel, ``W + scale A B`` in float32, and remove it.

    In a frozen base of 4 or 8 bits, W is what its codes stand for, as when the adapters were trained. The
    whole model then has ordinary kernels again, in the dtype they had. A head that is tied to the embedding
    gets a kernel of its own, if it has an adapter: the model is no longer tied.

    Raises ValueError if there is no adapter.
    """
    if not has_lora(model):
        raise ValueError("the model has no LoRA adapters to merge")
    if is_quantized(model):
        dequantize_base(model)
    _untie(model)
    for _, linear in adaptable_layers(model):
        if linear.lora_a is not None and linear.lora_b is not None:
            kernel = linear.kernel[...]
            update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest")
            merged = kernel.astype(jnp.float32) + linear.lora_scale * update
            linear.kernel[...] = merged.astype(kernel.dtype)
            linear.lora_a = linear.lora_b = linear.dropout_key = None
            linear.lora_scale = linear.lora_dropout = 0.0
            linear.lora_rslora = False


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
    for index, (_, linear) in enumerate(adaptable_layers(model)):
        if key is None or not linear.lora_dropout:
            linear.dropout_key = None
        else:
            linear.dropout_key = DropoutKey(jax.random.fold_in(key, index))


def has_lora(model: nnx.Module) -> bool:
    """Whether any linear layer carries an adapter."""
    return any(linear.lora_a is not None for _, linear in adaptable_layers(model))


def _attach(linear: Linear, rank: int, rngs: nnx.Rngs) -> None:
    a = linear.in_size**-0.5 * jax.random.normal(rngs.params(), (linear.in_size, rank), jnp.float32)
    b = jnp.zeros((rank, linear.out_size), jnp.float32)
    linear.lora_a = LoRAParam(a, **logical_axes(linear.axes[0], None))
    linear.lora_b = LoRAParam(b, **logical_axes(None, linear.axes[1]))


def _head(model: Any) -> Linear:
    """The head; of a model that ties it to the embedding a new one, which has no kernel."""
    if model.lm_head is None:
        vocab, embed = model.embed_tokens.embedding[...].shape
        axes = ("embed", "vocab")
        head = nnx.eval_shape(
            lambda: Linear(embed, vocab, axes, std=0.0, rngs=nnx.Rngs(0), dtype=jnp.float32)
        )
        head.kernel = nnx.data(None)  # type: ignore  # as in a frozen base
        model.lm_head = head
    return model.lm_head


def _untie(model: Any) -> None:
    """Give a head that has an adapter, but no kernel, the embedding's values as its kernel."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, Linear) and head.kernel is None:
        head.kernel = nnx.Param(model.embed_tokens.embedding[...].T, **logical_axes(*head.axes))
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


def _names(target, path):
    if path == HEAD:
        return target == HEAD
    return target in (path.rsplit(".", 1)[-1], ALL_LINEAR) or fnmatchcase(path, target)


def _in_layers(path: str, layers: Sequence[int] | None) -> bool:
    return layers is None or path == HEAD or _layer(path) in layers


def _layer(path: str) -> int | None:
    """The number of the decoder layer that a path lies in; None for a module that is in none."""
    parent, number, *_ = [*path.split("."), ""]
    return int(number) if parent == "layers" else None


def _check_targets(targets: Sequence[str], adaptable: Sequence[str]) -> None:
    if isinstance(targets, str):
        raise ValueError(f"targets must be a sequence of names, not the string {targets!r}")
    unmatched = [target for target in targets if not any(_names(target, path) for path in adaptable)]
    if unmatched or not targets:
        paths = [path for path in adaptable if path != HEAD]
        names = [*sorted({path.rsplit(".", 1)[-1] for path in paths}), HEAD]
        raise ValueError(
            f"targets {unmatched or list(targets)} match no linear layer; allowed are {', '.join(names)}, "
            f"{ALL_LINEAR}, and patterns with * that match a path like {paths[0]} (the last is {paths[-1]})"
        )


def _check_layers(layers: Sequence[int] | None, linears: dict[str, Linear]) -> None:
    numbers = {number for number in map(_layer, linears) if number is not None}
    if layers is not None and not (layers and numbers.issuperset(layers)):
        raise ValueError(
            f"layers must be None or some of the model's layers, 0 to {max(numbers, default=-1)}, "
            f"not {tuple(layers)}"
        )
