"""The mask of each layer: what the caller asks for, and the layer's own sliding window."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeGuard

import jsparse
from jsparse.attention import Mask
from jsparse.masks.block_mask import BlockMask
from jsparse.models.config import LlamaConfig

LayerMask = Sequence[jsparse.TokenMask] | BlockMask
"""One layer's entry in a mask of one entry per layer."""
ModelMask = Mask | Sequence[LayerMask]
"""What a model takes as ``mask``: one for all layers, or one entry per layer."""


def layer_masks(config: LlamaConfig, mask: ModelMask | None) -> list[Mask]:
    """What ``jsparse.attention`` gets in each layer: ``mask`` (None: causal) within the layer's sliding
    window.

    ``mask`` is the same in every layer where it is None, a TokenMask, a sequence of one TokenMask for each
    query head, or a BlockMask. Or it has one entry for each layer: a sequence of sequences of TokenMasks (one
    for each query head, or a single one for all) and BlockMasks. A sequence of bare TokenMasks always means
    one per head, so the entries of layers must be nested.

    Raises ValueError for another number of masks, naming the layer; TypeError for what is no mask;
    NotImplementedError where mask and window together cannot be written as one mask.

    >>> config = LlamaConfig.tiny(num_attention_heads=2)
    >>> everything, recent = jsparse.causal(), jsparse.sliding_window(4)
    >>> layer_masks(config, [everything, recent]) == [(everything, recent)] * 2  # one per head
    True
    >>> layer_masks(config, [[everything], [recent]]) == [everything, recent]  # one per layer
    True
    """
    mask = jsparse.causal() if mask is None else mask
    layers = config.num_hidden_layers
    if not _is_one_a_layer(mask):
        entries, names = [mask] * layers, ["mask"] * layers
    elif len(mask) != layers:
        raise ValueError(
            f"mask has {len(mask)} entries for num_hidden_layers={layers}; allowed is one for each layer, or "
            "one TokenMask for each query head of all layers"
        )
    else:
        entries = [_unwrapped(entry, number) for number, entry in enumerate(mask)]
        names = [f"mask[{number}], of layer {number}," for number in range(layers)]
    each_layer = zip(entries, names, config.sliding_windows, strict=True)
    return [_within_model(config, entry, name, window) for entry, name, window in each_layer]


def _is_one_a_layer(mask: Any) -> TypeGuard[Sequence]:
    return _is_sequence(mask) and any(_is_sequence(one) or isinstance(one, BlockMask) for one in mask)


def _unwrapped(entry: Any, layer: int) -> Any:
    """A layer's entry as it would be for a model of that layer alone."""
    if isinstance(entry, jsparse.TokenMask):
        raise TypeError(
            f"mask[{layer}] is a TokenMask among entries of layers, where a sequence of TokenMasks means one "
            f"per query head; write [{entry}] for all heads of the layer"
        )
    is_single = _is_sequence(entry) and len(entry) == 1 and isinstance(entry[0], jsparse.TokenMask)
    return entry[0] if is_single else entry


def _within_model(config: LlamaConfig, mask: Any, name: str, window: int | None) -> Mask:
    """``mask`` within one layer's ``window``, checked; errors call it ``name``."""
    if isinstance(mask, BlockMask):
        if window is not None:
            raise NotImplementedError(
                f"{name} is a BlockMask, and the model has sliding windows (here {window} tokens), which it "
                "may not contain; allowed are TokenMasks, or hidden() with an attend that masks each layer"
            )
        return mask
    if isinstance(mask, jsparse.TokenMask):
        return within_window(mask, window)
    if not _is_sequence(mask) or not all(isinstance(one, jsparse.TokenMask) for one in mask):
        raise TypeError(
            f"{name} must be None, a TokenMask, a sequence of them, a BlockMask, or a sequence of one "
            f"entry per layer, not {mask!r}"
        )
    if len(mask) != config.num_attention_heads:
        raise ValueError(
            f"{name} has {len(mask)} TokenMasks for num_attention_heads={config.num_attention_heads}; "
            "allowed is one, or one for each query head"
        )
    return tuple(within_window(one, window) for one in mask)


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


def hashable(mask: ModelMask | None) -> Any:
    """``mask`` with tuples for sequences, to serve as a static argument of ``jax.jit``.

    A BlockMask is hashed by identity: the same object compiles nothing again.

    >>> hashable([jsparse.sliding_window(2)])
    (TokenMask(sink=0, window=2, group_size=None, group_shift=0),)
    """
    return tuple(hashable(one) for one in mask) if _is_sequence(mask) else mask


def _is_sequence(value: Any) -> TypeGuard[Sequence]:
    return isinstance(value, Sequence) and not isinstance(value, str)
