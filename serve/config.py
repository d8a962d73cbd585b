"""The size and the sparsity of a generation's KV cache, as a user specifies them."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jsparse.cache.select.selection import SelectHeads
from jsparse.integers import is_integer, require_integer

if TYPE_CHECKING:
    from jsparse.masks.estimate import Estimate
else:
    Estimate = Any

Policy = Literal["lserve", "dense", "streaming", "quest", "mean", "oracle", "random"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The KV cache: how many tokens it holds, and what each head may read of it.

    - capacity: tokens per sequence, prompt and new ones together, in whole pages. None takes what the longest
      request needs, rounded up to a power of two of pages. Calls with one capacity share compiled code.
    - batch: rows, some of which may stay empty. None takes the number of prompts, rounded up to a power of
      two.
    - page_size: tokens per page. None takes 64, and 16 for Quest.
    - logical_page_size: tokens that share one bound of their keys. None takes 16, or the page if it is
      smaller, and always the page for Quest.
    - budget: how many tokens a retrieval head reads at a decode step, in whole pages. A context within the
      budget is read whole. None always reads everything.
    - streaming_heads: which KV heads stream, booleans [layers, kv_heads], as from ``HeadPattern.threshold``;
      None if none does.
    - sink, window: how many of the first and of the last tokens a streaming head sees.
    - prefill_window: replaces ``window`` within the prompt, and is no smaller. None takes ``window``.
    - prefill_chunk: how many tokens of a prompt are computed at once (at most the capacity).
    - prefill_estimate: which blocks of a prompt the retrieval heads visit: a :class:`jsparse.PooledBlocks` or
      :class:`jsparse.VerticalSlash`; None visits all of them.
    - policy: what decides which tokens a decode step reads, see below.
    - select_every: pages are chosen every ``select_every`` tokens, and until the next choice they are read
      together with what was written since. None takes 4, and 1 for Quest.
    - select_heads: "max" chooses for a KV head by the largest score of its query heads, "union" reads what
      any of its query heads chooses, "query" lets each query head read its own choice.
    - kv_bits: 8 or 4 stores pages as codes of that many bits, with a scale and a zero per token and KV head.
      None stores them in the model's dtype. Rings are small and always in the model's dtype.
    - num_pages: pages that the sequences share; None takes enough for ``batch`` times ``capacity``.

    Policies:

    - "lserve": streaming heads read their sink and window; the others read the pages that score best by the
      bounds of the keys in their logical pages (LServe, arXiv 2502.14866).
    - "dense": every head reads everything. ``budget`` and ``streaming_heads`` do not apply.
    - "streaming": every head reads its sink and window (StreamingLLM, arXiv 2309.17453). ``budget`` does not
      apply.
    - "quest": all heads read the pages that score best by the bounds of their keys, except in the first two
      layers, which read everything (Quest, arXiv 2406.10774). ``streaming_heads`` does not apply.
    - "oracle", "mean", "random": as "lserve", but the retrieval heads read the pages with the largest product
      of query and key, those with the largest product of query and mean key, or random ones. These
      are for comparison.

    The defaults are LServe's.

    Raises ValueError, naming the field, its value and what is allowed.

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
            from jsparse.masks.estimate import (
                Estimate,  # late: the command line lists its options without jax
            )

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
        """``(page_size, logical_page_size)``, with the policy's defaults for None."""
        quest = self.policy == "quest"
        page = self.page_size or (16 if quest else 64)
        return page, self.logical_page_size or (page if quest else min(16, page))

    def prompt_unit(self) -> int:
        """Tokens per unit of a prompt: a segment or a block of the estimate; without one, a page."""
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
