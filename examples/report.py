"""What the demo found: two tables and a plot."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(results: dict[str, Any]) -> None:
    """Print perplexity by context length, and generation by kind of cache."""
    console = Console()
    settings, machine = results["settings"], results["machine"]

    table = Table(title="Perplexity of a byte, held-out modules (lower is better)")
    table.add_column("model, attention when measured")
    for context in results["contexts"]:
        table.add_column(f"{context} tokens", justify="right")
    for name, row in results["perplexity"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)

    generation = results["generation"]
    table = Table(
        title=f"Generating {settings['new_tokens']} tokens after a prompt of {settings['prompt_tokens']}"
    )
    for column in (
        "cache",
        "tokens/s",
        "cache bytes",
        "mean |Δlogit|",
        "max |Δlogit|",
        "mean KL",
        "same top token",
    ):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for name, row in generation.items():
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
    console.print(
        f"Measured in this run on {machine['cores']} cores ({machine['processor']}, {machine['device']}), "
        f"jax {machine['jax']}, Python {machine['python']}: {results['parameters']:,} parameters, "
        f"{results['seconds']:.0f} s in all. Tokens/s are of the second of two equal calls, so "
        "that compiling does not count. Differences are between the logits of a cache and those of the "
        "dense one, fed the same tokens."
    )


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Draw what the tables say: perplexity by context length, and KL by token after the prompt."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display or global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    for name, row in results["perplexity"].items():
        left.plot(results["contexts"], row, marker="o", label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(results["contexts"], [str(context) for context in results["contexts"]])
    left.set_xlabel("context length (tokens)")
    left.set_ylabel("perplexity of a byte, held-out modules")
    left.legend()

    for name, row in results["generation"].items():
        if any(row["kl"]):
            right.plot(row["kl"], label=name)
    right.set_xlabel("generated token")
    right.set_ylabel("KL(dense cache || this cache), nats")
    right.legend()

    figure.savefig(path, dpi=120)
