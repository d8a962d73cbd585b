"""How large and how sparse the KV cache of a generation is, and the check that everything fits together."""

import dataclasses
from typing import Any, Literal

import numpy as np

from jsparse.cache.select.selection import Selection
from jsparse.integers import is_integer, power_of_two_from
from jsparse.masks.pooled import PooledBlocks
from jsparse.masks.vertical_slash import VerticalSlash
from jsparse.models import LlamaConfig

Policy = Literal["lserve", "dense", "streaming", "quest", "mean", "oracle", "random"]
POLICIES: tuple[Policy, ...] = ("lserve", "dense", "streaming", "quest", "mean", "oracle", "random")
_SCORES: dict[Policy, Literal["bounds", "exact", "mean", "random"]] = {
    "lserve": "bounds",
    "quest": "bounds",
    "oracle": "exact",
    "mean": "mean",
    "random": "random",
}
_QUEST_DENSE_LAYERS = 2  # the layers that Quest leaves alone (arXiv 2406.10774, section 4.1)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The KV cache: how many tokens it takes, and what each head may read of it.

    ``policy`` names what decides which tokens are read at a decode step:

    - "lserve": streaming heads their sink and window, the others the pages that are best by the bounds of the
      keys in their logical pages (LServe, arXiv 2502.14866). The default.
    - "dense": everything. ``budget`` and ``streaming_heads`` do not apply.
    - "streaming": every head its sink and window (StreamingLLM, arXiv 2309.17453); no ``budget``.
    - "quest": pages by the bounds of the keys of whole pages, of 16 tokens unless ``page_size`` says
      otherwise, chosen for each token; the first two layers read everything, no head streams (Quest, arXiv
      2406.10774). ``streaming_heads`` do not apply.
    - "mean", "oracle", "random": as "lserve", with the pages of the largest product with a key, of that with
      the mean of the keys, or any. To compare with.

    Size:

    - ``capacity``: tokens a sequence, prompt and new ones together, in whole pages; None takes what the
      longest request needs, rounded up to a power of two of pages. Calls of one capacity share compiled code.
    - ``batch``: rows, some of which may stay empty; None takes the prompts, rounded up to a power of two.
    - ``num_pages``: pages that the sequences share; None takes enough for ``batch`` times ``capacity``.
    - ``page_size``, ``logical_page_size``: tokens a page (None: 64, for Quest 16), and tokens that share one
      bound of their keys (None: 16, or the page where it is smaller; for Quest the page).
    - ``kv_bits``: 8 or 4 keeps the pages as codes with a scale and a zero for each token and head; None as
      the model computes. Rings are small and stay as they are.

    Reading:

    - ``budget``: how many tokens a retrieval head reads at a decode step, in whole pages; a context within
      the budget is read whole. None always reads everything.
    - ``select_every``: the pages are chosen at every so many-th token (None: 4, for Quest 1) and read until
      then, together with what was written since.
    - ``select_heads``: "max" chooses for a KV head by the largest score of its query heads, "union" reads
      what any of its query heads chooses, "query" lets each query head read its own choice.
    - ``streaming_heads``: which KV heads stream, ``[layers, kv_heads]`` booleans, as from
      ``HeadPattern.threshold``; None for none. They see the first ``sink`` and the last ``window`` tokens,
      and in the prompt the last ``prefill_window`` (None: ``window``).

    Prompts:

    - ``prefill_chunk``: how many tokens of the prompts are computed at once (at most the capacity).
    - ``prefill_estimate``: which blocks the retrieval heads visit of a prompt: a
      :class:`jsparse.PooledBlocks` or :class:`jsparse.VerticalSlash`; None all of them.

    Defaults are LServe's. ValueError names the field, its value and what is allowed.

    >>> CacheConfig(budget=100)
    Traceback (most recent call last):
        ...
    ValueError: budget=100 must be a multiple of page_size=64
    """

    capacity: int | None = None
    batch: int | None = None
    page_size: int | None = None
    logical_page_size: int | None = None
    budget: int | None = 4096
    streaming_heads: Any = None  # kept as a tuple of tuples of bool, so that equal configurations are equal
    sink: int = 128
    window: int = 256
    prefill_window: int | None = None
    prefill_chunk: int = 512
    prefill_estimate: PooledBlocks | VerticalSlash | None = None
    policy: Policy = "lserve"
    select_every: int | None = None
    select_heads: Literal["max", "union", "query"] = "max"
    kv_bits: Literal[8, 4] | None = None
    num_pages: int | None = None

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        for name in ("window", "prefill_chunk"):
            _require_integer(name, getattr(self, name), minimum=1)
        optional = (
            "capacity",
            "batch",
            "budget",
            "page_size",
            "logical_page_size",
            "prefill_window",
            "select_every",
            "num_pages",
        )
        for name in optional:
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), minimum=1, otherwise=" or None")
        _require_integer("sink", self.sink, minimum=0)
        if self.select_heads not in ("max", "union", "query"):
            raise ValueError(f"select_heads must be max, union or query, not {self.select_heads!r}")
        if self.kv_bits is not None and not (is_integer(self.kv_bits) and self.kv_bits in (8, 4)):
            raise ValueError(f"kv_bits must be 8, 4 or None, not {self.kv_bits!r}")
        self._check_pages()
        if self.prefill_window is not None and self.prefill_window < self.window:
            raise ValueError(
                f"prefill_window={self.prefill_window} must be at least window={self.window}: "
                "a prompt sees no less than new tokens do"
            )
        estimate = self.prefill_estimate
        if estimate is not None:
            if not isinstance(estimate, PooledBlocks | VerticalSlash):
                raise ValueError(
                    f"prefill_estimate must be PooledBlocks, VerticalSlash or None, not {estimate!r}"
                )
            name = "segment" if isinstance(estimate, VerticalSlash) else "block"
            if self.prefill_chunk % getattr(estimate, name):
                raise ValueError(
                    f"prefill_chunk={self.prefill_chunk} must be a multiple of "
                    f"prefill_estimate's {name}={getattr(estimate, name)}"
                )
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

    def page_sizes(self) -> tuple[int, int]:
        """(page_size, logical_page_size), with what the policy takes where they are None."""
        quest = self.policy == "quest"
        page = self.page_size or (16 if quest else 64)
        return page, self.logical_page_size or (page if quest else min(16, page))

    def _check_pages(self):
        page, logical = self.page_sizes()
        if page % logical:
            raise ValueError(f"page_size={page} must be a multiple of logical_page_size={logical}")
        if self.policy == "quest" and logical != page:
            raise ValueError(
                f"logical_page_size={logical} must be page_size={page} or None: policy='quest' has no others"
            )
        for name in ("capacity", "budget"):
            value = getattr(self, name)
            if value is not None and value % page:
                raise ValueError(f"{name}={value} must be a multiple of page_size={page}")


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """What one layer's cache holds: which KV heads stream, and over which sink and windows."""

    streaming_heads: tuple[int, ...]
    sink: int
    window: int
    prefill_window: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """What retrieval heads read: at a decode step, from layer ``dense_layers`` on, and of a prompt."""

    selection: Selection | None
    dense_layers: int
    estimate: PooledBlocks | VerticalSlash | None

    def selection_of(self, layer: int) -> Selection | None:
        if self.selection is None or layer < self.dense_layers:
            return None
        return dataclasses.replace(self.selection, seed=layer)


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """A cache with every size decided. Hashable: the jitted functions are compiled once for each layout."""

    batch: int
    capacity: int
    num_pages: int
    page_size: int
    logical_page_size: int | None  # None: nothing is selected by bounds, so none are kept
    kv_bits: int | None
    prefill_chunk: int
    reading: Reading
    layers: tuple[LayerLayout, ...]

    def pages_of(self, tokens: int) -> int:
        """How many pages a sequence of so many tokens takes."""
        return -(-tokens // self.page_size)


def plan_cache(cache: CacheConfig, model: LlamaConfig, lengths: list[int], max_new: list[int]) -> CacheLayout:
    """The layout that serves prompts of these lengths with so many new tokens each, all at once.

    ValueError with the arithmetic where something does not fit.
    """
    page, _ = cache.page_sizes()
    longest = max(length + new for length, new in zip(lengths, max_new, strict=True))
    capacity = cache.capacity or power_of_two_from(-(-longest // page)) * page
    batch = cache.batch or power_of_two_from(len(lengths))
    layout = layout_of(dataclasses.replace(cache, capacity=capacity, batch=batch), model)
    check_fit(layout, model, lengths, max_new, free_rows=layout.batch, free_pages=layout.num_pages)
    return layout


def layout_of(cache: CacheConfig, model: LlamaConfig) -> CacheLayout:
    """The layout of a cache whose capacity and batch are given."""
    for name in ("capacity", "batch"):
        if getattr(cache, name) is None:
            raise ValueError(f"{name} must be an integer >= 1 where no requests say how large it must be")
    assert cache.capacity is not None and cache.batch is not None
    page, logical = cache.page_sizes()
    selection = None
    # A budget that covers the capacity never selects.
    if cache.policy in _SCORES and cache.budget and cache.budget < cache.capacity:
        score = _SCORES[cache.policy]
        every = cache.select_every or (1 if cache.policy == "quest" else 4)
        selection = Selection(cache.budget, every, cache.select_heads, score)
    return CacheLayout(
        batch=cache.batch,
        capacity=cache.capacity,
        num_pages=cache.num_pages or cache.batch * cache.capacity // page,
        page_size=page,
        logical_page_size=logical if selection is not None and selection.score == "bounds" else None,
        kv_bits=cache.kv_bits,
        prefill_chunk=_prefill_chunk(cache, page),
        reading=Reading(
            selection, _QUEST_DENSE_LAYERS if cache.policy == "quest" else 0, cache.prefill_estimate
        ),
        layers=_layer_layouts(cache, model),
    )


def check_fit(
    layout: CacheLayout,
    model: LlamaConfig,
    lengths: list[int],
    max_new: list[int],
    *,
    free_rows: int,
    free_pages: int,
) -> None:
    """ValueError with the arithmetic where requests are too long, too many, or need too many pages."""
    needed = [length + new for length, new in zip(lengths, max_new, strict=True)]
    longest = max(range(len(needed)), key=needed.__getitem__)
    request = (
        f"prompt {longest} has {lengths[longest]} tokens, "
        f"with max_new_tokens={max_new[longest]} {needed[longest]}"
    )
    if needed[longest] > layout.capacity:
        raise ValueError(
            f"{request}: more than capacity={layout.capacity} "
            f"({layout.pages_of(layout.capacity)} pages of {layout.page_size}), the most allowed"
        )
    if needed[longest] > model.max_position_embeddings:
        raise ValueError(
            f"{request}: more than the model's max_position_embeddings={model.max_position_embeddings}; "
            "shorten them, or extend the model's context"
        )
    if len(lengths) > free_rows:
        free = "" if free_rows == layout.batch else f", of which {free_rows} are free"
        raise ValueError(f"{len(lengths)} prompts are more than the cache's batch={layout.batch} rows{free}")
    pages = sum(map(layout.pages_of, needed))
    if pages > free_pages:
        free = "" if free_pages == layout.num_pages else f", of which {free_pages} are free"
        raise ValueError(
            f"{len(lengths)} prompts with their new tokens need {pages} pages of {layout.page_size}: "
            f"more than num_pages={layout.num_pages}{free}"
        )


def _prefill_chunk(cache: CacheConfig, page: int) -> int:
    """At most the capacity, in the units that prompts are cut into."""
    assert cache.capacity is not None
    estimate = cache.prefill_estimate
    unit = page if estimate is None else getattr(estimate, "segment", estimate.block)
    return min(cache.prefill_chunk, -(-cache.capacity // unit) * unit)


def _layer_layouts(cache: CacheConfig, model: LlamaConfig) -> tuple[LayerLayout, ...]:
    layers, kv_heads = model.num_hidden_layers, model.num_key_value_heads
    streams = np.full((layers, kv_heads), cache.policy == "streaming")
    if cache.streaming_heads is not None:
        given = np.array(cache.streaming_heads)
        if given.shape != (layers, kv_heads):
            raise ValueError(
                f"streaming_heads is {given.shape}, but must be {(layers, kv_heads)}: "
                f"the model has {layers} layers of {kv_heads} KV heads"
            )
        if cache.policy not in ("dense", "quest"):
            streams |= given
    prefill_window = cache.prefill_window or cache.window
    assert cache.capacity is not None
    layouts = []
    for layer, window in enumerate(model.sliding_windows):
        heads = tuple(int(head) for head in np.flatnonzero(streams[layer]))
        if window is None:
            layouts.append(LayerLayout(heads, cache.sink, cache.window, prefill_window))
        elif heads and cache.policy != "streaming":
            raise ValueError(
                f"streaming_heads marks heads of layer {layer}, which has a sliding window of {window}: "
                "all its heads stream already, so none may be marked"
            )
        else:
            window = min(window, cache.capacity)
            layouts.append(LayerLayout(tuple(range(kv_heads)), 0, window, window))
    return tuple(layouts)


def _require_integer(name: str, value: Any, minimum: int, otherwise: str = "") -> None:
    if not is_integer(value) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}{otherwise}, not {value!r}")
