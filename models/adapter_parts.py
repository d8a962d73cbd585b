"""The parts of a model that an adapter can hold, by the names of the modules in transformers."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jsparse.models.layers import Linear, RMSNorm, adaptable_layers, linear_layers
from jsparse.models.llama import Llama
from jsparse.models.peft_names import EMBEDDING, HEAD, module_name
from jsparse.models.sharding import put

PREFIX = "base_model.model."  # of every tensor in PEFT's file; then comes its name in transformers
TABLE = f"{EMBEDDING}.weight"
# What PEFT writes beside an adapter on the head: the weight that it was trained on.
BASE_HEAD = f"{HEAD}.base_layer.weight"


class Weight(NamedTuple):
    """A parameter, and whether torch stores its transpose."""

    parameter: nnx.Param
    transposed: bool = False

    def shape(self) -> tuple[int, ...]:
        """As torch has it."""
        shape = self.parameter[...].shape
        return shape[::-1] if self.transposed else shape

    def get(self) -> np.ndarray:
        array = np.asarray(self.parameter[...])
        return np.ascontiguousarray(array.T if self.transposed else array)

    def set(self, array: np.ndarray) -> None:
        """Replace the value; it keeps its dtype and, on a mesh, its place."""
        old = self.parameter[...]
        new = (array.T if self.transposed else array).astype(old.dtype)
        on_mesh = isinstance(old.sharding, NamedSharding)
        self.parameter[...] = put(new, old.sharding) if on_mesh else jnp.asarray(new)


def linears_of(model: Llama) -> dict[str, Linear]:
    """The linear layers that have an adapter or may get one."""
    return {module_name(path): linear for path, linear in adaptable_layers(model)}


def sizes_of(model: Llama) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every layer that can be adapted; a head is among them also if it is tied."""
    sizes = {module_name(path): (linear.in_size, linear.out_size) for path, linear in linear_layers(model)}
    return sizes | {HEAD: (model.config.hidden_size, model.config.vocab_size)}


def whole_weights(model: Llama) -> dict[str, dict[str, Weight]]:
    """The weights of every module that can be saved whole; a tied ``lm_head`` has the embedding's."""
    embedding = {"weight": Weight(model.embed_tokens.embedding)}
    norms = {
        module_name(".".join(map(str, path))): {"weight": Weight(module.scale)}
        for path, module in nnx.iter_modules(model)
        if isinstance(module, RMSNorm)
    }
    linears = {
        name: {"weight": Weight(linear.kernel, transposed=True)}
        | ({} if linear.bias is None else {"bias": Weight(linear.bias)})
        for name, linear in linears_of(model).items()
    }
    head = {HEAD: embedding} if model.config.tie_word_embeddings else {}
    return {EMBEDDING: embedding} | norms | linears | head


def tensors_of(whole: Mapping[str, dict[str, Weight]], names: Iterable[str]) -> dict[str, Weight]:
    """The weights of these modules by the names of their tensors."""
    return {f"{name}.{part}": weight for name in names for part, weight in whole[name].items()}


def lora_weights(adapted: Mapping[str, Linear]) -> dict[str, Weight]:
    """A and B of these layers by the names of their tensors."""
    weights = {}
    for name, linear in adapted.items():
        assert linear.lora_a is not None and linear.lora_b is not None
        weights[f"{name}.lora_A.weight"] = Weight(linear.lora_a, transposed=True)
        weights[f"{name}.lora_B.weight"] = Weight(linear.lora_b, transposed=True)
    return weights
