"""What every layer of a cache holds and reads, and the check that requests fit it."""

import dataclasses

import numpy as np

from jsparse.cache.select.selection import Score, Selection
from jsparse.integers import cdiv, power_of_two_from
from jsparse.masks.estimate import Estimate
from jsparse.models import LlamaConfig
from jsparse.models.positions import check_length
from jsparse.serve.config import CacheConfig, Policy

Selections = tuple[Selection | None, ...]  # of each layer; None reads everything
Estimates = tuple[Estimate | None, ...]
_SCORES: dict[Policy, Score] = {
    "lserve": "bounds",
    "quest": "bounds",
    "oracle": "exact",
    "mean": "mean",
    "random": "random",
}
_QUEST_DENSE_LAYERS = 2  # the layers that Quest leaves alone (arXiv 2406.10774, section 4.1)


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """What one layer's cache holds, and what is read of it.

    - streaming_heads: the KV heads that stream.
    - sink, window, prefill_window: what they see, as in :class:`CacheConfig`.
    - logical_page_size: tokens that share one bound of their keys; None keeps no bounds.
    - selection: how retrieval heads choose pages at a decode step; None reads all of them.
    - estimate: which blocks of a prompt retrieval heads visit; None visits all of them.
    """

    streaming_heads: tuple[int, ...]
    sink: int
    window: int
    prefill_window: int
    logical_page_size: int | None
    selection: Selection | None
    estimate: Estimate | None


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """A cache with every size decided. Hashable: jitted functions are compiled once per layout."""

    batch: int
    capacity: int
    num_pages: int
    page_size: int
    kv_bits: int | None
    prefill_chunk: int
    vocab_size: int
    layers: tuple[LayerLayout, ...]

    @property
    def selections(self) -> Selections:
        return tuple(layer.selection for layer in self.layers)

    @property
    def estimates(self) -> Estimates:
        return tuple(layer.estimate for layer in self.layers)

    def pages_of(self, tokens: int) -> int:
        """How many pages a sequence of ``tokens`` tokens takes."""
        return cdiv(tokens, self.page_size)


def plan_cache(
    cache: CacheConfig,
    model: LlamaConfig,
    lengths: list[int],
    max_new: list[int],
    numbers: list[int] | None = None,
) -> CacheLayout:
    """The layout that serves prompts of ``lengths`` with ``max_new`` new tokens each, all at once.

    ``numbers`` are those of the prompts, which samples of one prompt share; by default they count from 0.

    Raises ValueError, with the arithmetic, if something does not fit.
    """
    longest = max(length + new for length, new in zip(lengths, max_new, strict=True))
    capacity = capacity_for(cache, longest)
    batch = cache.batch or power_of_two_from(len(lengths))
    layout = layout_of(dataclasses.replace(cache, capacity=capacity, batch=batch), model)
    check_fit(layout, model, lengths, max_new, numbers, free_rows=layout.batch, free_pages=layout.num_pages)
    return layout


def capacity_for(cache: CacheConfig, tokens: int) -> int:
    """The capacity of a cache, by default what ``tokens`` need, in a power of two of pages."""
    page, _ = cache.page_sizes()
    return cache.capacity or power_of_two_from(cdiv(tokens, page)) * page


def layout_of(cache: CacheConfig, model: LlamaConfig) -> CacheLayout:
    """The layout of a cache with ``capacity`` and ``batch`` given."""
    for name in ("capacity", "batch"):
        if getattr(cache, name) is None:
            raise ValueError(f"{name} must be an integer >= 1 where no requests say how large it must be")
    assert cache.capacity is not None and cache.batch is not None
    page, _ = cache.page_sizes()
    unit = cache.prompt_unit()
    return CacheLayout(
        batch=cache.batch,
        capacity=cache.capacity,
        num_pages=cache.num_pages or cache.batch * cache.capacity // page,
        page_size=page,
        kv_bits=cache.kv_bits,
        prefill_chunk=min(cache.prefill_chunk, cdiv(cache.capacity, unit) * unit),
        vocab_size=model.vocab_size,
        layers=tuple(
            _layer_layout(cache, model, layer, heads)
            for layer, heads in enumerate(_streaming_heads(cache, model))
        ),
    )


