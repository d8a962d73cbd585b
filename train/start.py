"""What a run starts from: the model it trains, split and placed, and the state before its first step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, quantize_base
from jsparse.models.longlora import is_trained_with_lora
from jsparse.models.masking import ModelMask
from jsparse.models.positions import describe, note, positions_of
from jsparse.models.sharding import parameter_shardings, put
from jsparse.train.config import FinetuneConfig
from jsparse.train.step import Metrics, SplitModel, TrainState, new_state, split_model, train_step


def extended_config(config: FinetuneConfig, model: LlamaConfig) -> LlamaConfig:
    """The model's config with positions for the run's context.

    A note says if that changes nothing although only the larger reading of the config allows the context.
    """
    extended = model.extend_context(config.context, config.rope, positions=config.positions)
    has = positions_of(extended)
    if has.certain < config.context:
        note(
            f"context={config.context} is more than {has.certain}, but within the model's "
            f"{describe(extended)}: its RoPE stays as it is"
        )
    return extended


def load_start(
    config: FinetuneConfig, model_config: LlamaConfig, mesh: Mesh | None
) -> tuple[TrainState, SplitModel]:
    """The model in ``config``'s folder before the first step, with ``model_config`` in place of its own.

    Raises ValueError for weights that are stored as float16, which overflows, if no dtype is given.
    """
    model = Llama.from_pretrained(config.model, dtype=config.dtype, mesh=mesh)
    if model.norm.scale[...].dtype == jnp.float16:
        raise ValueError(
            f"dtype must be float32 or bfloat16, for {config.model} is stored as float16, which overflows"
        )
    model.config = model_config
    params, split = split_model(prepare(config, model), is_trained(config))
    if mesh is None:
        return new_state(params, config.optimizer()), split
    params = _placed(params, mesh)
    split = split._replace(frozen=_placed(split.frozen, mesh))
    abstract = jax.eval_shape(lambda params: new_state(params, config.optimizer()), params)
    with jax.set_mesh(mesh):
        start = jax.jit(
            lambda params: new_state(params, config.optimizer()),
            out_shardings=parameter_shardings(abstract, mesh),
        )
        return start(params), split


def prepare(config: FinetuneConfig, model: Llama) -> Llama:
    """Give the model the frozen base and the adapters that the run trains it with."""
    if config.base_bits is not None:
        quantize_base(model, config.base_bits)
    if config.lora_rank is not None:
        add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            rngs=nnx.Rngs(config.seed),
            targets=config.lora_targets,
            dropout=config.lora_dropout,
        )
    return model


def make_step(
    config: FinetuneConfig, split: SplitModel, mask: ModelMask, mesh: Mesh | None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step that the run takes and that its plan compiles; see ``train_step``."""
    return train_step(
        split,
        config.optimizer(),
        mask,
        remat=config.remat,
        dropout_seed=config.seed if config.lora_rank and config.lora_dropout else None,
        mesh=mesh,
    )


def is_trained(config: FinetuneConfig) -> Any:
    """A filter for ``nnx.split``: which parameters to train."""
    if config.lora_rank is None:
        return nnx.Param
    return is_trained_with_lora if config.train_embeddings_and_norms else LoRAParam


def _placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays where they belong on the mesh; new ones are still on one device."""

    def place(x, sharding):
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else put(x, sharding)

    return jax.tree.map(place, tree, parameter_shardings(tree, mesh))
