"""What the benchmarks of serving share: rows of results, checks of settings, the model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool

from jsparse.evaluate.speed.turns import Timing
from jsparse.integers import is_integer
from jsparse.models import Llama, LlamaConfig, load_config
from jsparse.reports.console import write_json
from jsparse.reports.machine import describe_machine
from jsparse.serve.config import Policy
from jsparse.serve.loop import ModelShape

RESULTS = "results.json"

# What is measured where no checkpoint is given: 32.5 million parameters, small enough for the cache to count.
RANDOM_LLAMA = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1 << 20,
)


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One policy at one context. Times are milliseconds per token of every row of the batch.

    - decode: whole decode steps, as ``generate`` runs them. ``ratio_to_dense`` is their ratio to those of
      "dense", round by round; None where that was not measured.
    - attention: appending to the cache, choosing pages and attending, in all layers, without the model.
    - selector: choosing pages, in the layers that do. The time of a choice is divided by the tokens that use
      it. None where nothing is chosen.
    - reading: retrieval heads attending to the chosen pages, in the same layers; where nothing is chosen, to
      all pages in all layers. None without retrieval heads.
    - cache_bytes, cache_bytes_per_token: of the whole cache, and per token of its capacity.
    - step_bytes: what a step reads of it, by arithmetic.
    """

    context: int
    policy: Policy
    decode: Timing
    ratio_to_dense: float | None
    attention: Timing
    selector: Timing | None
    reading: Timing | None
    selector_to_reading: float | None
    cache_bytes: int
    cache_bytes_per_token: float
    step_bytes: int


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """One variant at one context: ``seconds`` to the first token, and how they compare with "dense"."""

    context: int
    variant: str
    seconds: Timing
    ratio_to_dense: float | None
    cache_bytes: int


def check_list(name: str, values: tuple, minimum: int | None = None) -> None:
    """Raise ValueError for no entry, for a repeated one, and for integers below ``minimum``."""
    if not values:
        raise ValueError(f"{name} must have at least one entry, not {values!r}")
    for value in values:
        if minimum is not None and (not is_integer(value) or value < minimum):
            raise ValueError(f"{name} must be integers >= {minimum}, not {value!r}")
        if values.count(value) > 1:
            raise ValueError(f"{name} has {value!r} more than once; an entry is measured once")


def check_integers(config: Any, **most: int | None) -> None:
    """Raise ValueError where a field is not an integer from 1 to the maximum given for it."""
    for name, limit in most.items():
        value = getattr(config, name)
        if not is_integer(value) or value < 1 or (limit is not None and value > limit):
            allowed = ">= 1" if limit is None else f"from 1 to {limit}"
            raise ValueError(f"{name} must be an integer {allowed}, not {value!r}")


def check_sparsity(sparsity: float) -> None:
    if isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a number from 0 to 1, not {sparsity!r}")


def model_config(folder: Path | None, contexts: tuple[int, ...], new_tokens: int) -> LlamaConfig:
    """The configuration of a checkpoint, or of the random model; no weights.

    Raises ValueError where a context and ``new_tokens`` after it exceed the model's positions.
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


def shape_of(model: Llama) -> ModelShape:
    return ModelShape.of(model.config, model.embed_tokens.embedding[...].dtype)


def last_heads_stream(config: LlamaConfig, sparsity: float) -> Bool[np.ndarray, "layers kv_heads"]:
    """True for that fraction of the heads of each layer, its last ones; False where the layer has a window.

    A layer with its own sliding window streams anyway, by that window.
    """
    kv_heads = config.num_key_value_heads
    streams = np.arange(kv_heads) >= kv_heads - round(sparsity * kv_heads)
    free = np.array([window is None for window in config.sliding_windows])
    return free[:, None] & streams


def describe_model(folder: Path | None, model: Llama) -> dict[str, Any]:
    config = model.config
    return {
        "name": "Llama with random weights" if folder is None else folder.name,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "dtype": shape_of(model).dtype.name,
        "layers": config.num_hidden_layers,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def write_results(config: Any, kind: str, model: dict[str, Any], **tables: Sequence[Any]) -> None:
    """Write settings, model, machine and the rows of each table, which are dataclasses, as JSON."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
    results = {
        "command": f"jsparse bench {kind}",
        "settings": settings,
        "model": model,
        "machine": describe_machine(),
    }
    results |= {name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}
    write_json(config.output / RESULTS, results)
