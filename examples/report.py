"""What the demos found: tables and a plot."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jsparse.evaluate import METHODS
from jsparse.reports.figures import new_figure, require_matplotlib, save
from jsparse.reports.machine import machine_line


def print_trained(results: dict[str, Any]) -> None:
    """Print what the training demo measured: perplexity by context length, generation by kind of cache."""
    console = Console()
    _print_perplexity(console, results, "byte", "model, attention when measured")
    _print_generation(console, results)
    settings = results["settings"]
    notes = [
        f"Measured in this run on {machine_line(results['machine'])}: {results['parameters']:,} parameters, "
        f"{results['seconds']:.0f} s in all.",
        f"base was trained at {results['contexts'][0]} tokens only. LongLoRA trained within its groups only: "
        "full attention beyond them is new to the model.",
        f"pages: a head reads {settings['budget']} tokens of the cache per step. streaming: half of the KV "
        f"heads, chosen blindly, read the first {settings['sink']} and the last {settings['window']}.",
        *_generation_notes(results),
    ]
    console.print("", *notes, sep="\n", highlight=False)


def print_shipped(results: dict[str, Any]) -> None:
    """Print what the demo of the shipped model measured: the same two tables, and recall by method."""
    console = Console()
    settings = results["settings"]
    _print_perplexity(console, results, "token", "attention when measured")
    _print_generation(console, results)
    _print_recall(console, results)
    notes = [
        f"Measured in this run on {machine_line(results['machine'])}, {results['seconds']:.0f} s in all.",
        *(f"{name}: {METHODS[name].about}." for name in results["generation"]),
        f"A head that does not read everything reads {settings['budget']} tokens per step.",
        "needle: a word is explained once, somewhere, and asked for at the end; recall: one of many such "
        "words. The question is fed to the decode step, where a cache chooses what it reads.",
        *_generation_notes(results),
    ]
    console.print("", *notes, sep="\n", highlight=False)


def _print_perplexity(console: Console, results: dict[str, Any], unit: str, what: str) -> None:
    table = Table(title=f"Perplexity per {unit}, held-out modules (lower is better)")
    table.add_column(what)
    for context in results["contexts"]:
        table.add_column(f"{context} tokens", justify="right")
    for name, row in results["perplexity"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)


def _print_generation(console: Console, results: dict[str, Any]) -> None:
    settings = results["settings"]
    table = Table(
        title=f"Generating {settings['new_tokens']} tokens after a prompt of {settings['prompt_tokens']}"
    )
    for column in ("cache", "tokens/s", "bytes", "mean Δ", "max Δ", "mean KL", "same top"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for name, row in results["generation"].items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:.0f}",
            f"{row['cache_bytes']:,}",
            f"{row['mean_difference']:.3f}",
            f"{row['max_difference']:.3f}",
            f"{row['mean_kl']:.4f}",
            f"{row['same_top_token']:.0%}",
        )
    console.print(table)
    for name, row in results["generation"].items():
        console.print(f"{name}: {row['text']!r}", markup=False, highlight=False)


def _print_recall(console: Console, results: dict[str, Any]) -> None:
    rows = results["recall"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    scores = {(row["method"], row["task"]): row for row in rows}
    table = Table(title=f"Found in texts of {rows[0]['length']} tokens, {rows[0]['samples']} texts per task")
    table.add_column("cache")
    for task in tasks:
        table.add_column(task, justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        table.add_row(method, *(f"{scores[method, task]['score']:.0%}" for task in tasks))
    console.print(table)


def _generation_notes(results: dict[str, Any]) -> list[str]:
    return [
        "tokens/s: decoding one sequence, the median of several runs after one that compiles.",
        "Δ: |logit - the dense cache's logit|; KL in nats; same top: the same most likely token; each "
        f"cache fed the same {len(results['generation']['dense']['kl'])} tokens of real text.",
    ]


def check_can_draw() -> None:
    """Raise MissingExtra, before anything is computed, if a plot could not be drawn."""
    require_matplotlib("the demo draws a plot")


def draw_plot(results: dict[str, Any], path: Path, label: str) -> None:
    """Draw what the tables say: perplexity (``label``) by context length, and how KL is distributed."""
    from matplotlib.ticker import ScalarFormatter

    figure, (left, right) = new_figure(1, 2, width=11, height=4.2)
    for name, row in results["perplexity"].items():
        left.plot(results["contexts"], row, marker="o", label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(results["contexts"], [str(context) for context in results["contexts"]])
    left.set_xlabel("context length (tokens)")
    left.set_ylabel(label)
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(ScalarFormatter())
    left.legend()

    for name, row in results["generation"].items():
        if name != "dense":
            right.ecdf(row["kl"], label=name)
    right.set_xscale("log")
    right.set_xlabel("KL from the dense cache's prediction (nats)")
    right.set_ylabel("fraction of tokens with less")
    right.legend()

    save(figure, path)
