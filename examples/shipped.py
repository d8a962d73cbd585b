"""What the shipped model shows in a minute or two on a CPU, with nothing trained and nothing downloaded.

Perplexity on held-out modules of the standard library, text and logits from a dense and from sparse caches,
and which caches still find what was said far back. Every number is measured in the run.
"""

import dataclasses
import time

import numpy as np
from rich.console import Console

import jsparse
from jsparse.evaluate import ScoreboardConfig, run_scoreboard
from jsparse.evaluate.methods import PAGE, SINK
from jsparse.evaluate.scoreboard import make_entries, streaming_heads
from jsparse.examples.demo import (
    RESULTS,
    measure_generation,
    pieces,
    prepare_output,
)
from jsparse.examples.report import check_can_draw, draw_plot, print_shipped
from jsparse.examples.settings import ShippedDemoConfig as ShippedDemoConfig
from jsparse.hub import pinned_model
from jsparse.integers import cdiv
from jsparse.models import Llama, load_config, load_tokenizer
from jsparse.models.end_token import end_token
from jsparse.models.positions import positions_of
from jsparse.reports.console import write_json
from jsparse.reports.machine import describe_machine
from jsparse.texts.corpus import standard_library_files
from jsparse.train import perplexity_by_context, read_documents, shifted_head_masks

METHODS = ("dense", "streaming", "lserve", "lserve-heads")  # of the scoreboard
TASKS = ("needle", "recall")


def run_shipped_demo(config: ShippedDemoConfig) -> dict:
    """Measure, print the tables, and return every number (``demo.json`` in the output folder, if any)."""
    config = dataclasses.replace(config, model=pinned_model(config.model))
    llama = load_config(config.model)
    length = positions_of(llama).certain
    if config.prompt_tokens + config.new_tokens > length:
        raise ValueError(
            f"prompt_tokens={config.prompt_tokens} and new_tokens={config.new_tokens} do not fit the "
            f"model's {length} positions"
        )
    if config.evaluation_tokens < length:
        raise ValueError(
            f"evaluation_tokens={config.evaluation_tokens} must be at least {length}, "
            "one window of all the model's positions"
        )
    scoreboard = ScoreboardConfig(
        model=config.model,
        tasks=TASKS,
        methods=METHODS,
        budgets=(config.budget / length,),
        samples=config.samples,
        seeds=1,
        batch_size=config.samples,
        grid_methods=(),
    )
    if config.output is not None:
        check_can_draw()
        prepare_output(config.output)
    console, started = Console(stderr=True), time.perf_counter()
    _, held_out_files = standard_library_files()
    model = Llama.from_pretrained(config.model, dtype=config.dtype)
    tokenizer = load_tokenizer(config.model)
    end = end_token(config.model, tokenizer, llama)
    documents = read_documents(held_out_files, tokenizer, eos_token_id=end, vocab_size=llama.vocab_size)

    console.rule("1/3 perplexity on held-out modules")
    contexts = [length // 4, length // 2, length]
    text = pieces(documents, 2 * length, config.evaluation_tokens)
    perplexity = measure_perplexity(config, model, contexts, text)
    console.rule(f"2/3 generate after {config.prompt_tokens} tokens, from a dense and from sparse caches")
    entries = make_entries(METHODS, [config.budget], streaming_heads(scoreboard))
    capacity = cdiv(config.prompt_tokens + config.new_tokens, PAGE) * PAGE
    caches = {name: dataclasses.replace(cache, capacity=capacity) for (name, _), cache in entries.items()}
    generation = measure_generation(
        model, tokenizer, documents, caches, config.prompt_tokens, config.new_tokens
    )
    console.rule(f"3/3 what was said once in {length} tokens")
    recall = run_scoreboard(scoreboard)

    results = {
        "settings": dataclasses.asdict(config)
        | {"model": str(config.model), "output": None if config.output is None else str(config.output)},
        "machine": describe_machine(),
        "held_out_files": [file.name for file in held_out_files],
        "contexts": contexts,
        "perplexity": perplexity,
        "generation": generation,
        "recall": recall,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print_shipped(results)
    if config.output is not None:
        write_json(config.output / RESULTS, results)
        draw_plot(results, config.output / "demo.png", "perplexity per token, held-out modules")
    return results


def measure_perplexity(
    config: ShippedDemoConfig, model: Llama, contexts: list[int], tokens: np.ndarray
) -> dict[str, list[float]]:
    """Perplexity of the same tokens at every context length, with all of attention and with parts of it."""
    heads, window = model.config.num_attention_heads, config.budget - SINK
    rows = {
        "full": lambda context: None,
        f"streaming: sink {SINK}, window {window}": lambda _: jsparse.streaming(sink=SINK, window=window),
        "shifted groups of a quarter": lambda context: shifted_head_masks(heads, context // 4),
    }
    return {
        name: [
            result.perplexity
            for result in perplexity_by_context(model, tokens, contexts, mask_for=mask_for, batch_size=2)
        ]
        for name, mask_for in rows.items()
    }
