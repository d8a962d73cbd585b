"""Which learning rate fine-tunes the shipped model best: LoRA, with embeddings and norms, all parameters.

    python benchmarks/training/learning_rates.py --output benchmarks/results/cpu-learning-rates

The model was trained on Python sources. It is fine-tuned on what ``help()`` says about the language, English
prose that Python carries with it (``pydoc_data.topics``) and that was no part of its data. Each learning
rate, kind of training and seed is one run of ``finetune``; all have the same steps, the same warm-up and
then a constant rate. The loss is that of topics that were held out. No paragraph is in two documents,
although topics repeat one another.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import tyro

from jsparse.checks import require_integers, require_new_folder
from jsparse.evaluate.speed.results import RESULTS
from jsparse.evaluate.speed.settings import check_list
from jsparse.models import Llama, load_tokenizer
from jsparse.models.shipped import shipped_model
from jsparse.reports.console import write_json
from jsparse.reports.figures import COLORS, can_draw, new_figure, save, tidy
from jsparse.reports.machine import describe_machine, installed_versions, machine_line
from jsparse.train import FinetuneConfig, evaluate_perplexity, finetune, read_documents

FIGURE, TRAIN, HELD_OUT = "learning_rates.png", "train.jsonl", "held_out.jsonl"
# What is trained: settings that differ from the defaults.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"train_embeddings_and_norms": False},
    "LoRA, embeddings and norms": {},
    "all parameters": {"lora_rank": None},
}
_COLORS = dict(zip(KINDS, (COLORS["blue"], COLORS["vermilion"], COLORS["black"]), strict=True))
_SMALLEST = 500  # characters of a document
_EVERY = 6  # one document in six is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRates:
    """The settings of the experiment."""

    output: Path
    """A new folder for results.json and learning_rates.png."""
    model: Path = dataclasses.field(default_factory=shipped_model)
    """The model to fine-tune (default: the shipped one)."""
    rates: tuple[float, ...] = (2e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
    """Learning rates."""
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the order of windows and of the LoRA matrices."""
    context: int = 256
    """Tokens per window."""
    batch_size: int = 4
    """Windows per step."""
    steps: int = 60
    """Training steps of each run, of which the first 10 are the warm-up."""
    lora_rank: int = 8
    """Rank of the LoRA matrices."""
    held_out_windows: int = 64
    """Windows that the loss is measured on, at most."""

    def __post_init__(self):
        object.__setattr__(self, "output", Path(self.output))
        object.__setattr__(self, "model", Path(self.model))
        check_list("seeds", self.seeds, minimum=0)
        if not self.rates:
            raise ValueError("rates must have at least one entry")
        require_integers(self, 1, "held_out_windows")
        for rate in self.rates:
            for kind in KINDS:
                self.run(self.output, kind, rate, self.seeds[0])

    def run(self, folder: Path, kind: str, rate: float, seed: int) -> FinetuneConfig:
        """One run. Runs of one seed differ only in what is trained and in the learning rate."""
        settings: dict[str, Any] = {"lora_rank": self.lora_rank} | KINDS[kind]
        return FinetuneConfig(
            **settings,
            model=self.model,
            data=[folder / TRAIN],
            output=folder / f"{kind}-{rate:g}-{seed}",
            context=self.context,
            dtype="float32",
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            warmup_steps=min(10, self.steps - 1),
            checkpoint_every=self.steps,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: what was trained (a key of ``KINDS``), and the loss that it came to.

    - ``loss``: of the documents held out, in nats per token; None if it was not finite.
    """

    trained: str
    learning_rate: float
    seed: int
    loss: float | None


def main(arguments: list[str] | None = None) -> None:
    bench_learning_rates(tyro.cli(LearningRates, description=__doc__, args=arguments))


def bench_learning_rates(config: LearningRates) -> tuple[float, list[Row]]:
    """Trains and measures, prints a table in Markdown, and writes results.json after each run and then the
    figure.

    Returns the loss before training, and a row for each run.

    Raises FileExistsError for a folder with something in it, before anything is trained.
    """
    require_new_folder(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        before, rows = train_and_measure(config, Path(folder))
    print(markdown(before, rows))
    if can_draw(FIGURE):
        draw(config, before, rows, config.output / FIGURE)
    return before, rows


# Text --------------------------------------------------------------------------------------------------


def make_documents(texts: Mapping[str, str] = topics) -> tuple[list[str], list[str]]:
    """The documents to train on and those held out, from texts by name.

    Of each text, sorted by name, what no earlier one has said, paragraph by paragraph. Every sixth of the
    documents is held out. Left out are short ones, and "debugger", which pdb.py says in its docstrings.

    >>> train, held_out = make_documents()
    >>> len(train) > 3 * len(held_out) > 0, sum(map(len, held_out)) > 20_000
    (True, True)
    """
    seen: set[str] = set()
    documents = []
    for name in sorted(set(texts) - {"debugger"}):
        new = []
        for paragraph in texts[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                new.append(paragraph)
        document = "\n\n".join(new)
        if len(document) >= _SMALLEST:
            documents.append(document)
    return [text for i, text in enumerate(documents) if i % _EVERY], documents[::_EVERY]


# Training and measuring --------------------------------------------------------------------------------


def train_and_measure(config: LearningRates, folder: Path) -> tuple[float, list[Row]]:
    """The loss before training and all rows; results.json is written after each run."""
    started = time.perf_counter()
    for name, documents in zip((TRAIN, HELD_OUT), make_documents(), strict=True):
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    model = Llama.from_pretrained(config.model, dtype="float32")
    tokens = np.concatenate(
        read_documents(
            [folder / HELD_OUT],
            load_tokenizer(config.model),
            eos_token_id=next(iter(model.config.eos_token_ids), None),
            vocab_size=model.config.vocab_size,
        )
    )
    before = held_out_loss(config, model, tokens)
    rows: list[Row] = []
    for seed in config.seeds:
        for rate in config.rates:
            for kind in KINDS:
                loss = trained_loss(config, config.run(folder, kind, rate, seed), tokens)
                rows.append(Row(kind, rate, seed, loss))
                write(config, before, rows, time.perf_counter() - started)
                print(f"{kind}, {rate:g}, seed {seed}: {loss} (before: {before:.3f})", file=sys.stderr)
    return before, rows


def trained_loss(config: LearningRates, run: FinetuneConfig, tokens: np.ndarray) -> float | None:
    """The loss of the documents held out after a run; None if it or the training's was not finite."""
    try:
        result = finetune(run)
        return held_out_loss(config, Llama.from_pretrained(result.output), tokens)
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return None


def held_out_loss(config: LearningRates, model: Llama, tokens: np.ndarray) -> float:
    """Nats per token, in windows side by side."""
    return evaluate_perplexity(
        model,
        tokens,
        context=config.context,
        stride=config.context,
        scoring="all",
        max_windows=config.held_out_windows,
        batch_size=8,
        progress=False,
    ).nll


# Reporting ---------------------------------------------------------------------------------------------


def over_seeds(rows: Sequence[Row]) -> dict[tuple[str, float], np.ndarray]:
    """The losses of each kind of training and learning rate; nan where one was not finite.

    >>> rows = [Row("LoRA", 1e-3, seed, 3.0 + seed) for seed in (0, 1)]
    >>> over_seeds(rows)["LoRA", 1e-3].tolist()
    [3.0, 4.0]
    """
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        loss = float("nan") if row.loss is None else row.loss
        found.setdefault((row.trained, row.learning_rate), []).append(loss)
    return {key: np.array(losses) for key, losses in found.items()}


def best_rates(rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate with the least mean loss, of each kind of training that had a finite one.

    >>> best_rates([Row("LoRA", rate, 1, loss) for rate, loss in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, None))])
    {'LoRA': 0.001}
    """
    best: dict[str, tuple[float, float]] = {}
    for (kind, rate), losses in over_seeds(rows).items():
        mean = float(losses.mean())
        if np.isfinite(mean) and (kind not in best or mean < best[kind][0]):
            best[kind] = mean, rate
    return {kind: rate for kind, (_, rate) in best.items()}


def markdown(before: float, rows: Sequence[Row]) -> str:
    """A line for each learning rate: means over the seeds with their range, the least of a column in bold."""
    found, best = over_seeds(rows), best_rates(rows)
    lines = [f"| learning rate | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    lines.append(f"| *before training* {f'| {before:.3f} ' * len(KINDS)}|")
    for rate in dict.fromkeys(row.learning_rate for row in rows):
        cells = [_cell(found[kind, rate], best.get(kind) == rate) for kind in KINDS if (kind, rate) in found]
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(losses: np.ndarray, is_best: bool) -> str:
    if not np.isfinite(losses).all():
        return "not finite"
    mean = f"**{losses.mean():.3f}**" if is_best else f"{losses.mean():.3f}"
    return mean if len(losses) == 1 else f"{mean} ({losses.min():.3f}–{losses.max():.3f})"


def write(config: LearningRates, before: float, rows: Sequence[Row], seconds: float) -> None:
    """Writes results.json: how and on what it was measured, and all rows so far."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
    if config.model == shipped_model():
        settings["model"] = "the shipped model"
    text = "".join(sum(make_documents(), []))
    results: dict[str, Any] = {
        "command": f"python benchmarks/training/learning_rates.py --output {config.output}",
        "settings": settings,
        "text": {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "machine": describe_machine() | installed_versions(("flax", "optax")),
        "before": before,
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": round(seconds, 1),
    }
    write_json(config.output / RESULTS, results)


def draw(config: LearningRates, before: float, rows: Sequence[Row], path: Path) -> None:
    """Loss against the learning rate; bars are the range over the seeds, dashed is the loss before training.
    What is far worse than before is cut off.
    """
    figure, (axes,) = new_figure(width=7, height=4.6)
    found = over_seeds(rows)
    for kind, color in _COLORS.items():
        losses = np.stack([found[kind, rate] for rate in config.rates])
        mean = losses.mean(axis=1)
        spread = np.stack([mean - losses.min(axis=1), losses.max(axis=1) - mean])
        axes.errorbar(config.rates, mean, spread, marker="o", capsize=3, color=color, label=kind)
    axes.axhline(before, linestyle="--", linewidth=0.9, color="#888888", zorder=1, label="before training")
    least = np.nanmin([losses.mean() for losses in found.values()])
    margin = 0.1 * abs(before - least) + 1e-3
    axes.set_ylim(min(least, before) - margin, before + 2 * margin)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss of held-out text (nats per token)")
    tidy(axes)
    axes.legend(frameon=False)
    figure.suptitle(
        f"Fine-tuned for {config.steps} steps of {config.batch_size} windows of {config.context} tokens\n"
        f"{machine_line(describe_machine())}",
        fontsize=10,
    )
    save(figure, path, dpi=150)


if __name__ == "__main__":
    main()
