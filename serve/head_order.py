"""A model with its heads in the order that a cache reads them in."""

import dataclasses

import numpy as np

from jsparse.models import Llama, reorder_heads
from jsparse.serve.config import CacheConfig


def streaming_heads_last(model: Llama, cache: CacheConfig) -> tuple[Llama, CacheConfig]:
    """The model with its streaming heads last in each layer, where there are any, and the cache for it."""
    if cache.streaming_heads is None:
        return model, cache
    model, streams = reorder_heads(model, np.array(cache.streaming_heads))
    return model, dataclasses.replace(cache, streaming_heads=streams)
