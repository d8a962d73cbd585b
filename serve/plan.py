"""Whether a generation fits: its real programs, compiled for GPUs that this machine does not have."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsparse.integers import require_integer
from jsparse.mesh import BATCH_AXES
from jsparse.models import Llama, LlamaConfig
from jsparse.models.sharding import MeshConfig, abstract_parameters
from jsparse.plan.compile_only import compile_only_devices, find_device
from jsparse.plan.program import DEFAULT_MEMORY_FRACTION, Plan, Program, check_memory_fraction, plan_program
from jsparse.serve import loop
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import CacheLayout, plan_cache
from jsparse.serve.sampling import RowParams
from jsparse.serve.state import (
    DecodeState,
    ModelShape,
    ModelStructure,
    new_prefill_state,
    new_state,
    pool_of,
    with_pool,
)


def plan_generate(
    model: LlamaConfig,
    cache: CacheConfig,
    *,
    device: str,
    prompt_tokens: int,
    max_new_tokens: int = 64,
    batch: int = 1,
    dtype: str = "bfloat16",
    mesh: MeshConfig = MeshConfig(),  # noqa: B008, it is frozen
    memory_fraction: float | int = DEFAULT_MEMORY_FRACTION,
) -> Plan:
    """What ``generate`` takes on each device for ``batch`` prompts of ``prompt_tokens`` tokens at once.

    Nothing is estimated: this compiles the programs that ``generate`` would run, with the cache layout that
    it would choose. They are a chunk of the prompts (while the running rows wait on the device), the choice
    of the first token, and the loop of decode steps.

    - model: the shape of the model. No weights are read.
    - cache: what each head reads.
    - device: "h200", "h100-80gb" or "a100-80gb".
    - prompt_tokens, max_new_tokens: tokens per prompt, and new ones after it.
    - batch: prompts at once.
    - dtype: of the weights, "bfloat16", "float16" or "float32".
    - mesh: how many devices split each part of the work. ``generate`` itself uses one device; its programs
      run where their arguments are.
    - memory_fraction: see :class:`jsparse.plan.Plan`.

    Returns the bytes of each program per device, and whether they fit.

    Raises ValueError for arguments that are out of range or do not fit one another, NotImplementedError if
    nothing can be compiled here, and RuntimeError if a program does not compile.
    """
    chosen = find_device(device)
    check_memory_fraction(memory_fraction)
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("max_new_tokens", max_new_tokens),
        ("batch", batch),
    ):
        require_integer(name, value)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype!r}")
    layout = plan_cache(cache, model, [prompt_tokens] * batch, [max_new_tokens] * batch)
    _check_split(mesh, model, layout)
    devices = mesh.make(compile_only_devices(chosen, mesh.devices))
    programs = generation_programs(devices, model, layout, jnp.dtype(dtype))
    settings = {
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "batch": layout.batch,
        "capacity": layout.capacity,
        "policy": cache.policy,
        "kv_bits": cache.kv_bits,
        "dtype": dtype,
    }
    return Plan(
        run="generate",
        settings=settings,
        device=device,
        mesh=dataclasses.asdict(mesh),
        memory_bytes=chosen.memory_bytes,
        memory_fraction=memory_fraction,
        programs=tuple(plan_program(program, devices) for program in programs),
    )


def generation_programs(mesh: Mesh, model: LlamaConfig, layout: CacheLayout, dtype: Any) -> list[Program]:
    """The programs of :mod:`jsparse.serve.loop` with abstract arguments on a mesh that MeshConfig made.

    ``jsparse.models.sharding`` says how parameters are split. "data" and "fsdp" split the rows, "tensor" the
    KV heads of pages and rings. A page may belong to any sequence.
    """
    structure, params = _abstract_model(mesh, model, dtype)
    shape = structure.shape
    running = _placed(jax.eval_shape(lambda: new_state(layout, shape)), mesh)
    joining = _placed(jax.eval_shape(lambda: new_prefill_state(layout, shape, layout.batch)), mesh)
    pool = pool_of(running)
    joining = with_pool(joining, pool)
    sampling = RowParams.of([], [], [], batch=layout.batch, vocab_size=model.vocab_size)
    rows = functools.partial(_put, mesh=mesh, axes=(BATCH_AXES,))
    sampling, hidden = rows(sampling), rows(jax.ShapeDtypeStruct((layout.batch, model.hidden_size), dtype))
    tokens = rows(jax.ShapeDtypeStruct((layout.batch, layout.prefill_chunk), jnp.int32))
    counts = rows(jax.ShapeDtypeStruct((layout.batch,), jnp.int32))
    steps = _put(jax.ShapeDtypeStruct((), jnp.int32), mesh=mesh, axes=())
    waiting = with_pool(running, (None,) * len(running.layers)), sampling

    def parts(state, others):
        return {"parameters": params, "cache": state.layers, "rows": (_without_layers(state), others)}

    return [
        Program(
            "prompt chunk",
            loop.prefill_chunk,
            (structure, params, joining, hidden, tokens, counts),
            parts(joining, (hidden, tokens, counts)),
            {"estimates": layout.estimates},
            beside=waiting,
        ),
        Program(
            "first token",
            loop.first_token,
            (structure, params, joining, hidden, sampling),
            parts(joining, (hidden, sampling)),
            beside=waiting[0],
        ),
        Program(
            "decode loop",
            loop.decode_steps,
            (structure, params, running, sampling, steps),
            parts(running, (sampling, steps)),
            {"selections": layout.selections},
        ),
    ]


def _check_split(mesh: MeshConfig, model: LlamaConfig, layout: CacheLayout) -> None:
    if mesh.sequence > 1:
        raise ValueError(f"mesh: sequence must be 1 for generation, not {mesh.sequence}")
    if layout.batch % mesh.batch:
        raise ValueError(f"mesh: data * fsdp = {mesh.batch} does not divide the cache's {layout.batch} rows")
    for number, layer in enumerate(layout.layers):
        streaming = len(layer.streaming_heads)
        for what, heads in (("streaming", streaming), ("other", model.num_key_value_heads - streaming)):
            if heads % mesh.tensor:
                raise ValueError(
                    f"mesh: tensor={mesh.tensor} does not divide the {heads} {what} KV heads of layer "
                    f"{number}"
                )


def _abstract_model(mesh: Mesh, model: LlamaConfig, dtype: Any) -> tuple[ModelStructure, list]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(model, rngs=nnx.Rngs(0), dtype=dtype)))
    params, treedef = jax.tree.flatten(abstract_parameters(state, mesh))
    return ModelStructure(graphdef, treedef, ModelShape.from_config(model, dtype)), params


def _placed(state: DecodeState, mesh: Mesh) -> DecodeState:
    layers = tuple(
        dataclasses.replace(
            layer,
            paged=_put(layer.paged, mesh=mesh, axes=(None, "tensor")),
            streaming=_put(layer.streaming, mesh=mesh, axes=(BATCH_AXES, "tensor")),
            selected=_put(layer.selected, mesh=mesh, axes=(BATCH_AXES, "tensor")),
        )
        for layer in state.layers
    )
    return dataclasses.replace(_put(state, mesh=mesh, axes=(BATCH_AXES,)), layers=layers)


def _without_layers(state: DecodeState) -> DecodeState:
    return dataclasses.replace(state, layers=())


def _put(tree: Any, *, mesh: Mesh, axes: tuple) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
