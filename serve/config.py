"""How large and how sparse the KV cache of a generation is, as a user says it."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from jsparse.cache.select.selection import SelectHeads
from jsparse.integers import is_integer, require_integer
from jsparse.masks.estimate import Estimate

Policy = Literal["lserve", "dense", "streaming", "quest", "mean", "oracle", "random"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


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
    prefill_estimate: Estimate | None = None
    policy: Policy = "lserve"
    select_every: int | None = None
    select_heads: SelectHeads = "max"
    kv_bits: Literal[8, 4] | None = None
    num_pages: int | None = None

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        for name in ("window", "prefill_chunk"):
            require_integer(name, getattr(self, name))
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
                require_integer(name, getattr(self, name), otherwise=" or None")
        require_integer("sink", self.sink, least=0)
        if self.select_heads not in get_args(SelectHeads):
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
            if not isinstance(estimate, Estimate):
                raise ValueError(
                    f"prefill_estimate must be PooledBlocks, VerticalSlash or None, not {estimate!r}"
                )
            name = "segment" if hasattr(estimate, "segment") else "block"
            unit = self.prompt_unit()
            if self.prefill_chunk % unit:
                raise ValueError(
                    f"prefill_chunk={self.prefill_chunk} must be a multiple of "
                    f"prefill_estimate's {name}={unit}"
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

    def prompt_unit(self) -> int:
        """Chunks of a prompt end at multiples of so many tokens: what is estimated together, or a page."""
        estimate = self.prefill_estimate
        return self.page_sizes()[0] if estimate is None else getattr(estimate, "segment", estimate.block)

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
