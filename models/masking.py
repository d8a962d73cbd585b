"""The mask of each layer: what the caller asks for, and the layer's own sliding window."""

import dataclasses
from collections.abc import Sequence

import jsparse
from jsparse.block_mask import BlockMask
from jsparse.models.config import LlamaConfig


def layer_masks(config: LlamaConfig, mask) -> list:
    """What ``jsparse.attention`` gets in each layer: ``mask`` (None: causal) within the layer's sliding
    window.

    ``mask`` is None, a TokenMask, one TokenMask for each query head, or a BlockMask. ValueError for another
    number of masks, NotImplementedError where the two together are no mask that we can write down.
    """
    if mask is None:
        mask = jsparse.causal()
    if isinstance(mask, BlockMask):
        if any(window is not None for window in config.sliding_windows):
            raise NotImplementedError(
                "mask is a BlockMask, and the model has sliding windows, which it may not contain; "
                "allowed are TokenMasks, or hidden() with an attend that masks each layer"
            )
        return [mask] * config.num_hidden_layers
    if isinstance(mask, jsparse.TokenMask):
        return [within_window(mask, window) for window in config.sliding_windows]
    if not isinstance(mask, Sequence) or not all(isinstance(one, jsparse.TokenMask) for one in mask):
        raise TypeError(f"mask must be None, a TokenMask, a sequence of them or a BlockMask, not {mask!r}")
    if len(mask) != config.num_attention_heads:
        raise ValueError(
            f"mask has {len(mask)} TokenMasks for num_attention_heads={config.num_attention_heads}; "
            "allowed is one, or one for each query head"
        )
    return [tuple(within_window(one, window) for one in mask) for window in config.sliding_windows]


def within_window(mask: jsparse.TokenMask, window: int | None) -> jsparse.TokenMask:
    """The TokenMask that shows what ``mask`` shows among the last ``window`` keys (None: all).

    >>> within_window(jsparse.shifted_groups(8, 4), 6)
    TokenMask(sink=0, window=6, group_size=8, group_shift=4)
    """
    if window is None:
        return mask
    if mask.window is None or mask.window >= window:
        return dataclasses.replace(
            mask, sink=0, window=window
        )  # every sink inside the window is in it anyway
    if mask.sink == 0:
        return mask
    raise NotImplementedError(
        f"mask {mask} has a sink, which the layer's sliding window hides after {window} tokens; "
        f"allowed are masks without a sink, or with a window >= {window}"
    )
