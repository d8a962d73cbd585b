"""The commands of this room: ``jsparse evaluate | scoreboard | bench decode | bench prefill``.

What needs jax is imported once the options are parsed, so that --help answers at once.
"""

import dataclasses
import platform
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jsparse.evaluate.scoreboard_config import ScoreboardConfig
from jsparse.evaluate.speed.options import DecodeBench, PrefillBench
from jsparse.hub import pinned_model
from jsparse.models.options import ModelOptions
from jsparse.reports.console import check_can_write, parse, print_table, write_json
from jsparse.texts.corpus import standard_library_files
from jsparse.texts.documents import read_documents

_LIBRARY_WINDOWS = 64  # of each context: seconds for a small model


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand(ModelOptions):
    """Perplexity of text files at several context lengths, and whether passkeys are found in long texts.

    All contexts score the same tokens, with more or less text before them. Without any options, the small
    model that ships with jsparse is measured on held-out modules of the standard library.
    """

    data: tuple[Path, ...] = ()
    """UTF-8 text files, each one document; they are joined and scored as one sequence. With neither --data
    nor --passkeys: held-out modules of this Python's standard library."""
    contexts: tuple[int, ...] = (1024,)
    """Tokens per window, and per text with passkeys unless --lengths says otherwise."""
    attention: Literal["full", "shifted", "trained"] = "full"
    """"full" causal attention, LongLoRA's "shifted" groups of a quarter of each context, or as the model was
    "trained": by the attention_pattern.json in its folder, whose groups must divide each context."""
    scoring: Literal["new", "all", "last"] = "new"
    """What a window scores: tokens "new" since the last, "all" of its tokens (LongLoRA), or the "last"."""
    stride: int | None = None
    """Tokens from window to window. Unless given: half of each context; 256 for "all"; --last for "last"."""
    last: int | None = None
    """For --scoring last: tokens that each window scores."""
    max_windows: int | None = None
    """Score only this many windows of each context, which are then not the same tokens. Unless given: all; 64
    for the standard library."""
    batch_size: int = 1
    """Windows, or texts with passkeys, per batch."""
    passkeys: bool = False
    """Ask for passkeys in texts of filler too; without --data, nothing else is measured."""
    lengths: tuple[int, ...] | None = None
    """With --passkeys: tokens per text; those of --contexts unless given."""
    depths: tuple[float, ...] | None = None
    """With --passkeys: where they are hidden, from 0 to 1; 0 0.25 0.5 0.75 1 unless given."""
    samples: int | None = None
    """With --passkeys: texts for each length and depth; 10 unless given."""
    plot: Path | None = None
    """Draw the results into this file (needs the extra plot)."""
    json: Path | None = None
    """Write the results to this file too: a list, with an object for each context, or length and depth."""

    def __post_init__(self):
        of_perplexity = self.scoring, self.stride, self.last, self.max_windows
        if self.passkeys and not self.data and of_perplexity != ("new", None, None, None):
            raise ValueError("--scoring, --stride, --last and --max-windows are for perplexity: give --data")
        for name in ("lengths", "depths", "samples"):
            if not self.passkeys and getattr(self, name) is not None:
                raise ValueError(f"--{name} is for passkeys: give --passkeys")

    @property
    def passkey_lengths(self) -> tuple[int, ...]:
        """``lengths`` with its default filled in; none at all without --passkeys."""
        if not self.passkeys:
            return ()
        return self.contexts if self.lengths is None else self.lengths


