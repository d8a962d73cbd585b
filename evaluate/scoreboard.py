"""``jsparse evaluate scoreboard``: every method on every task at every budget, on the same texts."""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jsparse.evaluate.answers import Question, greedy_answers
from jsparse.evaluate.methods import METHODS, PAGE, Heads
from jsparse.evaluate.scoreboard_config import ScoreboardConfig as ScoreboardConfig
from jsparse.evaluate.scoreboard_report import GRID, Row, check_can_draw, write_figures
from jsparse.hub import model_folder, pinned_model
from jsparse.masks.head_pattern import PATTERN_FILE, HeadPattern
from jsparse.models import (
    Llama,
    load_config,
    load_tokenizer,
    plain_text_tokenizer,
    text_encoder,
)
from jsparse.models.positions import describe, note_length, positions_of
from jsparse.models.shipped import shipped_model
from jsparse.reports.console import check_can_write, write_json
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import layout_of
from jsparse.texts.corpus import standard_library_files
from jsparse.texts.tasks import TASKS, Example, Material, needle, score
from jsparse.texts.tokenizer import prompt_ids

Entries = dict[tuple[str, int | None], CacheConfig]  # by method and budget


def run_scoreboard(config: ScoreboardConfig) -> list[Row]:
    """The scores of each task by each method at each of its budgets, then those of the needle grid.

    Each row is a dictionary with ``model`` (with the commit of an id), ``task``, ``method``, ``budget``
    (tokens, None where the method has none), ``length``, ``score``, ``low``, ``high``, ``samples`` and
    ``seed_scores`` (of each seed alone); ``task`` is "needle_grid" in the rows of the grid, which also have a
    ``depth``. The files that ``config`` names are written.

    Raises, before weights are read, ValueError or OSError where settings do not fit one another or the model;
    FloatingPointError where logits are not finite.
    """
    check_can_write(config.json, "json")
    if config.output is not None:
        check_can_draw(config.output)
    config = dataclasses.replace(config, model=pinned_model(config.model))
    of_model: Row = {"model": _model_name(config.model)}
    llama, tokenizer = load_config(config.model), plain_text_tokenizer(load_tokenizer(config.model))
    length = config.length or positions_of(llama).certain
    if not 0 < length <= positions_of(llama).most:
        raise ValueError(f"length={length} must be from 1 to the model's {describe(llama)}")
    note_length(llama, length)
    material = read_material(tokenizer, config.haystack or standard_library_files()[1], llama.vocab_size)
    streams = streaming_heads(config)
    entries = make_entries(config.methods, token_budgets(config.budgets, length), streams)
    on_grid = {}
    if config.grid_methods:
        on_grid = make_entries(config.grid_methods, token_budgets([config.grid_budget], length), streams)
    # One capacity for every length, so the grid compiles nothing again.
    capacity = -(-length // PAGE) * PAGE
    for of in (entries, on_grid):
        for key, cache in of.items():
            of[key] = dataclasses.replace(cache, capacity=capacity)
            layout_of(dataclasses.replace(of[key], batch=1), llama)  # raises where it does not fit the model
    texts = {task: task_examples(config, material, task, length) for task in config.tasks}
    grid = grid_examples(config, material, length) if on_grid else {}

    model = Llama.from_pretrained(config.model, dtype=config.dtype)
    rows: list[Row] = []
    for task, examples in texts.items():
        started = time.perf_counter()
        for (method, budget), scores in _scores(config, model, tokenizer, examples, entries).items():
            by_seed = np.reshape(scores, (config.seeds, config.samples)).mean(axis=1).tolist()
            rows.append(of_model | _row(task, method, budget, length, scores) | {"seed_scores": by_seed})
        _done(config, rows, f"{task} at {length} tokens", started)
    for grid_length, by_depth in grid.items():
        started = time.perf_counter()
        examples = [example for depth in config.depths for example in by_depth[depth]]
        for (method, budget), scores in _scores(config, model, tokenizer, examples, on_grid).items():
            cells = np.reshape(scores, (len(config.depths), config.grid_samples))
            for depth, cell in zip(config.depths, cells, strict=True):
                row = of_model | _row(GRID, method, budget, grid_length, cell)
                rows.append(row | {"seed_scores": [row["score"]], "depth": depth})
        _done(config, rows, f"needle grid at {grid_length} tokens", started)
    if str(config.json) == "-":
        write_json(Path("-"), rows)
    if config.output is not None:
        write_figures(rows, config.output)
    return rows


def _model_name(model: str | Path) -> str:
    """The name that a model has in the rows: nothing of this machine for the one in the package."""
    return "the shipped model" if Path(model) == shipped_model() else str(model)


def _scores(
    config: ScoreboardConfig,
    model: Llama,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    entries: Entries,
) -> dict[tuple[str, int | None], list[float]]:
    """The score of each example under each cache."""
    questions = [Question(e.context, e.tail, len(e.answer)) for e in examples]
    answers = greedy_answers(model, questions, list(entries.values()), batch_size=config.batch_size)
    return {
        key: [
            score(tokenizer.decode(tokens), example.expected)
            for tokens, example in zip(of_cache, examples, strict=True)
        ]
        for key, of_cache in zip(entries, answers, strict=True)
    }


def _row(task: str, method: str, budget: int | None, length: int, scores: Sequence | np.ndarray) -> Row:
    mean, samples = float(np.mean(scores)), len(scores)
    low, high = wilson_interval(mean, samples)
    where = {"task": task, "method": method, "budget": budget, "length": length}
    return where | {"score": mean, "low": low, "high": high, "samples": samples}


def wilson_interval(mean: float, samples: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % of a mean of ``samples`` scores that are 0 or 1.

    It stays within [0, 1], and has a width at 0 and 1 too. Scores between the two, as with several expected
    words, have a smaller variance than assumed, and the interval is then wider than necessary.

    Source: Wilson 1927.

    >>> [round(end, 3) for end in wilson_interval(1.0, 48)]
    [0.926, 1.0]
    """
    z = 1.959964
    centre = (mean + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(mean * (1 - mean) / samples + z * z / (4 * samples**2))
    # An end at 0 or 1 is the mean itself, and rounding must not put it on the wrong side.
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def _done(config: ScoreboardConfig, rows: list[Row], what: str, started: float) -> None:
    """Report it on stderr, and write the rows so far."""
    print(f"{what}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if config.json is not None and str(config.json) != "-":
        write_json(config.json, rows)


# --- what is compared ---


def token_budgets(fractions: Sequence[float], length: int) -> list[int]:
    """The fractions of a length in tokens, in whole pages of 64.

    Raises ValueError where one is less than two pages, or two are the same number.

    >>> token_budgets([1 / 16, 1 / 8], 2048)
    [128, 256]
    """
    budgets: dict[int, float] = {}
    for fraction in fractions:
        tokens = round(fraction * length / PAGE) * PAGE
        if tokens < 2 * PAGE:
            raise ValueError(
                f"budgets: {fraction:g} of length={length} is {tokens} tokens in pages of {PAGE}; "
                f"a budget must be at least {2 * PAGE}"
            )
        if tokens in budgets:
            raise ValueError(
                f"budgets: {budgets[tokens]:g} and {fraction:g} of length={length} are both {tokens} tokens "
                f"in pages of {PAGE}"
            )
        budgets[tokens] = fraction
    return list(budgets)


def make_entries(methods: Sequence[str], budgets: Sequence[int], streams: Heads | None) -> Entries:
    """The cache of each method at each of its budgets; without ``streams``, except those that need it.

    >>> list(make_entries(["dense", "right-heads", "lserve"], [128, 256], None))
    [('dense', None), ('lserve', 128), ('lserve', 256)]
    """
    return {
        (name, budget): METHODS[name].cache(budget, streams)
        for name in methods
        if streams is not None or not METHODS[name].needs_pattern
        for budget in (budgets if METHODS[name].budgeted else [None])
    }


def streaming_heads(config: ScoreboardConfig) -> Heads | None:
    """The half of the KV heads that stream by the pattern. Without one None, reported on stderr."""
    file = config.pattern or model_folder(config.model) / PATTERN_FILE
    if config.pattern is None and not file.is_file():
        asked = dict.fromkeys((*config.methods, *config.grid_methods))
        left_out = [name for name in asked if METHODS[name].needs_pattern]
        if left_out:
            print(f"no --pattern, and no {file}: {', '.join(left_out)} left out", file=sys.stderr)
        return None
    return HeadPattern.load(file).threshold(0.5)


# --- texts ---


def task_examples(config: ScoreboardConfig, material: Material, task: str, length: int) -> list[Example]:
    """``samples`` of each seed. They depend on task, seed and length alone, not on what else is measured."""
    number = list(TASKS).index(task)
    return [
        TASKS[task](material, length, np.random.default_rng([config.seed + seed, number, length, sample]))
        for seed in range(config.seeds)
        for sample in range(config.samples)
    ]


def grid_examples(
    config: ScoreboardConfig, material: Material, length: int
) -> Mapping[int, Mapping[float, list[Example]]]:
    """Needles by length and depth; a sample at two depths differs in the depth alone."""
    lengths = config.grid_lengths or tuple(dict.fromkeys((length // 4, length // 2, length)))
    for one in lengths:
        if not 0 < one <= length:
            raise ValueError(f"grid_lengths must be from 1 to length={length}, not {one}")
    number = len(TASKS)  # the number of no task
    return {
        one: {
            depth: [
                needle(material, one, np.random.default_rng([config.seed, number, one, sample]), depth)
                for sample in range(config.grid_samples)
            ]
            for depth in config.depths
        }
        for one in lengths
    }


def read_material(tokenizer: Tokenizer, files: Sequence[Path], vocab_size: int) -> Material:
    """What tasks are made of, in a model's tokens. Raises ValueError for ids beyond its vocabulary."""

    encode = text_encoder(tokenizer, vocab_size)

    def read(file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"haystack: {file} is not UTF-8 text: {error}") from error

    haystack = np.array([token for file in files for token in encode(read(file))], np.int32)
    return Material(encode, haystack, tuple(prompt_ids(tokenizer, "")))
