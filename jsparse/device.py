"""What the program being traced will run on."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_HOPPER = re.compile(r"\b(GH|H)\d+\b")  # H100, H200, H800, H20, GH200


def device_kind() -> str:
    """The kind of device that the program is traced for: "NVIDIA H200", "cpu", ...

    An abstract device in context, for compiling without the device itself, takes precedence.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return default.device_kind


def hopper() -> bool:
    """Whether the device is a Hopper GPU (compute capability 9.0), and this jax can compile our kernels."""
    return jax.__version_info__ >= (0, 11, 2) and _HOPPER.search(device_kind()) is not None


def product_dtype(dtype) -> Any:
    """The dtype in which arrays of a floating dtype are multiplied: float32 on a CPU with no faster one.

    Most CPUs would convert to float32 at each product anyway, and are several times as fast without that.
    """
    dtype = jnp.dtype(dtype)
    if device_kind() != "cpu" or dtype.itemsize > 2 or (dtype == jnp.bfloat16 and _cpu_has_bfloat16_units()):
        return dtype
    return jnp.dtype(jnp.float32)


@functools.cache
def _cpu_has_bfloat16_units() -> bool:
    """Whether the CPU has units for bfloat16 (AMX, Arm's BF16), as far as Linux says.

    AVX-512 BF16 is not enough: on such a CPU, attention with float32 products took 0.7 to 0.8 of the time
    (jax 0.12 and 0.10).
    """
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"amx_bf16", "bf16"}.isdisjoint(words)


def kernel_limit(*, interpret: bool) -> str | None:
    """Why no GPU kernel can run here, compiled or (``interpret``) interpreted on a CPU; None if they can."""
    if interpret:
        if jax.__version_info__ < (0, 12):
            return f"jax {jax.__version__} cannot interpret the GPU kernels; jax >= 0.12 can (Python >= 3.12)"
        if (threads := _cpu_threads()) < 6:
            # Each warpgroup of a kernel blocks one of XLA's threads while it waits for the others.
            return (
                f"interpreting the GPU kernels would hang with XLA's {threads} threads, one per core: set "
                "the environment variable PJRT_NPROC=8 before jax starts"
            )
        return None
    if jax.__version_info__ < (0, 11, 2):
        return f"jax {jax.__version__} cannot compile the GPU kernels; jax >= 0.11.2 can (Python >= 3.12)"
    if not hopper():
        return f"the GPU kernels are for Hopper (H100, H200), and this device is {device_kind()!r}"
    if 12080 <= _cuda_version() < 12091:
        return "CUDA 12.8.0 to 12.9.0 miscompile causal masks (jax refuses them too); 12.9.1 and later do not"
    return None


def _cpu_threads() -> int:
    named = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC")
    return int(named) if named else os.cpu_count() or 1


def _cuda_version() -> int:
    """12091 for 12.9.1; 0 if jax has no CUDA plugin."""
    from jax._src.lib import cuda_versions  # jax offers it nowhere else

    return 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
