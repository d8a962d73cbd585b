"""What the serving benchmarks found: the rows of their tables, and the file that holds them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jsparse.evaluate.speed.turns import Timing
from jsparse.models import Llama
from jsparse.reports.console import write_json
from jsparse.reports.machine import describe_machine
from jsparse.serve.config import Policy

RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One policy at one context. Times are milliseconds per token of every row of the batch.

    - decode: whole decode steps, as ``generate`` runs them.
    - ratio_to_dense: of their times to those of "dense", round by round; None if that was not measured.
    - attention: appending to the cache, choosing pages and attending, in all layers, without the model.
    - selector: choosing pages, in the layers that do. The time of a choice is divided by the tokens that use
      it. None if nothing is chosen.
    - reading: retrieval heads attending to the chosen pages, in the same layers; if nothing is chosen, to
      all pages in all layers. None without retrieval heads.
    - selector_to_reading: the ratio of these two, round by round.
    - cache_bytes, cache_bytes_per_token: of the whole cache, and per token of its capacity.
    - step_bytes: what a step reads of the cache, by arithmetic.
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


def describe_model(folder: str | Path | None, model: Llama) -> dict[str, Any]:
    config = model.config
    return {
        "name": "Llama with random weights" if folder is None else Path(folder).name,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "dtype": model.embed_tokens.embedding[...].dtype.name,
        "layers": config.num_hidden_layers,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def write_results(config: Any, kind: str, model: dict[str, Any], **tables: Sequence[Any]) -> None:
    """Write settings, model, machine, and the rows of each table (dataclasses) as JSON."""
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
