"""Several adapters of one base, added to it by weight."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jsparse.models.adapter import adapted_config, load_adapter
from jsparse.models.config import LlamaConfig
from jsparse.models.layers import Linear, LoRAParam, linear_layers
from jsparse.models.llama import Llama
from jsparse.models.lora import merge_lora


def merge_adapters(model: Llama, adapters: Sequence[tuple[Path, float]]) -> None:
    """Add adapters to their base model, each by its weight, in place.

    A linear layer becomes ``W + sum_i w_i s_i A_i B_i``, where s_i is its scale in adapter i (``lora_alpha /
    r``): what PEFT computes with ``add_weighted_adapter(combination_type="cat")``. What adapters hold whole,
    embeddings and norms, becomes ``W + sum_i w_i (W_i - W)``, over the adapters that hold it; so with a
    single one of weight 1 it is W_i. All sums are in float32, and rounded once to the model's dtype. RoPE
    and the count of positions are those of the adapters.

    - adapters: folders, each with its weight; the weights need not sum to 1.

    Raises what ``load_adapter`` raises, and ValueError for adapters that were trained with different RoPE.

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
    config = _agreed_config([folder for folder, _ in adapters], base_config)
    linears = dict(linear_layers(model))
    wholes = [_Whole(parameter, parameter[...]) for parameter in _whole_parameters(model, linears)]
    parts: dict[str, list[_Part]] = {path: [] for path in linears}
    for folder, weight in adapters:
        for whole in wholes:
            whole.parameter.set_value(whole.base.astype(jnp.float32))
        load_adapter(model, folder)
        for path, linear in linears.items():
            if linear.lora_a is not None and linear.lora_b is not None:
                parts[path].append(_Part(linear.lora_a[...], weight * linear.lora_scale * linear.lora_b[...]))
                linear.lora_a = linear.lora_b = None
                linear.lora_scale = linear.lora_dropout = 0.0
        wholes = [whole.plus(weight) for whole in wholes]
        model.config = base_config
    for whole in wholes:
        whole.parameter.set_value(whole.total())
    for path, linear in linears.items():
        if parts[path]:
            linear.lora_a = LoRAParam(jnp.concatenate([part.a for part in parts[path]], axis=1))
            linear.lora_b = LoRAParam(jnp.concatenate([part.scaled_b for part in parts[path]], axis=0))
            linear.lora_scale = 1.0
    merge_lora(model)
    model.config = config


class _Part(NamedTuple):
    """What one adapter adds to a kernel: ``a @ scaled_b``."""

    a: jax.Array
    scaled_b: jax.Array


class _Whole(NamedTuple):
    """A parameter that adapters may hold whole: what it was in the base, and what they have made of it."""

    parameter: nnx.Param
    base: jax.Array
    weights: float = 0.0  # of the adapters that hold it
    weighted: jax.Array | None = None  # the sum of what they hold

    def plus(self, weight: float) -> "_Whole":
        """With the adapter that has just been loaded."""
        held = self.parameter[...]
        if jnp.array_equal(held, self.base.astype(held.dtype)):
            return self
        weighted = weight * held if self.weighted is None else self.weighted + weight * held
        return self._replace(weights=self.weights + weight, weighted=weighted)

    def total(self) -> jax.Array:
        if self.weighted is None:
            return self.base
        wide = (1 - self.weights) * self.base.astype(jnp.float32) + self.weighted
        return wide.astype(self.base.dtype)


def _whole_parameters(model: Llama, linears: dict[str, Linear]) -> list[nnx.Param]:
    """All but the kernels to which adapters are added."""
    kernels = {id(linear.kernel) for linear in linears.values()}
    parameters = [parameter for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return [parameter for parameter in parameters if id(parameter) not in kernels]


def _agreed_config(folders: Sequence[Path], base: LlamaConfig) -> LlamaConfig:
    """The base's config with the RoPE that all adapters were trained with."""
    configs = [adapted_config(folder, base) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config != configs[0]:
            names = ("rope", "max_position_embeddings", "max_sequence_length")
            differing = [name for name in names if getattr(config, name) != getattr(configs[0], name)]
            described = [
                f"{where} has {', '.join(f'{name}={getattr(one, name)}' for name in differing)}"
                for where, one in ((folders[0], configs[0]), (folder, config))
            ]
            raise ValueError(
                f"adapters that are merged must have been trained with one RoPE, but {described[0]}, and "
                f"{described[1]}"
            )
    return configs[0]
