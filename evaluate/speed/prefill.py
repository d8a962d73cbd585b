"""``jsparse bench prefill``: the time from a prompt to its first token, for each way to compute it."""

import dataclasses
import functools
import sys
from typing import Any, Literal, get_args

import numpy as np

from jsparse.checks import require_new_folder
from jsparse.evaluate.speed.report import print_prefill
from jsparse.evaluate.speed.results import PrefillRow, describe_model, write_results
from jsparse.evaluate.speed.settings import (
    ServingBench,
    check_integers,
    check_list,
    last_heads_stream,
    load_model,
    model_config,
)
from jsparse.evaluate.speed.turns import in_turns, milliseconds
from jsparse.integers import cdiv
from jsparse.masks.pooled import PooledBlocks
from jsparse.masks.vertical_slash import VerticalSlash
from jsparse.models import Llama, LlamaConfig
from jsparse.reports.machine import describe_machine
from jsparse.serve.batch import Batch
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import CacheLayout, layout_of
from jsparse.serve.request import check_requests
from jsparse.serve.sampling import SamplingParams

Variant = Literal["dense", "streaming", "pooled", "vertical-slash"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_PAGE = 64


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
        heads = last_heads_stream(model, self.sparsity) if variant == "streaming" else None
        capacity = cdiv(context + 1, _PAGE) * _PAGE
        return layout_of(self.cache(variant, capacity=capacity, streaming_heads=heads), model)


def bench_prefill(config: PrefillBench) -> list[PrefillRow]:
    """Measure, print a table, and write results.json (after each context).

    Raises, before weights are read, ValueError or OSError for settings that do not fit one another or the
    model, and for an output folder that is not empty; FloatingPointError for logits that are not finite.
    """
    require_new_folder(config.output)
    llama = model_config(config.model, config.contexts, 1)
    layouts: dict[int, dict[Variant, CacheLayout]] = {
        context: {variant: config.layout(llama, variant, context) for variant in config.variants}
        for context in config.contexts
    }
    config.output.mkdir(parents=True, exist_ok=True)
    model = load_model(config.model)
    about = describe_model(config.model, model)
    rows: list[PrefillRow] = []
    for context, of_variant in layouts.items():
        rows += _measure(config, model, context, of_variant)
        write_results(config, "prefill", about, rows=rows)
        times = ", ".join(f"{row.variant} {row.seconds.median:.2f}" for row in rows if row.context == context)
        print(f"context {context}, seconds: {times}", file=sys.stderr)
    print_prefill(rows, about, describe_machine())
    return rows


def _measure(
    config: PrefillBench, model: Llama, context: int, layouts: dict[Variant, CacheLayout]
) -> list[PrefillRow]:
    batches = {variant: Batch(model, layout) for variant, layout in layouts.items()}
    tokens = np.random.default_rng(config.seed).integers(0, model.config.vocab_size, context)
    for batch in batches.values():
        seconds_to_first_token(batch, tokens[:1])  # compiles: the same functions, whatever the length
    calls = {v: functools.partial(seconds_to_first_token, batch, tokens) for v, batch in batches.items()}
    times = in_turns(calls, config.repeats, uncounted=0)
    return [
        PrefillRow(
            context=context,
            variant=variant,
            seconds=times[variant],
            ratio_to_dense=times[variant].ratio_to(times["dense"]) if "dense" in times else None,
            cache_bytes=batch.cache_bytes,
        )
        for variant, batch in batches.items()
    ]


def seconds_to_first_token(batch: Batch, tokens: np.ndarray) -> float:
    """How long a prompt takes. It ends with its first token, so its row and pages are free again."""
    greedy = SamplingParams(ignore_eos=True)
    requests = check_requests(batch.config, [tokens], 1, greedy, seed=0)
    time, (event,) = milliseconds(lambda: batch.add(requests))
    if event.token is None:
        raise FloatingPointError(f"the logits after {len(tokens)} tokens are not finite")
    return time / 1e3
