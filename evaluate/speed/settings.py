"""The settings of the serving benchmarks: the options that they share, their checks, and the model."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Bool

from jsparse.integers import is_integer, require_integer
from jsparse.models import Llama, LlamaConfig, load_config

# The model if no checkpoint is given: 32.5 million parameters, few enough for the cache to matter.
RANDOM_LLAMA = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1 << 20,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingBench:
    """The options that the benchmarks of decoding and of prompts share."""

    output: Path
    """A new folder for the results."""
    model: Path | None = None
    """A Hugging Face folder or an id on the Hub; by default a Llama of 32.5 million random weights in 8
    layers layers of 2 KV heads."""
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


def model_config(folder: Path | None, contexts: tuple[int, ...], new_tokens: int) -> LlamaConfig:
    """The configuration of a checkpoint, or of the random model, without weights.

    Raises ValueError if a context and ``new_tokens`` after it exceed the model's positions.
    """
    config = RANDOM_LLAMA if folder is None else load_config(folder)
    longest = max(contexts)
    if longest + new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"contexts has {longest}, which with {new_tokens} new tokens is more than the model's "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    return config


def load_model(folder: Path | None) -> Llama:
    if folder is None:
        return Llama(RANDOM_LLAMA, rngs=nnx.Rngs(0))
    return Llama.from_pretrained(folder)


def last_heads_stream(config: LlamaConfig, sparsity: float) -> Bool[np.ndarray, "layers kv_heads"]:
    """True for the last heads of each layer, a fraction ``sparsity`` of them.

    False for all heads of a layer with its own sliding window: it streams anyway, by that window.
    """
    kv_heads = config.num_key_value_heads
    streams = np.arange(kv_heads) >= kv_heads - round(sparsity * kv_heads)
    free = np.array([window is None for window in config.sliding_windows])
    return free[:, None] & streams
