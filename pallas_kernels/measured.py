"""What was measured on a device, as data (measured.json), for the choices that arithmetic does not settle.

- ``tiles``: ``{"kernel": "forward", "device": "NVIDIA H200", "head_dim": 128, "tiles": {"stages": 3}, "jax":
  ..., "date": ..., "command": ...}``: fields of the kernel's tiles that replace the computed ones.
- ``cudnn_faster``: ``{"device": ..., "head_dim": 128, "min_tokens": 4096, "jax": ..., "date": ..., "command":
  ...}``: from so many tokens on cuDNN's dense causal attention takes less time than ours.

A device that has no rows was not measured, and gets the computed choices.
"""

import functools
import json
from importlib import resources
from typing import Any


def tiles(kernel: str, device: str, head_dim: int) -> dict[str, int]:
    """The fields that ran fastest, or {} where nothing was measured.

    >>> tiles("forward", "cpu", 128)
    {}
    """
    for row in _table()["tiles"]:
        if (row["kernel"], row["device"], row["head_dim"]) == (kernel, device, head_dim):
            return row["tiles"]
    return {}


def cudnn_is_faster(device: str, head_dim: int, tokens: int) -> bool:
    """Whether cuDNN's dense causal attention was measured to be faster than ours."""
    return any(
        (row["device"], row["head_dim"]) == (device, head_dim) and tokens >= row["min_tokens"]
        for row in _table()["cudnn_faster"]
    )


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return json.loads((resources.files(__package__) / "measured.json").read_text())
