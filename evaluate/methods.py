"""The methods that the scoreboard compares: a name, and the cache that it stands for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool

from jsparse.serve.config import CacheConfig

PAGE = 64  # tokens per page: budgets are multiples of it
SINK, WINDOW = 64, 256  # of streaming heads, unless a budget says otherwise

Heads = Bool[np.ndarray, "layers kv_heads"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the scoreboard.

    - cache: makes the cache from a budget in tokens and the KV heads that stream by the model's head pattern.
      Either is None unless the method asks for it.
    - about: what is read, in a few words.
    - budgeted: whether it is measured at every budget, or once, with None.
    - needs_pattern: whether it is left out for a model without a head pattern.
    """

    cache: Callable[[int | None, Heads | None], CacheConfig]
    about: str
    budgeted: bool = True
    needs_pattern: bool = False


def _selecting(about: str, **fields: Any) -> Method:
    return Method(lambda budget, _: CacheConfig(budget=budget, **fields), about)


def _whole(about: str, **fields: Any) -> Method:
    return Method(lambda *_: CacheConfig(policy="dense", **fields), about, budgeted=False)


def _streaming(budget: int | None, _: Heads | None) -> CacheConfig:
    # As many tokens as the others read: sink and window together are the budget.
    assert budget is not None
    return CacheConfig(policy="streaming", sink=SINK, window=budget - SINK)


def _heads(about: str, *, wrong: bool = False, budgeted: bool = False) -> Method:
    def cache(budget: int | None, streams: Heads | None) -> CacheConfig:
        assert streams is not None
        heads = ~streams if wrong else streams
        return CacheConfig(budget=budget, streaming_heads=heads, sink=SINK, window=WINDOW)

    return Method(cache, about, budgeted=budgeted, needs_pattern=True)


# What is fair. random, mean and oracle show how good a choice of pages can be, so they choose again for each
# token ("reuse 1"), and Quest is defined so. LServe reuses a choice for 4 tokens: flat and hierarchical pages
# and codes are compared at that, and lserve-reuse-1 is the row to hold against oracle, mean, random, quest.
# Random pages drawn for each token are a kind control: over an answer of several tokens they see more of the
# context than any fixed choice.
#
# In every row the last page counts in the budget, and the newest tokens that a reused choice lacks are read
# beside it. Quest's first two layers read everything whatever the budget: half of a model with four layers,
# little of one with 32. Its pages have 16 tokens, so it chooses four times as many of them.
#
# Streaming heads stream in the prompt too, as in StreamingLLM, DuoAttention and LServe.
METHODS: dict[str, Method] = {
    "dense": _whole("everything"),
    "int8": _whole("everything, from int8 codes", kv_bits=8),
    "int4": _whole("everything, from int4 codes", kv_bits=4),
    "right-heads": _heads("half the KV heads stream: the lowest in the head pattern"),
    "wrong-heads": _heads("half the KV heads stream: the highest in the head pattern", wrong=True),
    "streaming": Method(_streaming, "every head its sink and window"),
    "random": _selecting("random pages", policy="random", select_every=1),
    "mean": _selecting("pages by the mean of their keys", policy="mean", select_every=1),
    "quest": _selecting("pages of 16 by bounds; two dense layers", policy="quest"),
    "lserve-flat": _selecting("pages of 64 by their bounds, chosen every 4 tokens", logical_page_size=PAGE),
    "lserve": _selecting("pages of 64 by bounds of 16 tokens, chosen every 4 tokens"),
    "lserve-reuse-1": _selecting("as lserve, chosen for every token", select_every=1),
    "lserve-reuse-16": _selecting("as lserve, chosen every 16 tokens", select_every=16),
    "lserve-int8": _selecting("as lserve, from int8 codes", kv_bits=8),
    "lserve-int4": _selecting("as lserve, from int4 codes", kv_bits=4),
    "lserve-heads": _heads("as lserve, in the heads that do not stream in right-heads", budgeted=True),
    "oracle": _selecting("pages by their largest product", policy="oracle", select_every=1),
}
