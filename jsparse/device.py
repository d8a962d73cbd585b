"""What the program being traced will run on."""

import re

import jax

_HOPPER = re.compile(r"\b(GH|H)\d+\b")  # H100, H200, H800, H20, GH200


def device_kind() -> str:
    """The kind of device that is traced for: "NVIDIA H200", "cpu", ...

    An abstract device, under which programs are compiled for machines that are not there, comes first.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return default.device_kind


def hopper() -> bool:
    """Whether that is a Hopper GPU (compute capability 9.0), and this jax can compile our kernels for it."""
    return jax.__version_info__ >= (0, 11, 2) and _HOPPER.search(device_kind()) is not None
