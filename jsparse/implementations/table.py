"""The table of implementations of attention, in order of preference. A new device is one file and one row."""

import functools

from jsparse.implementations import cudnn, hopper, reference
from jsparse.implementations.interface import Implementation, never
from jsparse.implementations.xla import on_mesh
from jsparse.masks.block_mask import default_block_sizes


def _hopper(name: str, *, interpret: bool, **options) -> Implementation:
    forward = functools.partial(hopper.forward, interpret=interpret)
    backward = functools.partial(hopper.backward, interpret=interpret)
    limit = functools.partial(hopper.limit, interpret=interpret)
    return Implementation(name, forward, backward, hopper.block_sizes, limit, **options)


IMPLEMENTATIONS = (
    Implementation("cudnn", cudnn.forward, limit=cudnn.limit, by_default=cudnn.is_faster),
    _hopper("mosaic_gpu", interpret=False),
    Implementation("xla", on_mesh.forward, on_mesh.backward, default_block_sizes),
    Implementation("reference", reference.forward, by_default=never),
    _hopper("mosaic_gpu_interpret", interpret=True, by_default=never),
)
