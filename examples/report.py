"""What the demo found: two tables and a plot."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(results: dict[str, Any]) -> None:
    """Print perplexity by context length, and generation by kind of cache."""
    console = Console()
    settings = results["settings"]

    table = Table(title="Perplexity of a byte, held-out modules (lower is better)")
    table.add_column("model, attention when measured")
    for context in results["contexts"]:
        table.add_column(f"{context} tokens", justify="right")
    for name, row in results["perplexity"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)

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
    console.print(f"\n{_notes(results)}", highlight=False)


def _notes(results: dict[str, Any]) -> str:
    """What was measured, on what, and what the rows mean."""
    settings, machine, tokens = (
        results["settings"],
        results["machine"],
        len(results["generation"]["dense"]["kl"]),
    )
    notes = [
        f"Measured in this run on {machine['cores']} cores ({machine['processor']}, {machine['device']}), "
        f"jax {machine['jax']}, Python {machine['python']}: {results['parameters']:,} parameters, "
        f"{results['seconds']:.0f} s in all.",
        f"base was trained at {results['contexts'][0]} tokens only. LongLoRA trained within its groups only: "
        "full attention beyond them is new to the model.",
        f"pages: a head reads {settings['budget']} tokens of the cache a step. streaming: half of the KV "
        f"heads, chosen blindly, read the first {settings['sink']} and the last {settings['window']}.",
        "tokens/s: decoding one sequence, the median of several runs after one that compiles.",
        "Δ: |logit - the dense cache's logit|; KL in nats; same top: the same most likely token; each "
        f"cache fed the same {tokens} tokens of real text.",
    ]
    return "\n".join(notes)


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Draw what the tables say: perplexity by context length, and how KL is distributed over tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display or global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

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

    figure.savefig(path, dpi=120)
