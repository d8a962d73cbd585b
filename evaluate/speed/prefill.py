"""``jsparse bench prefill``: the time from a prompt to its first token, for each way to compute it."""

import functools
import sys

import numpy as np

from jsparse.checks import require_new_folder
from jsparse.evaluate.speed.options import PrefillBench as PrefillBench
from jsparse.evaluate.speed.options import Variant
from jsparse.evaluate.speed.report import print_prefill
from jsparse.evaluate.speed.results import PrefillRow, describe_model, write_results
from jsparse.evaluate.speed.settings import load_model, model_config
from jsparse.evaluate.speed.turns import in_turns, milliseconds
from jsparse.models import Llama
from jsparse.reports.machine import describe_machine
from jsparse.serve.batch import Batch
from jsparse.serve.layout import CacheLayout
from jsparse.serve.request import check_requests
from jsparse.serve.sampling import SamplingParams


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
    model = load_model(config.model, config.dtype)
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
