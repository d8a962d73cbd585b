"""The sections of the results pages for benchmarks that write only JSON files.

    python benchmarks/pages.py        # docs/results/scoreboard.md, decode_cpu.md and training.md

Nothing is measured: numbers come from benchmarks/results and models/small/scores.json. The other two pages
are written by ``python benchmarks/cpu --markdown`` and ``python benchmarks/gpu --markdown``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sections import PAGES, put_between
from training import extension, learning_rates, plan_claims, train_step

from jsparse.evaluate.scoreboard_report import markdown_table
from jsparse.evaluate.speed.cache_bytes import CacheBytes
from jsparse.evaluate.speed.results import DecodeRow, PrefillRow
from jsparse.evaluate.speed.turns import Timing
from jsparse.reports.console import short_count

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DECODE_CONTEXTS = (2048, 8192, 32768, 65536, 131072)  # of those measured
POLICIES = ("dense", "streaming", "quest", "lserve")


def main() -> None:
    for page, texts in pages().items():
        path = PAGES / page
        path.write_text(with_sections(path.read_text(encoding="utf-8"), texts), encoding="utf-8")


def pages() -> dict[str, dict[str, str]]:
    """The sections of each page by name."""
    decode, prefill = load("cpu-decode/results.json"), load("cpu-prefill/results.json")
    step, extended = load("cpu-train/results.json"), load("cpu-extension/results.json")
    rates = load("cpu-learning-rates/results.json")
    return {
        "scoreboard.md": {
            "scores": markdown_table(json.loads((ROOT / "models" / "small" / "scores.json").read_text())),
            "recall": recall_table(load("scoreboard/recall.json")),
        },
        "decode_cpu.md": {
            "times": decode_table([decode_row(row) for row in decode["rows"]]),
            "prompt": prompt_table([PrefillRow(**with_timings(row, "seconds")) for row in prefill["rows"]]),
            "bytes": bytes_table([CacheBytes(**row) for row in decode["bytes"]]),
        },
        "training.md": {
            "step": train_step.markdown(
                [train_step.Row(**with_timings(row, "step", "attention_part")) for row in step["rows"]]
            ),
            "extension": extension.markdown(
                extension_config(extended["settings"]),
                [extension.Row(**row | {"perplexity": tuple(row["perplexity"])}) for row in extended["rows"]],
            ),
            "rates": learning_rates.markdown(
                rates["before"], [learning_rates.Row(**row) for row in rates["rows"]]
            ),
            "claims": plan_claims.short_table(load("plan/claims.json")),
        },
    }


def with_sections(text: str, sections: Mapping[str, str]) -> str:
    """A page with its sections replaced, each between its own marks."""
    for name, section in sections.items():
        text = put_between(text, section, f"<!-- benchmarks/pages.py writes {name} from here -->")
    return text


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def with_timings(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A row of a results file with its times as :class:`Timing`, where it has them."""
    times = {
        name: row[name] and Timing(**row[name] | {"rounds": tuple(row[name]["rounds"])}) for name in names
    }
    return dict(row) | times


def decode_row(row: Mapping[str, Any]) -> DecodeRow:
    return DecodeRow(**with_timings(row, "decode", "attention", "selector", "reading"))


def extension_config(settings: Mapping[str, Any]) -> extension.ExtensionBench:
    fields: dict[str, Any] = dict(settings) | {"seeds": tuple(settings["seeds"])}
    return extension.ExtensionBench(**fields)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(table(("a", "b"), [("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [titles, *rows]
    written = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([written[0], "|---" * len(titles) + "|", *written[1:]])


def recall_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Percent with intervals, one line per method and one column per budget; without one, the last column."""
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    cells = {
        (
            row["method"],
            row["budget"],
        ): f"{100 * row['score']:.1f} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"
        for row in rows
    }
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        if (method, None) in cells:
            lines.append((f"{method} (no budget)", *[""] * (len(budgets) - 1), cells[method, None]))
        else:
            lines.append((method, *(cells[method, budget] for budget in budgets)))
    return table(("method", *(f"{budget} tokens" for budget in budgets)), lines)


def decode_table(rows: Sequence[DecodeRow]) -> str:
    """Milliseconds per token, and how many times faster LServe's policy is than dense attention."""
    found = {(row.context, row.policy): row for row in rows}
    lines = []
    for context in DECODE_CONTEXTS:
        dense, lserve = found[context, "dense"], found[context, "lserve"]
        times = [f"{found[context, policy].decode.median:.1f}" for policy in POLICIES]
        whole = dense.decode.ratio_to(lserve.decode)
        gains = (whole, dense.attention.median / lserve.attention.median)
        part = lserve.selector_to_reading
        lines.append(
            (
                short_count(context),
                *times,
                *(f"{gain:.1f}" for gain in gains),
                "" if part is None else f"{part:.2f}",
            )
        )
    titles = ("context", "dense, ms", *POLICIES[1:], "dense / lserve")
    return table((*titles, "attention part, dense / lserve", "selector / attention to pages"), lines)


def prompt_table(rows: Sequence[PrefillRow]) -> str:
    lines = [(short_count(row.context), row.variant, f"{row.seconds.median:.1f}") for row in rows]
    return table(("prompt", "variant", "seconds to the first token"), lines)


def bytes_table(rows: Sequence[CacheBytes]) -> str:
    """Bytes per token of the pages, per sequence of the ring."""
    lines = []
    for row in rows:
        parts = (row.keys_and_values, row.scales_and_zeros, row.bounds)
        if row.per_sequence:
            lines.append((row.kind, "", "", "", "", str(row.per_sequence)))
        else:
            shown = ("–" if part == 0 else f"{part:.0f}" for part in parts)
            lines.append((row.kind, *shown, f"{row.per_token:.0f}", ""))
    titles = (
        "cache",
        "keys and values",
        "scales and zeros",
        "bounds of 16 tokens",
        "per token",
        "per sequence",
    )
    return table(titles, lines)


if __name__ == "__main__":
    main()
