"""Whether a fine-tuning run fits: its step compiled for GPUs this machine does not have, and its FLOPs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jsparse.models import Llama, LlamaConfig
from jsparse.models.masking import ModelMask
from jsparse.models.preference import most_pairs
from jsparse.models.sharding import abstract_parameters, batch_sharding, row_sharding
from jsparse.plan.compile_only import compile_only_devices, find_device
from jsparse.plan.program import DEFAULT_MEMORY_FRACTION, Plan, Program, check_memory_fraction, plan_program
from jsparse.train.config import FinetuneConfig
from jsparse.train.model_flops import step_flops
from jsparse.train.start import extended_config, is_trained, make_step, prepare, whole_modules
from jsparse.train.step import new_state, split_model

STORED_DTYPE = "bfloat16"  # assumed if a run keeps the dtype: nearly all published weights are bfloat16


def plan_finetune(
    config: FinetuneConfig,
    model: LlamaConfig,
    *,
    device: str,
    hosts: int = 1,
    memory_fraction: float | int = DEFAULT_MEMORY_FRACTION,
) -> Plan:
    """The memory that ``finetune(config)`` takes on each device, and the FLOPs of a step.

    Compiles the step that ``finetune`` runs, for ``config.mesh``. Nothing is estimated. Of the files that
    ``config`` names, only a head pattern is read: no weights, data or tokenizer.

    - config: the settings of the run.
    - model: the checkpoint's config, before its context is extended. Weights are taken to be bfloat16 if
      ``config.dtype`` is None.
    - device: "h200", "h100-80gb" or "a100-80gb".
    - hosts: how many machines hold the devices of the mesh.
    - memory_fraction: see :class:`jsparse.plan.Plan`.

    Returns the plan, which says whether the run fits.

    Raises ValueError for arguments that are out of range or do not fit one another, NotImplementedError if
    nothing can be compiled, and RuntimeError if the step does not compile.
    """
    chosen = find_device(device)
    check_memory_fraction(memory_fraction)
    model_config = extended_config(config, model)
    config = config.for_model(model)
    mask = config.pattern(model_config).masks(model_config, config.context)
    devices = compile_only_devices(chosen, config.mesh.devices, hosts=hosts)
    mesh = config.mesh.make(devices)
    program = step_program(config, model_config, mask, mesh)
    prepared = _abstract_model(config, model_config)
    flops = step_flops(
        prepared,
        mask,
        context=config.context,
        windows=config.batch_size,
        train_embeddings=config.train_embeddings_and_norms,
        whole=whole_modules(config, prepared),
        remat=config.remat,
    )
    return Plan(
        run="finetune",
        settings=_settings(config) | {"hosts": hosts},
        device=device,
        mesh=dataclasses.asdict(config.mesh),
        memory_bytes=chosen.memory_bytes,
        memory_fraction=memory_fraction,
        programs=(plan_program(program, mesh),),
        flops=flops,
    )


def step_program(config: FinetuneConfig, model_config: LlamaConfig, mask: ModelMask, mesh: Mesh) -> Program:
    """The step of ``finetune`` with abstract arguments, placed on a mesh as ``finetune`` places them."""
    splits = []

    def make():
        params, split = split_model(_model(config, model_config), is_trained(config))
        splits.append(split)
        return new_state(params, config.optimizer()), split.frozen

    state, frozen = (abstract_parameters(tree, mesh) for tree in jax.eval_shape(make))
    windows = config.batch_size // config.micro_batches
    tokens = jax.ShapeDtypeStruct(
        (config.micro_batches, windows, config.context), jnp.int32, sharding=batch_sharding(mesh)
    )
    scored = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_, sharding=tokens.sharding)
    reference = _reference(config, mesh)
    step = make_step(config, splits[0], mask, mesh if config.mesh.devices > 1 else None)
    return Program(
        "train step",
        step,
        (state, frozen, tokens, tokens, scored, *reference),
        {
            "trained parameters": state.params,
            "optimizer state": state.opt_state,
            "frozen base": frozen,
            "batch": (tokens, tokens, scored, *reference, state.step, state.skipped, state.skipped_in_row),
        },
    )


def _reference(config: FinetuneConfig, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """The margins of the pairs that a step takes with its windows, if it learns from pairs."""
    if config.dpo_beta is None:
        return []
    windows = config.batch_size // config.micro_batches
    shape = config.micro_batches, windows, most_pairs(config.context)
    return [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=row_sharding(mesh))]


def _model(config: FinetuneConfig, model_config: LlamaConfig) -> Llama:
    dtype = jnp.dtype(config.dtype or STORED_DTYPE)
    return prepare(config, Llama(model_config, rngs=nnx.Rngs(0), dtype=dtype))


def _abstract_model(config: FinetuneConfig, model_config: LlamaConfig) -> Llama:
    return nnx.eval_shape(lambda: _model(config, model_config))


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """The settings of a run that decide its memory and its FLOPs."""
    names = ("context", "attention", "lora_rank", "lora_targets", "train_embeddings_and_norms", "base_bits")
    settings = {name: getattr(config, name) for name in (*names, "remat", "batch_size", "micro_batches")}
    given = ("lora_rank_pattern", "lora_layers", "modules_to_save")  # with them others are trained
    settings |= {name: getattr(config, name) for name in given if getattr(config, name)}
    if config.groups is not None:
        settings["group_size"] = config.groups
    return settings | {"dtype": config.dtype or STORED_DTYPE}
