"""A small model extended from 256 to 2048 tokens: what the attention of the training costs in perplexity.

    python benchmarks/training/extension.py --output benchmarks/results/cpu-extension

LongLoRA's comparison (arXiv 2309.12307, tables 1 and 2) in miniature. A byte-level Llama is trained at the
short context, its RoPE is extended, and then it is trained at the long one with full attention, with shifted
groups of a quarter of the context (S²-Attn), and with the same groups without the shift ("short attention");
data, order, seed, steps and everything else are equal.

The text is made so that a small model can learn it, and the best perplexity with and without context can be
worked out. It is random letters in rows of 64, where four in five repeat the letter above. A letter is known
as well as it can be once the row above is seen; where a group begins, that row is not seen.

Perplexity is per byte, on documents that were held out; with ``--held-out dev``, on the documents that the
settings were chosen on. Every model is measured with full attention, as it would be served, and with the
pattern that it was trained with.

By default RoPE is extended as in Llama 3, which leaves wavelengths below a quarter of the short context as
they are: 3 of the model's 8. The other methods leave one or none, and the model has to learn distances again.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from jsparse.checks import require_new_folder
from jsparse.evaluate.speed.results import RESULTS
from jsparse.evaluate.speed.settings import check_integers, check_list
from jsparse.examples.demo import END_OF_TEXT, DemoConfig, train_base
from jsparse.models import Llama, load_tokenizer
from jsparse.models.patterns import AttentionPattern, load_pattern
from jsparse.reports.console import short_count, write_json
from jsparse.reports.figures import COLORS, can_draw, length_axis, new_figure, save, tidy
from jsparse.reports.machine import describe_machine, machine_line
from jsparse.train import FinetuneConfig, evaluate_perplexity, finetune, read_documents

KINDS = ("full", "shifted", "grouped")
FIGURE, TEXT = "extension.png", "train.jsonl"
_SEEDS = {"train": 1, "dev": 2, "test": 3}  # of the text
_LETTERS = np.array(list(string.ascii_letters))
_REPEATED = 0.8  # probability that a letter is the one above
_COLORS = {"full": COLORS["black"], "shifted": COLORS["blue"], "grouped": COLORS["vermilion"]}
_NAMES = {"full": "full attention", "shifted": "shifted groups", "grouped": "groups without the shift"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionBench:
    """The settings of the experiment. The defaults take about ten minutes on two CPU cores."""

    output: Path
    """A new folder for results.json and extension.png."""
    models: Path | None = None
    """A new folder to keep the models and their text in; by default they are thrown away."""
    held_out: Literal["test", "dev"] = "test"
    """Documents to measure on: those that are reported ("test"), or others, to choose settings with."""
    hidden_size: int = 64
    """Width of the model, which has 4 heads on 2 KV heads."""
    layers: int = 2
    """Transformer layers."""
    context: int = 256
    """Tokens the base model is trained at."""
    growth: int = 8
    """How many times longer the context becomes."""
    row: int = 64
    """Letters per row of the text: how far back the letter above is."""
    base_steps: int = 600
    """Training steps of the base model."""
    base_batch: int = 16
    """Windows per training step of the base model."""
    rope: str = "llama3"
    """How RoPE is extended: linear, ntk, yarn or llama3."""
    group_ratio: float = 0.25
    """Fraction of the long context that a group takes."""
    steps: int = 150
    """Training steps at the long context."""
    batch_size: int = 4
    """Windows per training step at the long context."""
    learning_rate: float = 1e-3
    """Learning rate at the long context, after a warm-up of 10 steps; it falls to a tenth along a cosine."""
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the order of windows at the long context: every kind of attention is trained with each."""
    documents: int = 1500
    """Documents to train on, each as long as the long context."""
    held_out_documents: int = 24
    """Documents that perplexity is measured on."""

    def __post_init__(self):
        for name in ("output", "models"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        check_list("seeds", self.seeds, minimum=0)
        check_integers(self, base_batch=None, growth=None, steps=None, batch_size=None, row=None)
        check_integers(self, documents=None, held_out_documents=None)
        if self.growth < 2:
            raise ValueError(f"growth={self.growth} must be at least 2: else nothing is extended")
        if self.row > self.context // 2:
            raise ValueError(
                f"row={self.row} must be at most half of context={self.context}: else too little of "
                "the base's windows repeats for it to learn the rule"
            )
        self.base(self.output)
        for kind in KINDS:
            self.extension(self.output, kind, self.seeds[0])

    @property
    def long_context(self) -> int:
        return self.context * self.growth

    @property
    def group(self) -> int | None:
        """Tokens of a group at the long context."""
        return self.extension(self.output, "shifted", self.seeds[0]).groups

    @property
    def contexts(self) -> list[int]:
        """Where perplexity is measured: the short context, doubled until the long one."""
        return self.base(self.output).contexts

    def base(self, models: Path) -> DemoConfig:
        """The base model is trained as in the demo."""
        return DemoConfig(
            output=models,
            hidden_size=self.hidden_size,
            layers=self.layers,
            context=self.context,
            growth=self.growth,
            base_steps=self.base_steps,
            batch_tokens=self.base_batch * self.context,
            prompt_tokens=1,  # nothing is generated
            new_tokens=1,
        )

    def extension(self, models: Path, kind: str, seed: int) -> FinetuneConfig:
        """One run at the long context. Runs of one seed differ only in ``kind``."""
        groups: dict[str, Any] = {} if kind == "full" else {"group_ratio": self.group_ratio}
        return FinetuneConfig(
            model=models / "base",
            data=[models / TEXT],
            output=models / f"{kind}-{seed}",
            context=self.long_context,
            rope=self.rope,
            attention=kind,
            lora_rank=None,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="cosine",
            warmup_steps=min(10, self.steps - 1),
            checkpoint_every=self.steps,
            seed=seed,
            **groups,
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """Perplexity of one model at each context.

    - ``model``: "base", "extended" (the base with its RoPE extended, not trained) or what attention it was
      trained with at the long context; ``seed`` of that training.
    - ``measured_with``: "full" attention, or the "pattern" of the training.
    - ``training_loss``: the mean of the last tenth of the steps, in nats.
    """

    model: str
    measured_with: str
    seed: int | None
    perplexity: tuple[float, ...]
    training_loss: float | None = None


def main(arguments: list[str] | None = None) -> None:
    bench_extension(tyro.cli(ExtensionBench, description=__doc__, args=arguments))


def bench_extension(config: ExtensionBench) -> list[Row]:
    """Trains and measures, prints a table in Markdown, and writes results.json after each model and then the
    figure.

    Raises FileExistsError for a folder with something in it, before anything is trained.
    """
    require_new_folder(config.output)
    with contextlib.ExitStack() as stack:
        if config.models is None:
            models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            require_new_folder(config.models)
            models = config.models
        for folder in (config.output, models):
            folder.mkdir(parents=True, exist_ok=True)
        rows = train_and_measure(config, models)
    print(markdown(config, rows))
    if can_draw(FIGURE):
        draw(config, rows, config.output / FIGURE)
    return rows


# Text --------------------------------------------------------------------------------------------------


def make_documents(config: ExtensionBench, count: int, which: str) -> Iterator[str]:
    """Documents that fill a window of the long context each, together with the token that ends them.

    Rows of ``config.row`` letters, without breaks. The first is random; below, a letter is the one above with
    probability 4 / 5, and else random.
    """
    rng = np.random.default_rng(_SEEDS[which])
    length = config.long_context - 1
    for _ in range(count):
        rows = rng.integers(0, len(_LETTERS), (-(-length // config.row), config.row))
        repeated = rng.random(rows.shape) < _REPEATED
        for above, row, same in zip(rows, rows[1:], repeated[1:], strict=False):
            row[same] = above[same]
        yield "".join(_LETTERS[rows.ravel()[:length]])


def expected_perplexity(config: ExtensionBench, context: int, group: int | None = None) -> float:
    """The perplexity of a model that knows how the text is made and sees the whole window, or its own group.

    It cannot know what stands above its first row: the letters of that row cost log 52 nats, and those below
    it ``-p log p - (1 - p) log((1 - p) / 51)`` with p = 4 / 5 + 1 / 5 / 52.

    >>> config = ExtensionBench(output=Path("unused"))
    >>> round(expected_perplexity(config, 2048), 2), round(expected_perplexity(config, 2048, group=512), 2)
    (3.85, 4.94)
    """
    n = len(_LETTERS)
    right = _REPEATED + (1 - _REPEATED) / n
    below = -right * math.log(right) - (1 - right) * math.log((1 - right) / (n - 1))
    groups = -(-context // (group or context))
    unknown = groups * (config.row - 1) / (context - 1)  # a query sees itself, and predicts the next letter
    return math.exp(unknown * math.log(n) + (1 - unknown) * below)


def write_documents(path: Path, documents: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


# Training and measuring --------------------------------------------------------------------------------


def train_and_measure(config: ExtensionBench, models: Path) -> list[Row]:
    """All rows; results.json is written after each model that is trained."""
    started = time.perf_counter()
    write_documents(models / TEXT, make_documents(config, config.documents, "train"))
    held_out = models / f"{config.held_out}.jsonl"
    write_documents(held_out, make_documents(config, config.held_out_documents, config.held_out))
    base = train_base(config.base(models), (models / TEXT,))
    tokenizer = load_tokenizer(base)
    tokens = np.concatenate(
        read_documents([held_out], tokenizer, eos_token_id=END_OF_TEXT, vocab_size=END_OF_TEXT + 1)
    )
    rows = measure_untrained(config, base, tokens)
    for seed in config.seeds:
        for kind in KINDS:
            rows += extend_and_measure(config, models, kind, seed, tokens)
            write(config, rows, time.perf_counter() - started)
            print(f"{kind}, seed {seed}: {rows[-1].perplexity[-1]:.3f}", file=sys.stderr)
    return rows


def measure_untrained(config: ExtensionBench, base: Path, tokens: np.ndarray) -> list[Row]:
    """The base model as it is, and with its RoPE extended to the long context."""
    as_it_is, extended = (Llama.from_pretrained(base) for _ in range(2))
    extended.config = extended.config.extend_context(config.long_context, config.rope)
    models = {"base": as_it_is, "extended": extended}
    return [Row(name, "full", None, perplexities(config, model, tokens)) for name, model in models.items()]


def extend_and_measure(
    config: ExtensionBench, models: Path, kind: str, seed: int, tokens: np.ndarray
) -> list[Row]:
    """The row, or both rows, of a model that is trained at the long context."""
    result = finetune(config.extension(models, kind, seed))
    loss = statistics.fmean(result.losses[-max(1, config.steps // 10) :])
    model, pattern = Llama.from_pretrained(result.output), load_pattern(result.output)
    rows = [Row(kind, "full", seed, perplexities(config, model, tokens), loss)]
    if kind != "full":
        rows.append(Row(kind, "pattern", seed, perplexities(config, model, tokens, pattern), loss))
    return rows


def perplexities(
    config: ExtensionBench, model: Llama, tokens: np.ndarray, pattern: AttentionPattern | None = None
) -> tuple[float, ...]:
    """Perplexity at each context, with full attention or with a pattern, whose groups keep their size.

    Windows lie side by side and all of their tokens are scored. At the long context each window is a
    document, and groups begin and end in it as in training.
    """
    # Rules, not pattern.masks: those are for lengths that the group size divides.
    mask: Any = None if pattern is None else pattern.layers
    return tuple(
        evaluate_perplexity(
            model, tokens, context=n, stride=n, scoring="all", mask=mask, batch_size=4, progress=False
        ).perplexity
        for n in config.contexts
    )


# Reporting ---------------------------------------------------------------------------------------------


def over_seeds(rows: Sequence[Row]) -> dict[tuple[str, str], np.ndarray]:
    """Perplexities [seeds, contexts] of each model and way to measure it.

    >>> rows = [Row("full", "full", seed, (4.0 + seed, 3.0)) for seed in (0, 1)]
    >>> over_seeds(rows)["full", "full"].mean(axis=0).tolist()
    [4.5, 3.0]
    """
    found: dict[tuple[str, str], list] = {}
    for row in rows:
        found.setdefault((row.model, row.measured_with), []).append(row.perplexity)
    return {key: np.array(values) for key, values in found.items()}


def title(model: str, measured_with: str) -> str:
    """What a line of the table or the figure shows.

    >>> title("shifted", "pattern")
    'shifted groups, measured with the same'
    """
    if model == "base":
        return "base, as it is"
    if model == "extended":
        return "base, RoPE extended, no training"
    how = "the same" if measured_with == "pattern" or model == "full" else "full attention"
    return f"{_NAMES[model]}, measured with {how}"


def markdown(config: ExtensionBench, rows: Sequence[Row]) -> str:
    """A table with a line for each model and way to measure it: means, and at the last context the range.
    Below: what can be expected of a model that knows how the text is made.
    """
    lines = [
        f"| perplexity per byte, window: | {' | '.join(map(short_count, config.contexts))} |",
        "|---" * (1 + len(config.contexts)) + "|",
    ]
    for (model, measured_with), values in over_seeds(rows).items():
        cells = [f"{value:.3f}" for value in values.mean(axis=0)]
        if len(values) > 1:
            cells[-1] += f" ({values[:, -1].min():.3f}–{values[:, -1].max():.3f})"
        lines.append(f"| {title(model, measured_with)} | {' | '.join(cells)} |")
    for sees, group in (("its window", None), ("its group", config.group)):
        cells = [f"{expected_perplexity(config, context, group):.3f}" for context in config.contexts]
        lines.append(f"| *expected by one that knows the rule and sees {sees}* | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(config: ExtensionBench, rows: Sequence[Row], seconds: float) -> None:
    """Writes results.json: how and on what it was measured, and all rows so far."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
    results: dict[str, Any] = {
        "command": f"python benchmarks/training/extension.py --output {config.output}",
        "settings": settings,
        "contexts": config.contexts,
        "group_size": config.group,
        "machine": describe_machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": round(seconds, 1),
    }
    write_json(config.output / RESULTS, results)


def draw(config: ExtensionBench, rows: Sequence[Row], path: Path) -> None:
    """Perplexity against the window: on the left measured with full attention, on the right with the pattern
    of the training; bars are the range over the seeds, dashed lines what can be expected of a model that
    knows how the text is made.
    """
    figure, both = new_figure(1, 2, width=9.5, height=4.4, sharey=True)
    panels = dict(zip(("full", "pattern"), both, strict=True))
    found = over_seeds(rows)
    for measured_with, axes in panels.items():
        for kind in KINDS:
            # Full attention is its own pattern.
            values = found[kind, "full" if kind == "full" else measured_with]
            mean = values.mean(axis=0)
            spread = np.stack([mean - values.min(axis=0), values.max(axis=0) - mean])
            axes.errorbar(
                config.contexts, mean, spread, marker="o", capsize=3, color=_COLORS[kind], label=_NAMES[kind]
            )
        for group in (None, config.group if measured_with == "pattern" else None):
            expected = [expected_perplexity(config, context, group) for context in config.contexts]
            axes.plot(config.contexts, expected, linestyle="--", linewidth=0.9, color="#888888", zorder=1)
        length_axis(axes, config.contexts, "window (tokens)")
        tidy(axes)
    panels["full"].set_ylabel("perplexity per byte")
    panels["full"].set_title("measured with full attention", fontsize=10)
    panels["pattern"].set_title("measured with the attention of the training", fontsize=10)
    panels["full"].legend(frameon=False, title="trained with")
    as_it_is, untrained = (found[model, "full"][0, -1] for model in ("base", "extended"))
    long = short_count(config.long_context)
    figure.suptitle(
        f"Extended from {config.context} to {long} tokens. With no training at {long}: {untrained:.1f} "
        f"(and {as_it_is:.1f} as the base is). Dashed: expected\n{machine_line(describe_machine())}",
        fontsize=10,
    )
    save(figure, path, dpi=150)


if __name__ == "__main__":
    main()
