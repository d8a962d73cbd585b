"""How many devices split each part of the work; ``sharding.py`` says where parameters lie on such a mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsparse.integers import require_integer

if TYPE_CHECKING:
    from jax.sharding import Mesh
else:
    Mesh = Any


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices split each part of the work. Their product must be all devices of all processes."""

    data: int = 1
    """Devices that split the batch, each holding the whole model."""
    fsdp: int = 1
    """Devices that split the batch and every matrix."""
    tensor: int = 1
    """Devices that split heads, the inside of the MLP and the vocabulary."""
    sequence: int = 1
    """Devices that split the tokens of each sequence, and every matrix."""

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            require_integer(f"mesh: {name}", size)

    def __str__(self):
        return ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size > 1)

    @property
    def devices(self) -> int:
        return math.prod(dataclasses.astuple(self))

    @property
    def batch(self) -> int:
        """How many devices split the batch."""
        return self.data * self.fsdp

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of these devices, by default of all. Raises ValueError unless their number fits."""
        import jax  # late: the command line lists its options without it

        from jsparse.mesh import BATCH_AXES, HEAD_AXES, SEQUENCE_AXIS

        axes = (*BATCH_AXES, *HEAD_AXES, SEQUENCE_AXIS)
        devices = jax.devices() if devices is None else devices
        if self.devices != len(devices):
            raise ValueError(
                f"mesh is for {self.devices} devices ({self}), but there are {len(devices)}: the product of "
                f"{', '.join(axes)} must be that"
            )
        return jax.make_mesh(
            dataclasses.astuple(self), axes, axis_types=(jax.sharding.AxisType.Auto,) * 4, devices=devices
        )
