"""Run by test_mesh.py in a process of its own, since a process decides once how many devices its CPU is."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jsparse
from jsparse import BlockMask, causal, streaming
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.ring import StreamingKVCache
from jsparse.implementations import hopper


def main(kind: str, mask: str) -> None:
    _make_interpreter_take_many_devices()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType[kind],) * 3)
    if mask == "decode":
        return _decode(mesh)
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(rng.normal(size=(4, 100, 4, 64)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(4, 100, 2, 64)), jnp.float32) for _ in range(2))
    # Each KV head, and each sequence, its own lists: a device must find those of its share.
    masks: dict = {
        "heads": [causal()] * 2 + [streaming(10, 30)] * 2,
        "sequences": BlockMask.from_indices(
            np.arange(16).reshape(4, 2, 2, 1) % 3 % 2, np.ones((4, 2, 2), int),
            q_len=100, kv_len=100, block_q=64, block_kv=64,
        ),
    }  # fmt: skip

    def step(implementation):
        def loss(q, k, v):
            out = jsparse.attention(q, k, v, masks[mask], implementation=implementation)
            return jnp.sum(out * d_out), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

    expected = step("xla")(q, k, v)
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
        q, k, v, d_out = (jax.device_put(x, spread) for x in (q, k, v, d_out))
        ours = step("mosaic_gpu_interpret")(q, k, v)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(spread, 4), x.sharding
        np.testing.assert_allclose(jax.device_get(x), y, atol=1e-5)
    print("agree on", jax.device_count(), "devices")


def _decode(mesh) -> None:
    """From pages, which any sequence may own, and from rings, which are split with the batch."""
    rng = np.random.default_rng(0)
    pool = [jnp.asarray(rng.normal(size=(16, 2, 16, 64)), jnp.float32) for _ in range(2)]
    rings = [jnp.asarray(rng.normal(size=(4, 2, 32, 64)), jnp.float32) for _ in range(2)]
    q = jnp.asarray(rng.normal(size=(4, 4, 64)), jnp.float32)
    table, lengths = jnp.asarray(rng.permutation(16).reshape(4, 4)), jnp.array([64, 33, 5, 0])
    # Each sequence and each KV head its own list.
    pages = jnp.array([[[0, 3], [1, 2]], [[2, -1], [0, 1]], [[0, -1], [-1, -1]], [[-1, -1], [-1, 0]]])
    batch, heads = ("data", "fsdp"), "tensor"
    calls = (
        (PagedKVCache(pool[0], pool[1]), PartitionSpec(None, heads), (table,), {}),
        (PagedKVCache(pool[0], pool[1]), PartitionSpec(None, heads), (table,), {"pages": pages}),
        (StreamingKVCache(*rings, sink=4), PartitionSpec(batch, heads), (), {}),
    )
    for cache, spec, lists, named in calls:
        expected = jsparse.decode_attention(q, cache, lengths, *lists, **named, implementation="xla")
        with jax.set_mesh(mesh):
            spread = NamedSharding(mesh, PartitionSpec(batch, heads, None))
            cache = jax.device_put(cache, NamedSharding(mesh, spec))
            step = jax.jit(jsparse.decode_attention, static_argnames="implementation")
            ours = step(
                jax.device_put(q, spread),
                cache,
                lengths,
                *lists,
                **named,
                implementation="mosaic_gpu_interpret",
            )
        assert ours.sharding.is_equivalent_to(spread, 3), ours.sharding
        np.testing.assert_allclose(jax.device_get(ours), expected, atol=1e-5)
    print("agree on", jax.device_count(), "devices")


def _make_interpreter_take_many_devices() -> None:
    """jax 0.12's interpreter looks for forgotten barriers before the other devices are done with theirs, and
    its race detector reports races between copies of different devices, which share no memory."""
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    shared_memory.GPUSharedMemory.assert_no_barriers_allocated = lambda self: None
    hopper.interpreter = plgpu.InterpretGPUParams


if __name__ == "__main__":
    main(*sys.argv[1:])
