"""A training step and the programs of a generation, of an 8-billion-parameter Llama at 32k context."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compile_only import compile_for, mesh_of
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jsparse import PooledBlocks, attention, causal, streaming
from jsparse.models import LlamaConfig
from jsparse.models.rope import RopeConfig
from jsparse.models.sharding import MeshConfig
from jsparse.plan.compile_only import DEVICES, bytes_a_device, kernel_calls, memory_of
from jsparse.plan.program import Program
from jsparse.serve import CacheConfig
from jsparse.serve.layout import plan_cache
from jsparse.serve.plan import generation_programs
from jsparse.train import FinetuneConfig
from jsparse.train.plan import step_program

CONTEXT = 32768
PREFILL_LAYERS = 2  # all layers of the programs of prompts are alike
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

COLUMNS = {
    "program": 18,
    "devices": 26,
    "batch": 7,
    "arguments GB": 14,
    "temporary GB": 14,
    "peak GB": 9,
    "of GB": 9,
    "kernels": 9,
    "calls": 7,
    "s": 6,
}


class Case(NamedTuple):
    """A program to compile for a mesh of a device: how many calls of Mosaic kernels it must hold, and how
    many bytes of its arguments it does not read.
    """

    program: str
    devices: str
    batch: str
    make: Callable[[Mesh, int], Program]
    mesh: dict[str, int]
    kernel_calls: int
    device: str = "h200"
    unread: int = 0


def train_program(mesh: Mesh, batch: int, layers: int, remat: str = "layers") -> Program:
    """LongLoRA's step: LoRA, embeddings and norms are trained, heads see shifted groups."""
    config = FinetuneConfig(
        model="-",
        data="-",
        output="-",
        context=CONTEXT,
        attention="shifted",
        batch_size=batch,
        mesh=MeshConfig(**mesh.shape),
        remat=remat,
    )
    model = _with_layers(layers)
    masks = config.pattern(model).masks(model, CONTEXT)
    return step_program(config, model, masks, mesh)


def decode_program(mesh: Mesh, batch: int, layers: int, **cache: Any) -> Program:
    """The loop of decode steps: half of the KV heads stream, the others read 4096 tokens of chosen pages."""
    *_, decode = _generation(mesh, _with_layers(layers), batch, **cache)
    return decode


def prefill_program(mesh: Mesh, batch: int, **cache: Any) -> Program:
    """A chunk of prompts, half of whose KV heads stream over longer windows."""
    chunk, *_ = _generation(mesh, _with_layers(PREFILL_LAYERS), batch, prefill_window=8192, **cache)
    return chunk


def _with_layers(layers: int) -> LlamaConfig:
    return dataclasses.replace(LLAMA_3_1_8B, num_hidden_layers=layers, sliding_windows=(None,) * layers)


def _generation(mesh: Mesh, model: LlamaConfig, batch: int, **cache: Any) -> list[Program]:
    """The programs for a cache of 32k tokens per row."""
    streams = np.zeros((model.num_hidden_layers, model.num_key_value_heads), bool)
    streams[:, ::2] = True
    config = CacheConfig(capacity=CONTEXT, batch=batch, streaming_heads=streams, **cache)
    layout = plan_cache(config, model, [CONTEXT - 1024] * batch, [1024] * batch)
    return generation_programs(mesh, model, layout, jnp.bfloat16)


def odd_program(mesh: Mesh, batch: int) -> Program:
    """Attention and its gradient where TMA can copy neither the length nor the head_dim as they are."""
    whole = NamedSharding(mesh, PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    q = shape((batch, 4001, 8, 72), jnp.bfloat16)
    k = shape((batch, 4100, 2, 72), jnp.bfloat16)
    ids = shape((batch, 4001), jnp.int32), shape((batch, 4100), jnp.int32)
    masks = [streaming(100, 300)] * 4 + [causal()] * 4

    def loss(q, k, v, q_ids, kv_ids):
        out = attention(q, k, v, masks, q_segment_ids=q_ids, kv_segment_ids=kv_ids)
        return jnp.sum(out, dtype=jnp.float32)

    arguments = (q, k, k, *ids)
    return Program("odd sizes", jax.jit(jax.grad(loss, (0, 1, 2))), arguments, {"all": arguments})


def cases(short: bool) -> list[Case]:
    """The programs of all 32 layers, or with ``short`` of two. Those of prompts always have two."""
    layers = 2 if short else LLAMA_3_1_8B.num_hidden_layers
    train = 4 * layers  # forward, the same again to rematerialize, and the two kernels backward
    decode = 2 * layers  # over pages, and over the sink and ring of the streaming heads
    prefill = 2 * PREFILL_LAYERS  # the same
    lm_head = 2 * LLAMA_3_1_8B.hidden_size * LLAMA_3_1_8B.vocab_size  # prompts need no logits

    def step(**options):
        return functools.partial(train_program, layers=layers, **options)

    def tokens(**cache):
        return functools.partial(decode_program, layers=layers, **cache)

    return [
        Case("odd sizes", "1", "2", odd_program, {}, 3),  # short: what is wrong here shows first
        Case("train step", "1", "1", step(), {}, train),
        Case("train step", "8: fsdp 8", "8", step(), {"fsdp": 8}, train),
        Case("train step, kept", "1", "1", step(remat="attention"), {}, train - layers),
        Case("decode loop", "1", "16", tokens(), {}, decode),
        Case("decode loop, int4", "1", "16", tokens(kv_bits=4), {}, decode),
        Case("prefill", "1", "4", prefill_program, {}, prefill, unread=lm_head),
        Case(
            "prefill, pooled",
            "1",
            "4",
            functools.partial(prefill_program, prefill_estimate=PooledBlocks(4096)),
            {},
            prefill,
            unread=lm_head,
        ),
        # No Hopper: the portable implementation.
        Case("prefill", "1 A100", "4", prefill_program, {}, 0, "a100-80gb", lm_head),
        Case("decode loop", "8: data 2, tensor 4", "64", tokens(), {"data": 2, "tensor": 4}, decode),
    ]


def check(case: Case) -> tuple[list, list[str]]:
    """A row of the table, and what is wrong."""
    name = f"{case.program}, {case.devices}"
    mesh = mesh_of(case.device, **case.mesh)
    limit = DEVICES[case.device].memory_bytes
    program = case.make(mesh, int(case.batch))
    compiled = compile_for(mesh, program.call, *program.shapes, **program.static)
    memory, calls = memory_of(compiled.program), kernel_calls(compiled.program)
    wrong = [f"{name}: {warning}" for warning in compiled.warnings]
    wrong += [f"{name}: {report}" for report in compiled.reports if report.stack or report.spills]
    if memory.peak > limit:
        wrong.append(
            f"{name}: {memory.peak / 1e9:.1f} GB a device do not fit into one of {limit / 1e9:.1f} GB"
        )
    if calls != case.kernel_calls:
        wrong.append(f"{name}: {calls} calls of Mosaic kernels, expected {case.kernel_calls}")
    # What a plan calls by name is all there is, except that the compiler rounds up and leaves out what
    # is not read.
    counted, arrays = bytes_a_device(program.parts), len(jax.tree.leaves(program.parts))
    if not 0 <= memory.arguments - (counted - case.unread) <= 256 * arrays:
        wrong.append(
            f"{name}: the arguments are {counted} bytes by their shapes, {memory.arguments} compiled"
        )
    sizes = [f"{size / 1e9:.1f}" for size in (memory.arguments, memory.temporary, memory.peak, limit)]
    return [*case[:3], *sizes, len(compiled.kernels), calls, f"{compiled.seconds:.0f}"], wrong
