"""The options of the serving benchmarks, and their checks.

What needs jax is imported late: the command line lists these options without it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Bool

from jsparse.integers import cdiv, is_integer, require_integer
from jsparse.models.choices import Dtype
from jsparse.serve.config import CacheConfig, Policy

if TYPE_CHECKING:
    from jsparse.models import LlamaConfig
    from jsparse.serve.layout import CacheLayout
else:
    LlamaConfig = CacheLayout = Any

Variant = Literal["dense", "streaming", "pooled", "vertical-slash"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_PAGE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingBench:
    """The options that the benchmarks of decoding and of prompts share."""

    output: Path
    """A new folder for the results."""
    model: str | Path | None = None
    """A Hugging Face folder or an id on the Hub; by default a Llama of 32.5 million random weights in 8
    layers of 2 KV heads."""
    dtype: Dtype | None = None
    """Dtype of the weights; what the model's config.json says unless given, and float32 for random ones."""
    sparsity: float = 0.5
    """The fraction of the KV heads of each layer that stream (its last ones), in the caches where some do."""
    sink: int = 128
    """First tokens that a streaming head keeps."""
    window: int = 256
    """Recent tokens that a streaming head keeps."""
    kv_bits: Literal[8, 4] | None = None
    """Keep the pages as codes of 8 or 4 bits."""

    def __post_init__(self):
        object.__setattr__(self, "output", Path(self.output))
        if isinstance(self.sparsity, bool) or not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be a number from 0 to 1, not {self.sparsity!r}")


def check_list(name: str, values: tuple, minimum: int | None = None) -> None:
    """Raise ValueError for an empty list, for a repeated entry, and for integers below ``minimum``."""
    if not values:
        raise ValueError(f"{name} must have at least one entry, not {values!r}")
    for value in values:
        if minimum is not None and (not is_integer(value) or value < minimum):
            raise ValueError(f"{name} must be integers >= {minimum}, not {value!r}")
        if values.count(value) > 1:
            raise ValueError(f"{name} has {value!r} more than once; an entry is measured once")


def check_integers(config: Any, **most: int | None) -> None:
    """Raise ValueError if a field is not an integer from 1 to the maximum given for it."""
    for name, limit in most.items():
        require_integer(name, getattr(config, name), most=limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBench(ServingBench):
    """Measure decoding: milliseconds per token at each context length, for each way to read the cache.

    Prompts are not computed. The cache holds random keys and values instead, as many as the context is long.
    A step takes equally long whatever their values, but text and logits mean nothing. The choice of pages is
    random too, so this says nothing about quality.
    """

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    """Tokens that the cache holds."""
    policies: tuple[Policy, ...] = ("dense", "streaming", "quest", "lserve")
    """What decides which tokens are read."""
    budget: int = 2048
    """Tokens that a retrieval head reads, in whole pages; a cache that is no larger is read whole."""
    batch: int = 1
    """Sequences, all of the same length."""
    steps: int = 16
    """Tokens per timed call, at most 32. It begins by choosing pages, for 4 tokens each, or 1 for Quest."""
    repeats: int = 7
    """Rounds, each measuring everything in turn; the median counts."""

    def __post_init__(self):
        from jsparse.serve.loop import MAX_STEPS

        super().__post_init__()
        check_list("contexts", self.contexts, minimum=1)
        check_list("policies", self.policies)
        check_integers(self, budget=None, batch=None, steps=MAX_STEPS, repeats=None)
        for policy in self.policies:
            self.cache(policy)

    def cache(self, policy: Policy, **sizes: Any) -> CacheConfig:
        """The cache of one policy, with only the benchmark's sizes set."""
        return CacheConfig(
            policy=policy,
            budget=self.budget,
            sink=self.sink,
            window=self.window,
            kv_bits=self.kv_bits,
            batch=self.batch,
            **sizes,
        )

    def layout(self, model: LlamaConfig, policy: Policy, context: int) -> CacheLayout:
        """A cache of as many whole pages as the context and the timed steps take."""
        from jsparse.serve.layout import layout_of

        cache = self.cache(policy, streaming_heads=last_heads_stream(model, self.sparsity))
        page, _ = cache.page_sizes()
        capacity = cdiv(context + self.steps, page) * page
        return layout_of(dataclasses.replace(cache, capacity=capacity), model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillBench(ServingBench):
    """Measure prompts: seconds from random tokens to the first new one, for each way to compute them.

    "dense" reads everything; with "streaming" some KV heads see only their sink and window; "pooled" and
    "vertical-slash" estimate which blocks each head reads.
    """

    contexts: tuple[int, ...] = (8192, 32768)
    """Tokens of the prompt."""
    variants: tuple[Variant, ...] = ("dense", "streaming")
    """Ways to compute it."""
    estimate_budget: int = 4096
    """Most tokens that a block of queries reads where blocks are estimated; a multiple of 512."""
    chunk: int = 512
    """Tokens of the prompt that are computed at once."""
    repeats: int = 1
    """Rounds, each measuring everything in turn, after one token that compiles; the median counts."""
    seed: int = 0
    """Seed of the tokens."""

    def __post_init__(self):
        super().__post_init__()
        check_list("contexts", self.contexts, minimum=1)
        check_list("variants", self.variants)
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"variants must be of {', '.join(VARIANTS)}, not {variant!r}")
        check_integers(self, chunk=None, repeats=None, estimate_budget=None)
        if self.estimate_budget % 512:
            raise ValueError(f"estimate_budget={self.estimate_budget} must be a multiple of 512")
        for variant in self.variants:
            self.cache(variant)

    def cache(self, variant: Variant, **sizes: Any) -> CacheConfig:
        """The cache of one variant, with only the benchmark's sizes set."""
        from jsparse.masks.pooled import PooledBlocks
        from jsparse.masks.vertical_slash import VerticalSlash

        estimates = {
            "pooled": PooledBlocks(self.estimate_budget),
            # A list has at most vertical + 2 * slash tokens.
            "vertical-slash": VerticalSlash(self.estimate_budget // 2, self.estimate_budget // 4),
        }
        return CacheConfig(
            budget=None,
            sink=self.sink,
            window=self.window,
            kv_bits=self.kv_bits,
            page_size=_PAGE,
            batch=1,
            prefill_chunk=self.chunk,
            prefill_estimate=estimates.get(variant),
            **sizes,
        )

    def layout(self, model: LlamaConfig, variant: Variant, context: int) -> CacheLayout:
        """A cache of as many whole pages as the prompt and one more token take."""
        from jsparse.serve.layout import layout_of

        heads = last_heads_stream(model, self.sparsity) if variant == "streaming" else None
        capacity = cdiv(context + 1, _PAGE) * _PAGE
        return layout_of(self.cache(variant, capacity=capacity, streaming_heads=heads), model)


def last_heads_stream(config: LlamaConfig, sparsity: float) -> Bool[np.ndarray, "layers kv_heads"]:
    """True for the last heads of each layer, a fraction ``sparsity`` of them.

    False for all heads of a layer with its own sliding window: it streams anyway, by that window.
    """
    kv_heads = config.num_key_value_heads
    streams = np.arange(kv_heads) >= kv_heads - round(sparsity * kv_heads)
    free = np.array([window is None for window in config.sliding_windows])
    return free[:, None] & streams