def evaluate(options: list[str]) -> None:
    command = parse(EvaluateCommand, "evaluate", options)
    from jsparse.evaluate.plots import check_can_plot, plot_evaluation
    from jsparse.models import Llama, load_config, load_tokenizer
    from jsparse.models.patterns import load_pattern, shifted_pattern

    of_library = not command.data and not command.passkeys
    if of_library:
        command = _of_standard_library(command)
    check_can_write(command.json, "json")
    command = _pinned(command)
    if command.plot is not None:
        check_can_plot(command.plot)
    config, tokenizer = load_config(command.model), load_tokenizer(command.model)
    pattern = load_pattern(command.model) if command.attention == "trained" else None

    def mask_for(length: int):
        if command.attention == "shifted":
            return shifted_pattern(config, length // 4).masks(config, length)
        return None if pattern is None else pattern.masks(config, length)

    for length in (*(command.contexts if command.data else ()), *command.passkey_lengths):
        mask_for(length)  # raises, before the model is loaded, where a pattern does not fit
    model = Llama.from_pretrained(command.model, dtype=command.dtype)
    if of_library:
        print(
            f"data: {len(command.data)} held-out modules of Python {platform.python_version()}'s standard "
            f"library, at most {command.max_windows} windows of each context (--data reads other text)"
        )
    perplexities = _perplexities(command, model, tokenizer, mask_for) if command.data else []
    passkeys = _passkeys(command, model, tokenizer, mask_for) if command.passkeys else []
    if command.plot is not None:
        plot_evaluation(command.plot, perplexity={command.attention: perplexities}, passkeys=passkeys)
    if command.json is not None:
        rows = [dataclasses.asdict(result) for result in perplexities]
        rows += [dataclasses.asdict(result) | {"accuracy": result.accuracy} for result in passkeys]
        write_json(command.json, rows)


def _pinned(config: Any) -> Any:
    """The settings with the commit of a model that is given by its id: results name it."""
    if config.model is None:
        return config
    return dataclasses.replace(config, model=pinned_model(config.model))


def _of_standard_library(command: EvaluateCommand) -> EvaluateCommand:
    """The command with text that every machine has, and with only as much of it as takes seconds."""
    _, held_out = standard_library_files()
    windows = _LIBRARY_WINDOWS if command.max_windows is None else command.max_windows
    return dataclasses.replace(command, data=held_out, max_windows=windows)


def _perplexities(command: EvaluateCommand, model, tokenizer, mask_for) -> list:
    """Perplexity at each of --contexts, printed as a table."""
    from jsparse.evaluate.perplexity import perplexity_by_context
    from jsparse.models.end_token import end_token
    from jsparse.models.positions import note_length

    config = model.config
    end = end_token(command.model, tokenizer, config)
    documents = read_documents(command.data, tokenizer, eos_token_id=end, vocab_size=config.vocab_size)
    for context in command.contexts:
        note_length(config, context)
    names = ("scoring", "stride", "last", "batch_size", "max_windows")
    results = perplexity_by_context(
        model,
        np.concatenate(documents),
        command.contexts,
        mask_for=mask_for,
        **{name: getattr(command, name) for name in names},
    )
    rows = [(r.context, f"{r.perplexity:.4f}", f"{r.nll:.4f}", f"{r.tokens:,}") for r in results]
    title = f"{command.model}, {command.attention} attention"
    print_table(title, ("context", "perplexity", "nll (nats)", "tokens scored"), rows)
    return results


def _passkeys(command: EvaluateCommand, model, tokenizer, mask_for) -> list:
    """How many passkeys were found at each length and depth, printed as a table."""
    from jsparse.evaluate.passkeys import evaluate_passkeys
    from jsparse.models.positions import note_length

    for length in command.passkey_lengths:
        note_length(model.config, length)
    given = {name: getattr(command, name) for name in ("depths", "samples")}
    results = evaluate_passkeys(
        model,
        tokenizer,
        lengths=command.passkey_lengths,
        mask_for=mask_for,
        batch_size=command.batch_size,
        **{name: value for name, value in given.items() if value is not None},
    )
    rows = [(r.length, f"{r.depth:.0%}", f"{r.correct} of {r.samples}") for r in results]
    title = f"{command.model}, {command.attention} attention: passkeys"
    print_table(title, ("tokens", "depth", "found"), rows)
    return results


def scoreboard(options: list[str]) -> None:
    config = _pinned(parse(ScoreboardConfig, "evaluate scoreboard", options))
    from jsparse.evaluate.scoreboard import run_scoreboard
    from jsparse.evaluate.scoreboard_report import print_scoreboard

    rows = run_scoreboard(config)
    if str(config.json) != "-":
        print_scoreboard(rows, str(config.model))


def bench_decode(options: list[str]) -> None:
    config = _pinned(parse(DecodeBench, "bench decode", options))
    from jsparse.evaluate.speed import bench_decode as run

    run(config)
    print(f"the numbers are in {config.output}")


def bench_prefill(options: list[str]) -> None:
    config = _pinned(parse(PrefillBench, "bench prefill", options))
    from jsparse.evaluate.speed import bench_prefill as run

    run(config)
    print(f"the numbers are in {config.output}")