def check_fit(
    layout: CacheLayout,
    model: LlamaConfig,
    lengths: list[int],
    max_new: list[int],
    numbers: list[int] | None = None,
    *,
    free_rows: int,
    free_pages: int,
) -> None:
    """Raises ValueError, with the arithmetic, if requests are too long, too many, or need too many pages.

    ``numbers`` are those of :func:`plan_cache`.
    """
    numbers = list(range(len(lengths))) if numbers is None else numbers
    counted = "" if len(set(numbers)) == len(numbers) else ", each sample counted as one"
    needed = [length + new for length, new in zip(lengths, max_new, strict=True)]
    longest = max(range(len(needed)), key=needed.__getitem__)
    request = (
        f"prompt {numbers[longest]} has {lengths[longest]} tokens, "
        f"with max_new_tokens={max_new[longest]} {needed[longest]}"
    )
    if needed[longest] > layout.capacity:
        raise ValueError(
            f"{request}: more than capacity={layout.capacity} "
            f"({layout.pages_of(layout.capacity)} pages of {layout.page_size}), the most allowed"
        )
    check_length(model, needed[longest], request, "shorten them, or extend the model's context")
    if len(lengths) > free_rows:
        free = "" if free_rows == layout.batch else f", of which {free_rows} are free"
        raise ValueError(
            f"{len(lengths)} prompts are more than the cache's batch={layout.batch} rows{free}{counted}"
        )
    pages = sum(map(layout.pages_of, needed))
    if pages > free_pages:
        free = "" if free_pages == layout.num_pages else f", of which {free_pages} are free"
        raise ValueError(
            f"{len(lengths)} prompts with their new tokens need {pages} pages of {layout.page_size}: "
            f"more than num_pages={layout.num_pages}{free}{counted}"
        )


def _layer_layout(cache: CacheConfig, model: LlamaConfig, layer: int, heads: tuple[int, ...]) -> LayerLayout:
    assert cache.capacity is not None
    sink, window, prefill_window = cache.sink, cache.window, cache.prefill_window or cache.window
    own_window = model.sliding_windows[layer]
    if own_window is not None:
        if heads and cache.policy != "streaming":
            raise ValueError(
                f"streaming_heads marks heads of layer {layer}, which has a sliding window of {own_window}: "
                "all its heads stream already, so none may be marked"
            )
        heads, sink = tuple(range(model.num_key_value_heads)), 0
        window = prefill_window = min(own_window, cache.capacity)
    _, logical = cache.page_sizes()
    selection = _selection(cache, layer) if len(heads) < model.num_key_value_heads else None
    return LayerLayout(
        streaming_heads=heads,
        sink=sink,
        window=window,
        prefill_window=prefill_window,
        logical_page_size=logical if selection is not None and selection.score == "bounds" else None,
        selection=selection,
        estimate=cache.prefill_estimate,
    )


def _streaming_heads(cache: CacheConfig, model: LlamaConfig) -> list[tuple[int, ...]]:
    """The KV heads of each layer that the cache lets stream."""
    shape = model.num_hidden_layers, model.num_key_value_heads
    streams = np.full(shape, cache.policy == "streaming")
    if cache.streaming_heads is not None:
        given = np.array(cache.streaming_heads)
        if given.shape != shape:
            raise ValueError(
                f"streaming_heads is {given.shape}, but must be {shape}: "
                f"the model has {shape[0]} layers of {shape[1]} KV heads"
            )
        if cache.policy not in ("dense", "quest"):
            streams |= given
    return [tuple(int(head) for head in np.flatnonzero(of_layer)) for of_layer in streams]


def _selection(cache: CacheConfig, layer: int) -> Selection | None:
    """How the retrieval heads of a layer choose pages. A budget that covers the capacity never selects."""
    assert cache.capacity is not None
    quest = cache.policy == "quest"
    if cache.policy not in _SCORES or not cache.budget or cache.budget >= cache.capacity:
        return None
    if quest and layer < _QUEST_DENSE_LAYERS:
        return None
    every = cache.select_every or (1 if quest else 4)
    return Selection(cache.budget, every, cache.select_heads, _SCORES[cache.policy], seed=layer)
