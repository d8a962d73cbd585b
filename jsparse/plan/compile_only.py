"""Compiling for GPUs that this machine does not have, and what the compiler reports on memory.

A *compile-only* device is a description of a GPU that XLA's compiler accepts in place of one. Programs are
compiled for it down to machine code, with every buffer laid out, on a machine without a GPU. They cannot be
run.
"""

import dataclasses
import functools
import importlib.util
import math
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jsparse.extras import MissingExtra
from jsparse.integers import require_integer

_OLDEST_JAX = (0, 11, 2)


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as the compiler sees it.

    - name: what users call it.
    - kind: its name in JAX.
    - memory_bytes: the part of its memory that CUDA offers.

    Source of these and all other fields: NVIDIA's data sheets and the table of compute capabilities in the
    CUDA programming guide. XLA's own descriptions of these devices (xla/backends/gpu/target_config/specs)
    agree.
    """

    name: str
    kind: str
    memory_bytes: int
    memory_bandwidth: int  # bytes per second
    compute_capability: str  # as in a GpuTargetConfigProto
    multiprocessors: int
    fpus: int  # float32 units per multiprocessor
    clock_ghz: float
    l2_bytes: int
    shared_memory: int  # bytes per multiprocessor
    block_shared_memory: int  # bytes that one thread block may ask for

    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block_optin: {self.block_shared_memory}
  core_count: {self.multiprocessors}  fpus_per_core: {self.fpus}  clock_rate_ghz: {self.clock_ghz}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}  l2_cache_size: {self.l2_bytes}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ {self.compute_capability} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.kind}"
"""


# feature_extension 2 is the "a" of sm_90a. Without it the compiler cannot select wgmma, and aborts.
_HOPPER = {
    "compute_capability": "major: 9 minor: 0 feature_extension: 2",
    "multiprocessors": 132,
    "fpus": 128,
    "clock_ghz": 1.98,
    "l2_bytes": 50 << 20,
    "shared_memory": 228 << 10,
    "block_shared_memory": 227 << 10,
}
# CUDA offers a little less than the boards' round sizes. 80 GB cards: device_memory_size in XLA's
# descriptions, 79.11 and 79.25 GiB (nvidia-smi, which counts what the driver keeps too: 81559 and 81920 MiB).
# The H200: 139.7 GiB, the least of what PyTorch reports as its capacity (nvidia-smi: 143771 MiB).
_DEVICES = (
    Device("h200", "NVIDIA H200", int(139.7 * 2**30), 4_800_000_000_000, **_HOPPER),
    Device("h100-80gb", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, **_HOPPER),
    Device(
        "a100-80gb",
        "NVIDIA A100-SXM4-80GB",
        85_100_068_864,
        2_039_040_000_000,
        compute_capability="major: 8 minor: 0",
        multiprocessors=108,
        fpus=64,
        clock_ghz=1.41,
        l2_bytes=40 << 20,
        shared_memory=164 << 10,
        block_shared_memory=163 << 10,
    ),
)
DEVICES = {device.name: device for device in _DEVICES}


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device holds while a compiled program runs, in bytes.

    - arguments: inputs.
    - results: outputs, except those that are written over donated arguments.
    - temporary: the most that is alive at once in between.
    """

    arguments: int
    results: int
    temporary: int

    @property
    def peak(self) -> int:
        return self.arguments + self.results + self.temporary


def prepare_process() -> None:
    """Settings for a process that only compiles; call it before JAX is used for anything.

    Without them, the CUDA plugin would look for a GPU and for libraries that are needed only to run programs,
    and a program in the compilation cache would not be compiled.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def require_compiler() -> None:
    """Raise an error that says what to install, unless programs can be compiled for GPUs.

    Raises NotImplementedError for a jax that is too old, and MissingExtra without a compiler for CUDA GPUs.
    """
    if jax.__version_info__ < _OLDEST_JAX:
        oldest = ".".join(map(str, _OLDEST_JAX))
        raise NotImplementedError(
            f"jax {jax.__version__} cannot compile for a GPU that this machine does not have; "
            f"jax >= {oldest} can (Python >= 3.12)"
        )
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise MissingExtra(
            "no compiler for CUDA GPUs is installed, and nothing is estimated without one: "
            "in a clone of jsparse, pip install -e '.[gpu-compile]'"
        )


def find_device(name: str) -> Device:
    """The device with this name; ValueError if there is none.

    >>> find_device("h100-80gb").kind
    'NVIDIA H100 80GB HBM3'
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    return DEVICES[name]


@functools.cache  # what is compiled for one topology shares its client
def compile_only_devices(device: Device, count: int, *, hosts: int = 1) -> tuple[Any, ...]:
    """Devices that can be compiled for. ``jax.set_mesh`` of a mesh of them is all that a program needs.

    - device: what each of them is.
    - count: how many there are.
    - hosts: how many machines they are in: the same number in each, in order.

    Raises ValueError for numbers that do not fit, and the errors of :func:`require_compiler`.
    """
    require_integer("count", count)
    require_integer("hosts", hosts)
    if count % hosts:
        raise ValueError(f"hosts={hosts} must divide the {count} devices")
    require_compiler()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=device.target_config(),
        topology=f"1x{hosts}x{count // hosts}",
    )
    return tuple(topology.devices)


def lower_for(mesh: Mesh, fn: Any, *shapes: Any, **static: Any) -> jax.stages.Lowered:
    """A jitted ``fn``, traced and lowered for the mesh's devices; the shapes carry shardings on that mesh."""
    with jax.set_mesh(mesh):
        return fn.trace(*shapes, **static).lower(lowering_platforms=("cuda",))


def compile_for(mesh: Mesh, fn: Any, *shapes: Any, **static: Any) -> tuple[jax.stages.Compiled, float]:
    """``fn`` compiled for the mesh's devices, down to machine code, and how many seconds that took.

    Raises RuntimeError with the compiler's message if it refuses.
    """
    began = time.perf_counter()
    try:
        compiled = lower_for(mesh, fn, *shapes, **static).compile()
    except jax.errors.JaxRuntimeError as error:
        kind = mesh.devices.flat[0].device_kind
        raise RuntimeError(f"the program does not compile for {mesh.size} x {kind}: {error}") from error
    return compiled, time.perf_counter() - began


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the compiler says that the program's buffers cannot be placed."""
    return "RESOURCE_EXHAUSTED" in str(error)


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says about a device's memory."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise RuntimeError("the compiler reports nothing on memory")
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
    )


def kernel_calls(compiled: jax.stages.Compiled) -> int:
    """How many calls of Mosaic kernels a compiled program holds."""
    return (compiled.as_text() or "").count('custom_call_target="mosaic_gpu')


def bytes_a_device(tree: Any) -> int:
    """The bytes of one device's part of all arrays, or shapes with a sharding, in a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
