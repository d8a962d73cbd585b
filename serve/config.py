"""How large and how sparse the KV cache of a generation is, and the check that everything fits together."""

import dataclasses
from typing import Any

import numpy as np

from jsparse.models import LlamaConfig


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The KV cache: how many tokens it takes, and what each head may read of it.

    - ``capacity``: tokens a sequence, prompt and new ones together, in whole pages; None takes what the
      longest request needs, rounded up to a power of two of pages. Calls of one capacity share compiled code.
    - ``batch``: rows, some of which may stay empty; None takes the prompts, rounded up to a power of two.
    - ``page_size``, ``logical_page_size``: tokens a page, and tokens that share one bound of their keys.
    - ``budget``: how many tokens a retrieval head reads at a decode step, in whole pages, chosen by their
      bounds; a context within the budget is read whole. None always reads everything. Prompts always do.
    - ``streaming_heads``: which KV heads stream, ``[layers, kv_heads]`` booleans, as from
      ``HeadPattern.threshold``; None for none. They see the first ``sink`` and the last ``window`` tokens, in
      the prompt too.
    - ``prefill_chunk``: how many tokens of the prompts are computed at once (at most the capacity).

    Defaults are LServe's (arXiv 2502.14866). ValueError names the field, its value and what is allowed.

    >>> CacheConfig(budget=100)
    Traceback (most recent call last):
        ...
    ValueError: budget=100 must be a multiple of page_size=64
    """

    capacity: int | None = None
    batch: int | None = None
    page_size: int = 64
    logical_page_size: int = 16
    budget: int | None = 4096
    streaming_heads: Any = None  # kept as a tuple of tuples of bool, so that equal configurations are equal
    sink: int = 128
    window: int = 256
    prefill_chunk: int = 512

    def __post_init__(self):
        for name in ("page_size", "logical_page_size", "window", "prefill_chunk"):
            _require_integer(name, getattr(self, name), minimum=1)
        for name in ("capacity", "batch", "budget"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), minimum=1, otherwise=" or None")
        _require_integer("sink", self.sink, minimum=0)
        if self.page_size % self.logical_page_size:
            raise ValueError(
                f"page_size={self.page_size} must be a multiple of logical_page_size={self.logical_page_size}"
            )
        for name in ("capacity", "budget"):
            value = getattr(self, name)
            if value is not None and value % self.page_size:
                raise ValueError(f"{name}={value} must be a multiple of page_size={self.page_size}")
        if self.streaming_heads is not None:
            try:
                heads = np.array(self.streaming_heads)
            except ValueError:  # rows of different lengths
                heads = np.array(None)
            if heads.ndim != 2 or heads.dtype != bool:
                raise ValueError(
                    "streaming_heads must be booleans [layers, kv_heads], as from HeadPattern.threshold, "
                    f"not {self.streaming_heads!r}"
                )
            object.__setattr__(self, "streaming_heads", tuple(tuple(map(bool, row)) for row in heads))


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """What one layer's cache holds: which KV heads stream, and over which sink and window."""

    streaming_heads: tuple[int, ...]
    sink: int
    window: int


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """A cache with every size decided. Hashable: the jitted functions are compiled once for each layout."""

    batch: int
    capacity: int
    page_size: int
    logical_page_size: int | None  # None: nothing is ever selected, so no bounds are kept
    budget: int | None
    prefill_chunk: int
    layers: tuple[LayerLayout, ...]

    @property
    def pages(self) -> int:
        """Pages a sequence."""
        return self.capacity // self.page_size


def plan_cache(
    cache: CacheConfig, model: LlamaConfig, prompt_lengths: list[int], max_new: int
) -> CacheLayout:
    """The layout that serves these prompts. ValueError with the arithmetic where something does not fit."""
    longest = max(range(len(prompt_lengths)), key=prompt_lengths.__getitem__)
    needed = prompt_lengths[longest] + max_new
    request = f"prompt {longest} has {prompt_lengths[longest]} tokens, with max_new_tokens={max_new} {needed}"
    capacity = cache.capacity
    if capacity is None:
        capacity = _power_of_two(-(-needed // cache.page_size)) * cache.page_size
    if needed > capacity:
        pages = capacity // cache.page_size
        raise ValueError(
            f"{request}: more than capacity={capacity} ({pages} pages of {cache.page_size}), the most allowed"
        )
    if needed > model.max_position_embeddings:
        raise ValueError(
            f"{request}: more than the model's max_position_embeddings={model.max_position_embeddings}; "
            "shorten them, or extend the model's context"
        )
    batch = _power_of_two(len(prompt_lengths)) if cache.batch is None else cache.batch
    if len(prompt_lengths) > batch:
        raise ValueError(f"{len(prompt_lengths)} prompts are more than the cache's batch={batch} rows")
    # A budget that covers the capacity never selects.
    budget = None if cache.budget is None or cache.budget >= capacity else cache.budget
    return CacheLayout(
        batch=batch,
        capacity=capacity,
        page_size=cache.page_size,
        logical_page_size=None if budget is None else cache.logical_page_size,
        budget=budget,
        prefill_chunk=min(cache.prefill_chunk, capacity),
        layers=_layer_layouts(cache, model, capacity),
    )


def _layer_layouts(cache: CacheConfig, model: LlamaConfig, capacity: int) -> tuple[LayerLayout, ...]:
    layers, kv_heads = model.num_hidden_layers, model.num_key_value_heads
    streams = np.zeros((layers, kv_heads), bool)
    if cache.streaming_heads is not None:
        streams = np.array(cache.streaming_heads)
        if streams.shape != (layers, kv_heads):
            raise ValueError(
                f"streaming_heads is {streams.shape}, but must be {(layers, kv_heads)}: "
                f"the model has {layers} layers of {kv_heads} KV heads"
            )
    layouts = []
    for layer, window in enumerate(model.sliding_windows):
        heads = tuple(int(head) for head in np.flatnonzero(streams[layer]))
        if window is None or window >= capacity:  # a window that the cache fits in hides nothing
            layouts.append(LayerLayout(heads, cache.sink, cache.window))
        elif heads:
            raise ValueError(
                f"streaming_heads marks heads of layer {layer}, which has a sliding window of {window}: "
                "all its heads stream already, so none may be marked"
            )
        else:
            layouts.append(LayerLayout(tuple(range(kv_heads)), 0, window))
    return tuple(layouts)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _require_integer(name: str, value: Any, minimum: int, otherwise: str = "") -> None:
    if not is_integer(value) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}{otherwise}, not {value!r}")
