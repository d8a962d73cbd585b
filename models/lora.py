"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, in place."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jsparse.models.layers import Linear, LoRAParam, logical_axes


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float | int,
    rngs: nnx.Rngs,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> None:
    """Attach adapters to every linear layer named in ``targets``.

    From now on it computes ``x W + b + (alpha / rank) (x A) B``. A [in, rank] is normal with variance ``1 /
    in``, B [rank, out] is zero, so the model's output does not change at first. Both are LoRAParam in
    float32, whatever the model's dtype, and are cast where they are used.

    Raises ValueError for a rank or alpha that is not positive, for targets that name no linear layer, and for
    a model that has adapters already; then nothing is attached.

    >>> from jsparse.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                           num_attention_heads=2), rngs=nnx.Rngs(0))
    >>> add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj",))
    >>> model.layers[0].self_attn.q_proj.lora_a.shape
    (8, 2)
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, not {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")
    linears = dict(_linear_layers(model))
    names = sorted({name.rsplit(".", 1)[-1] for name in linears})
    if isinstance(targets, str):
        raise ValueError(f"targets must be a sequence of names, not the string {targets!r}")
    unmatched = [target for target in targets if target not in names]
    if unmatched or not targets:
        raise ValueError(
            f"targets {unmatched or list(targets)} match no linear layer; allowed are {', '.join(names)}"
        )
    if has_lora(model):
        raise ValueError("the model has LoRA adapters already; merge_lora(model) folds them in")
    for name, linear in linears.items():
        if name.rsplit(".", 1)[-1] in targets:
            in_size, out_size = linear.kernel.shape
            a = in_size**-0.5 * jax.random.normal(rngs.params(), (in_size, rank), jnp.float32)
            linear.lora_a = LoRAParam(a, **logical_axes(linear.axes[0], None))
            linear.lora_b = LoRAParam(
                jnp.zeros((rank, out_size), jnp.float32), **logical_axes(None, linear.axes[1])
            )
            linear.lora_scale = alpha / rank


def merge_lora(model: nnx.Module) -> None:
    """Fold every adapter into its kernel, ``W + (alpha / rank) A B`` in float32, and remove it.

    Raises ValueError if there is none.
    """
    if not has_lora(model):
        raise ValueError("the model has no LoRA adapters to merge")
    for _, linear in _linear_layers(model):
        if linear.lora_a is not None and linear.lora_b is not None:
            kernel = linear.kernel[...]
            update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest")
            merged = kernel.astype(jnp.float32) + linear.lora_scale * update
            linear.kernel[...] = merged.astype(kernel.dtype)
            linear.lora_a = linear.lora_b = None
            linear.lora_scale = 0.0


def has_lora(model: nnx.Module) -> bool:
    """Whether any linear layer carries an adapter."""
    return any(linear.lora_a is not None for _, linear in _linear_layers(model))


def _linear_layers(model):
    """(dotted path, module) of every Linear but lm_head, whose output the loss reads directly."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Linear) and name != "lm_head":
            yield name, module
