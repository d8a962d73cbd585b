"""What was measured on a device, as data (measured.json), for the choices that arithmetic does not settle.

- ``tiles``: ``{"kernel": "forward", "device": "NVIDIA H200", "shape": {"head_dim": 128, "block_q": 128,
  "block_kv": 128}, "tiles": {"stages": 3}, "jax": ..., "date": ..., "command": ...}``: fields of the kernel's
  tiles that replace what its chooser computes from that shape.
- ``cudnn_faster``: ``{"device": ..., "head_dim": 128, "min_tokens": 4096, "jax": ..., "date": ..., "command":
  ...}``: from this many tokens on, cuDNN's dense causal attention is faster than ours.

A device without rows was not measured and gets the computed choices.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any


def tiles(kernel: str, device: str, choose: Callable[..., Any], **shape: int) -> Any:
    """``choose(**shape)``, the kernel's own choice, with faster measured fields in their place.

    >>> from jsparse.pallas_kernels.hopper.forward import forward_tiles
    >>> tiles("forward", "cpu", forward_tiles, head_dim=128, block_q=128, block_kv=128)
    ForwardTiles(warpgroups=2, tile_kv=128, stages=2)
    """
    rows = _table()["tiles"]
    faster = [x["tiles"] for x in rows if (x["kernel"], x["device"], x["shape"]) == (kernel, device, shape)]
    return dataclasses.replace(choose(**shape), **(faster[0] if faster else {}))


def cudnn_is_faster(device: str, head_dim: int, tokens: int) -> bool:
    """Whether cuDNN's dense causal attention was measured to be faster than ours."""
    return any(
        (row["device"], row["head_dim"]) == (device, head_dim) and tokens >= row["min_tokens"]
        for row in _table()["cudnn_faster"]
    )


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return json.loads((resources.files("jsparse.pallas_kernels") / "measured.json").read_text())
