"""A training step and a decode loop of an 8-billion-parameter Llama at 32k context: bytes a device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compile_only import MEMORY_BYTES, compile_for, h200_mesh
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsparse import PooledBlocks, attention, causal, streaming
from jsparse.models import Llama, LlamaConfig, add_lora
from jsparse.models.rope import RopeConfig
from jsparse.serve import CacheConfig, SamplingParams, loop
from jsparse.serve.config import plan_cache
from jsparse.serve.sampling import RowParams
from jsparse.train import FinetuneConfig
from jsparse.train.longlora import is_trained_with_lora, shifted_head_masks
from jsparse.train.step import TrainState, split_model, train_step

CONTEXT = 32768
LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(
        kind="llama3",
        theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)

# Where the named axes of a matrix lie in the mesh, whose axes split only the first that asks for them.
# Vectors are whole on every device.
RULES = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # Rows of the embedding first: split along embed it would hand that split on to all activations.
    "vocab": ("tensor", "fsdp"),
}
BATCH = ("data", "fsdp")


COLUMNS = {
    "program": 18,
    "devices": 22,
    "batch": 7,
    "arguments GB": 14,
    "temporary GB": 14,
    "peak GB": 9,
    "H200 GB": 9,
    "kernels": 9,
    "calls": 7,
    "s": 6,
}


class Case(NamedTuple):
    """A program to compile for a mesh: how many calls of Mosaic kernels it must hold."""

    program: str
    devices: str
    batch: str
    make: Callable
    mesh: dict[str, int]
    kernel_calls: int


class Program(NamedTuple):
    """A jitted function and abstract arguments for it."""

    call: Callable
    shapes: tuple
    static: dict


def train_program(mesh: Mesh, batch: int) -> Program:
    """LongLoRA's step: LoRA, embeddings and norms are trained, heads see shifted groups, layers are
    rematerialized."""
    optimizer = FinetuneConfig(model="-", data="-", output="-", context=CONTEXT).optimizer()
    splits = []

    def make():
        model = Llama(LLAMA_3_1_8B, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        add_lora(model, rank=8, alpha=16, rngs=nnx.Rngs(0))
        params, split = split_model(model, is_trained_with_lora)
        splits.append(split)
        return params, split.frozen

    params, frozen = jax.eval_shape(make)
    state = TrainState(
        _sharded(params, mesh),
        _sharded(jax.eval_shape(optimizer.init, params), mesh),
        _shape(mesh, (), jnp.int32),
    )
    tokens = _shape(mesh, (batch, CONTEXT), jnp.int32, BATCH)
    masks = shifted_head_masks(LLAMA_3_1_8B.num_attention_heads, CONTEXT // 4)
    step = train_step(splits[0], optimizer, masks, remat=True)
    return Program(step, (state, _sharded(frozen, mesh), tokens, tokens), {})


def decode_program(mesh: Mesh, batch: int, **cache: Any) -> Program:
    """The loop of decode steps: half of the KV heads stream, the others read 4096 tokens of chosen pages."""
    layout, state, structure, params = _serving(mesh, LLAMA_3_1_8B, batch, **cache)
    rows = RowParams.of(
        [SamplingParams()] * batch,
        [0] * batch,
        [1024] * batch,
        batch=batch,
        vocab_size=LLAMA_3_1_8B.vocab_size,
    )
    rows = _place(rows, BATCH, mesh=mesh)
    arguments = (structure, params, state, rows, _shape(mesh, (), jnp.int32))
    return Program(loop.decode_steps, arguments, {"reading": layout.reading})


def prefill_program(mesh: Mesh, batch: int, **cache: Any) -> Program:
    """A chunk of prompts through two of the layers, half of whose KV heads stream over longer windows."""
    model = dataclasses.replace(LLAMA_3_1_8B, num_hidden_layers=2, sliding_windows=(None, None))
    layout, state, structure, params = _serving(mesh, model, batch, prefill_window=8192, **cache)
    rings = jax.eval_shape(lambda: loop.new_prefill_state(layout, _model_shape(model), batch))
    state = loop.with_pool(_place(rings, BATCH, mesh=mesh), loop.pool_of(state))
    hidden = _shape(mesh, (batch, model.hidden_size), jnp.bfloat16, BATCH)
    tokens = _shape(mesh, (batch, layout.prefill_chunk), jnp.int32, BATCH)
    counts = _shape(mesh, (batch,), jnp.int32, BATCH)
    arguments = (structure, params, state, hidden, tokens, counts)
    return Program(loop.prefill_chunk, arguments, {"reading": layout.reading})


def _serving(mesh: Mesh, model: LlamaConfig, batch: int, **cache: Any):
    """(layout, state, structure, params) of a cache for 32k tokens a row."""
    streaming = np.zeros((model.num_hidden_layers, model.num_key_value_heads), bool)
    streaming[:, ::2] = True
    config = CacheConfig(capacity=CONTEXT, batch=batch, streaming_heads=streaming, **cache)
    layout = plan_cache(config, model, [CONTEXT - 1024] * batch, [1024] * batch)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(model, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    params, treedef = jax.tree.flatten(_sharded(state, mesh))
    cached = jax.eval_shape(lambda: loop.new_state(layout, _model_shape(model)))
    place = functools.partial(_place, mesh=mesh)
    layers = tuple(
        dataclasses.replace(
            layer,
            paged=place(layer.paged, None, "tensor"),  # a page may belong to any sequence
            streaming=place(layer.streaming, BATCH, "tensor"),
            selected=place(layer.selected, BATCH, "tensor"),
        )
        for layer in cached.layers
    )
    cached = dataclasses.replace(place(cached, BATCH), layers=layers)
    return layout, cached, loop.ModelStructure(graphdef, treedef), params


def _model_shape(model: LlamaConfig) -> loop.ModelShape:
    return loop.ModelShape.of(model, jnp.bfloat16)


def odd_program(mesh: Mesh, batch: int) -> Program:
    """Attention and its gradient where TMA can copy neither the length nor the head_dim as they are."""
    q = _shape(mesh, (batch, 4001, 8, 72), jnp.bfloat16)
    k = _shape(mesh, (batch, 4100, 2, 72), jnp.bfloat16)
    ids = _shape(mesh, (batch, 4001), jnp.int32), _shape(mesh, (batch, 4100), jnp.int32)
    masks = [streaming(100, 300)] * 4 + [causal()] * 4

    def loss(q, k, v, q_ids, kv_ids):
        out = attention(q, k, v, masks, q_segment_ids=q_ids, kv_segment_ids=kv_ids)
        return jnp.sum(out, dtype=jnp.float32)

    return Program(jax.jit(jax.grad(loss, (0, 1, 2))), (q, k, k, *ids), {})


_LAYERS = LLAMA_3_1_8B.num_hidden_layers
_TRAIN_CALLS = 4 * _LAYERS  # forward, the same again to rematerialize, and the two kernels backward
_DECODE_CALLS = 2 * _LAYERS  # over pages, and over the sink and ring of the streaming heads
_PREFILL_CALLS = 2 * 2  # the same in two layers
_quantised = functools.partial(decode_program, kv_bits=4)
_estimated = functools.partial(prefill_program, prefill_estimate=PooledBlocks(4096))
PROGRAMS = [
    Case("odd sizes", "1", "2", odd_program, {}, 3),  # short: what is wrong here shows first
    Case("train step", "1", "1", train_program, {}, _TRAIN_CALLS),
    Case("train step", "8: fsdp 8", "8", train_program, {"fsdp": 8}, _TRAIN_CALLS),
    Case("decode loop", "1", "16", decode_program, {}, _DECODE_CALLS),
    Case("decode loop, int4", "1", "16", _quantised, {}, _DECODE_CALLS),
    Case("prefill", "1", "4", prefill_program, {}, _PREFILL_CALLS),
    Case("prefill, pooled", "1", "4", _estimated, {}, _PREFILL_CALLS),
    Case("decode loop", "8: data 2, tensor 4", "64", decode_program, {"data": 2, "tensor": 4}, _DECODE_CALLS),
]


def check(case: Case) -> tuple[list, list[str]]:
    """A row of the table, and what is wrong."""
    name = f"{case.program}, {case.devices}"
    mesh = h200_mesh(**case.mesh)
    program = case.make(mesh, int(case.batch))
    compiled = compile_for(mesh, program.call, *program.shapes, **program.static)
    memory = compiled.program.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # Results that are written over donated arguments count once.
    peak = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporary
    calls = compiled.program.as_text().count('custom_call_target="mosaic_gpu')
    wrong = [f"{name}: {warning}" for warning in compiled.warnings]
    wrong += [f"{name}: {report}" for report in compiled.reports if report.stack or report.spills]
    if peak > MEMORY_BYTES:
        wrong.append(f"{name}: {peak / 1e9:.1f} GB a device do not fit into an H200")
    if calls != case.kernel_calls:
        wrong.append(f"{name}: {calls} calls of Mosaic kernels, expected {case.kernel_calls}")
    sizes = [f"{size / 1e9:.1f}" for size in (arguments, temporary, peak)]
    sizes.append(f"{MEMORY_BYTES / 1e9:.0f}")
    return [*case[:3], *sizes, len(compiled.kernels), calls, f"{compiled.seconds:.0f}"], wrong


def _sharded(tree: Any, mesh: Mesh) -> Any:
    """Abstract parameters with the shardings that their logical axes have by RULES."""

    def place(x, spec):
        free = set(mesh.axis_names)
        axes = []
        for name in spec if x.ndim > 1 else ():
            axes.append(tuple(axis for axis in RULES.get(name, ()) if axis in free))
            free -= set(axes[-1])
        return _shape(mesh, x.shape, x.dtype, *(axis or None for axis in axes))

    return jax.tree.map(place, tree, nnx.get_partition_spec(tree))


def _place(tree: Any, *axes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: _shape(mesh, x.shape, x.dtype, *axes), tree)


def _shape(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
