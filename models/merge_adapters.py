"""Several adapters of one base, added to it by weight."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jsparse.models.adapter_loading import POSITION_FIELDS, load_adapter
from jsparse.models.checkpoint import load_config
from jsparse.models.config import LlamaConfig
from jsparse.models.layers import LoRAParam, adaptable_layers, linear_layers
from jsparse.models.llama import Llama
from jsparse.models.lora import merge_lora


def merge_adapters(model: Llama, adapters: Sequence[tuple[Path, float]]) -> None:
    """Add adapters to their base model, each by its weight, in place.

    A linear layer becomes ``W + sum_i w_i s_i A_i B_i``, where s_i is its scale in adapter i (``lora_alpha /
    r``): what PEFT computes with ``add_weighted_adapter(combination_type="cat")``. What adapters hold whole,
    like embeddings and norms, becomes ``W + sum_i w_i (W_i - W)``, over the adapters that hold it; so with a
    single one of weight 1 it is W_i. Sums are in float32, and rounded once to the model's dtype. (A linear
    layer that an adapter holds whole takes the model's dtype before that.) RoPE and the count of positions
    are those of the adapters.

    - adapters: folders, each with its weight; the weights need not sum to 1.

    Raises what ``load_adapter`` raises, and ValueError for adapters that were trained with different RoPE.
    After an error about the tensors of a later adapter the model is in no useful state.

    >>> from jsparse.models import LlamaConfig, add_lora, save_adapter
    >>> base, tuned = (Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0)) for _ in range(2))
    >>> add_lora(tuned, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj",))
    >>> tuned.layers[0].self_attn.q_proj.lora_b[...] += 1
    >>> save_adapter(tuned, "adapter", base="my-llama", trained=LoRAParam)
    >>> merge_adapters(base, [(Path("adapter"), 0.25), (Path("adapter"), 0.75)])
    >>> merge_lora(tuned)
    >>> kernels = [model.layers[0].self_attn.q_proj.kernel[...] for model in (base, tuned)]
    >>> bool(jnp.allclose(*kernels, atol=1e-6))
    True
    """
    base_config = model.config
    config = agreed_config([folder for folder, _ in adapters], base_config)
    kernels = {id(linear.kernel) for _, linear in linear_layers(model)}
    parameters = [parameter for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    wholes = [_Whole(parameter, parameter[...], id(parameter) not in kernels) for parameter in parameters]
    parts: dict[str, list[_Part]] = {}
    for folder, weight in adapters:
        for whole in wholes:
            whole.restore()
        load_adapter(model, folder)
        for path, linear in adaptable_layers(model):
            if linear.lora_a is None or linear.lora_b is None:
                continue
            part = _Part(linear.lora_a[...], weight * linear.lora_scale * linear.lora_b[...])
            parts.setdefault(path, []).append(part)
            linear.lora_a = linear.lora_b = None
            linear.lora_scale = linear.lora_dropout = 0.0
        wholes = [whole.plus(weight) for whole in wholes]
        model.config = base_config
    for whole in wholes:
        whole.parameter.set_value(whole.total())
    linears = dict(adaptable_layers(model))
    for path, added in parts.items():
        linear = linears[path]
        linear.lora_a = LoRAParam(jnp.concatenate([part.a for part in added], axis=1))
        linear.lora_b = LoRAParam(jnp.concatenate([part.scaled_b for part in added], axis=0))
        linear.lora_scale = 1.0
    model.config = config
    merge_lora(model)


def agreed_config(folders: Sequence[Path], base: LlamaConfig) -> LlamaConfig:
    """The config of a base model with the RoPE that all these adapters were trained with.

    Raises ValueError, naming two of them, if they do not agree.
    """
    configs = [_trained_config(folder, base) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        names = [name for name in POSITION_FIELDS if getattr(config, name) != getattr(configs[0], name)]
        if names:
            described = [
                f"{where} has {', '.join(f'{name}={getattr(one, name)}' for name in names)}"
                for where, one in ((folders[0], configs[0]), (folder, config))
            ]
            raise ValueError(
                f"adapters that are merged must have been trained with one RoPE, but {described[0]}, and "
                f"{described[1]}"
            )
    return configs[0]


def _trained_config(folder: Path, base: LlamaConfig) -> LlamaConfig:
    """An adapter without a config.json, as PEFT writes it, was trained with the base's RoPE."""
    if not (folder / "config.json").is_file():
        return base
    stored = load_config(folder)
    return dataclasses.replace(base, **{name: getattr(stored, name) for name in POSITION_FIELDS})


class _Part(NamedTuple):
    """What one adapter adds to a kernel: ``a @ scaled_b``."""

    a: jax.Array
    scaled_b: jax.Array


class _Whole(NamedTuple):
    """A parameter that adapters may hold whole: what it was in the base, and what they have made of it."""

    parameter: nnx.Param
    base: jax.Array
    wide: bool  # loaded in float32; for most of a model's weights that would take too much memory
    weights: float = 0.0  # of the adapters that hold it
    weighted: jax.Array | None = None  # the sum of what they hold, in float32

    def restore(self) -> None:
        """Be as in the base, for the next adapter to replace."""
        self.parameter.set_value(self.base.astype(jnp.float32) if self.wide else self.base)

    def plus(self, weight: float) -> "_Whole":
        """With the adapter that has just been loaded."""
        held = self.parameter[...]
        if jnp.array_equal(held, self.base.astype(held.dtype)):
            return self
        weighted = weight * held.astype(jnp.float32)
        weighted = weighted if self.weighted is None else self.weighted + weighted
        return self._replace(weights=self.weights + weight, weighted=weighted)

    def total(self) -> jax.Array:
        if self.weighted is None:
            return self.base
        total = (1 - self.weights) * self.base.astype(jnp.float32) + self.weighted
        return total.astype(self.base.dtype)
