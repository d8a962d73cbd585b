"""What a run starts from: the model it trains, split and placed, and the state before its first step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, quantize_base
from jsparse.models.layers import linear_layers
from jsparse.models.longlora import is_trained_with_lora
from jsparse.models.masking import ModelMask
from jsparse.models.peft_names import HEAD, find_named, module_name, whole_among
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
    """Give the model the frozen base and the adapters that the run trains it with.

    Raises ValueError for targets, patterns, layers and modules to save that the model does not have.
    """
    if config.lora_rank is None:
        return model
    whole = whole_modules(config, model)
    linears = {path: module_name(path) for path, _ in linear_layers(model)}
    if config.base_bits is not None:
        unfrozen = [name for name in linears.values() if name in whole]
        if unfrozen:
            raise ValueError(
                f"modules_to_save={config.modules_to_save} trains {', '.join(unfrozen)}, which base_bits="
                f"{config.base_bits} keeps frozen; allowed are embeddings, norms and lm_head"
            )
        quantize_base(model, config.base_bits)
    add_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        rngs=nnx.Rngs(config.seed),
        targets=config.lora_targets,
        dropout=config.lora_dropout,
        rslora=config.rslora,
        rank_pattern=config.lora_rank_pattern,
        alpha_pattern=config.lora_alpha_pattern,
        layers=config.lora_layers,
        exclude=[path for path in (*linears, HEAD) if module_name(path) in whole],
    )
    return model


def whole_modules(config: FinetuneConfig, model: Llama) -> list[str]:
    """The modules that ``modules_to_save`` trains whole, by their names in transformers."""
    modules = list(dict.fromkeys(module_name(".".join(path[:-1])) for path in _parameter_paths(model)))
    if model.config.tie_word_embeddings and whole_among(config.modules_to_save, [HEAD]):
        raise ValueError(
            f"modules_to_save={config.modules_to_save} names lm_head, which the model ties to the embedding; "
            "embed_tokens trains both"
        )
    return find_named("modules_to_save", config.modules_to_save, modules, whole_among)


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
        dpo_beta=config.dpo_beta,
        mesh=mesh,
    )


def is_trained(config: FinetuneConfig) -> Any:
    """A filter for ``nnx.split``: which parameters to train."""
    if config.lora_rank is None:
        return nnx.Param
    beside = is_trained_with_lora if config.train_embeddings_and_norms else LoRAParam
    if not config.modules_to_save:
        return beside

    def is_whole(path: tuple, variable: nnx.Variable) -> bool:
        module = module_name(".".join(map(str, path[:-1])))
        return isinstance(variable, nnx.Param) and bool(whole_among(config.modules_to_save, [module]))

    return nnx.Any(beside, is_whole)


def _parameter_paths(model: Llama) -> list[tuple[str, ...]]:
    return [tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def _placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays where they belong on the mesh; new ones are still on one device."""

    def place(x, sharding):
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else put(x, sharding)

    return jax.tree.map(place, tree, parameter_shardings(tree, mesh))
