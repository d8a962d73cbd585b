"""The commands of this room: ``jsparse finetune | merge | plan finetune | evaluate | heads``."""

import dataclasses
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jsparse.command_line import check_can_write, parse, print_table, write_json
from jsparse.compile_only import prepare_process
from jsparse.corpus import standard_library_files
from jsparse.models import Llama, load_config, load_tokenizer, shipped_model
from jsparse.plan import DEFAULT_MEMORY_FRACTION, print_plan
from jsparse.train.config import FinetuneConfig
from jsparse.train.data import read_documents
from jsparse.train.evaluate import perplexity_by_context
from jsparse.train.export import MergeConfig
from jsparse.train.export import merge as merge_run
from jsparse.train.finetune import finetune as run_finetune
from jsparse.train.heads import HeadsConfig, learn_heads
from jsparse.train.patterns import load_pattern, shifted_pattern
from jsparse.train.plan import plan_finetune as make_plan
from jsparse.train.plots import check_can_plot, plot_evaluation
from jsparse.train.pretrain import PretrainConfig
from jsparse.train.pretrain import pretrain as run_pretrain
from jsparse.train.retrieval import evaluate_passkeys

_LIBRARY_WINDOWS = 64  # of each context: seconds for a small model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneCommand(FinetuneConfig):
    """The settings of a run, and which of several processes this one is."""

    coordinator: str | None = None
    """Of several processes: "host:port" of the first. Each is started with this command."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which of them this is, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFinetuneCommand(FinetuneConfig):
    """The settings of a run, and the devices that it is planned for. Neither data nor weights are read."""

    data: tuple[Path, ...] = (Path("-"),)
    """Not read."""
    output: Path = Path("-")
    """Not written."""
    device: str = "h200"
    """"h200", "h100-80gb" or "a100-80gb"; --mesh.* says how many."""
    hosts: int = 1
    """Machines that the devices stand in."""
    memory_fraction: float = DEFAULT_MEMORY_FRACTION
    """Part of the memory that JAX takes for arrays (XLA_CLIENT_MEM_FRACTION)."""
    json: Path | None = None
    """Write the plan to this file instead of printing tables; "-" is stdout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Perplexity of text files at several context lengths, and whether passkeys are found in long texts.

    Perplexity is of the same tokens, with more or less before them. With no options at all it is that of the
    small model that ships with jsparse, on held-out modules of the standard library.
    """

    model: Path = shipped_model()
    """A Hugging Face folder with config.json, safetensors and tokenizer.json (default: the one shipped)."""
    data: tuple[Path, ...] = ()
    """UTF-8 text files, each one document; they are scored one after another in one row. With neither --data
    nor --passkeys: held-out modules of this Python's standard library."""
    contexts: tuple[int, ...] = (1024,)
    """Tokens a window, and of a text with passkeys unless --lengths says otherwise."""
    attention: Literal["full", "shifted", "trained"] = "full"
    """"full" causal attention, LongLoRA's "shifted" groups of a quarter of each context, or as the model was
    "trained": by the attention_pattern.json in its folder, whose groups must divide each context."""
    scoring: Literal["new", "all", "last"] = "new"
    """What a window scores: what is "new" since the last one, "all" its tokens (LongLoRA), or the "last"."""
    stride: int | None = None
    """Tokens from window to window (default: half of each context; 256 for "all"; --last for "last")."""
    last: int | None = None
    """For --scoring last: tokens a window scores."""
    max_windows: int | None = None
    """Score the first so many windows of each context only (default: all; 64 of the standard library)."""
    batch_size: int = 1
    """Windows, or texts with passkeys, at a time."""
    passkeys: bool = False
    """Ask for passkeys in texts of filler too; without --data, for nothing else."""
    lengths: tuple[int, ...] | None = None
    """With --passkeys: tokens of a text (default: --contexts)."""
    depths: tuple[float, ...] | None = None
    """With --passkeys: where they are hidden, from 0 to 1 (default: 0 0.25 0.5 0.75 1)."""
    samples: int | None = None
    """With --passkeys: texts for each length and depth (default 10)."""
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


def finetune(options: list[str]) -> int:
    command = parse(FinetuneCommand, "finetune", options, FinetuneConfig.__doc__)
    given = command.coordinator, command.processes, command.process
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ValueError("--coordinator, --processes and --process must be given together")
        jax.distributed.initialize(*given)
    result = run_finetune(_settings(command))
    last = f"last loss {result.losses[-1]:.4f}"
    if result.finished:
        print(f"{result.output}: trained for {len(result.losses)} steps, {last}")
        return 0
    print(
        f"jsparse: stopped by SIGTERM after step {len(result.losses)}, {last}; its checkpoint is in "
        f"{result.output}, and the same command goes on",
        file=sys.stderr,
    )
    return 128 + signal.SIGTERM


def pretrain(options: list[str]) -> int:
    config = parse(PretrainConfig, "pretrain", options)
    result = run_pretrain(config, command=shlex.join(["jsparse", "pretrain", *options]))
    if result.finished:
        print(f"{result.output}: a model after {len(result.metrics)} steps")
        return 0
    print(
        f"jsparse: stopped by SIGTERM after step {len(result.metrics)}; its checkpoint is in "
        f"{result.output}, and the same command goes on",
        file=sys.stderr,
    )
    return 128 + signal.SIGTERM


def merge(options: list[str]) -> None:
    config = parse(MergeConfig, "merge", options)
    step = merge_run(config)
    print(f"{config.output}: the {'adapter' if config.adapter else 'model'} of step {step}")


def plan_finetune(options: list[str]) -> int:
    command = parse(PlanFinetuneCommand, "plan finetune", options)
    check_can_write(command.json, "json")
    prepare_process()
    plan = make_plan(
        _settings(command),
        load_config(command.model),
        device=command.device,
        hosts=command.hosts,
        memory_fraction=command.memory_fraction,
    )
    if command.json is None:
        print_plan(plan)
    else:
        write_json(command.json, plan.to_json())
    return 0 if plan.fits else 1


def _settings(command: FinetuneConfig) -> FinetuneConfig:
    """The run's own part of a command that extends it."""
    return FinetuneConfig(
        **{field.name: getattr(command, field.name) for field in dataclasses.fields(FinetuneConfig)}
    )


def evaluate(options: list[str]) -> None:
    command = parse(EvaluateCommand, "evaluate", options)
    of_library = not command.data and not command.passkeys
    if of_library:
        command = _of_standard_library(command)
    check_can_write(command.json, "json")
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
    model = Llama.from_pretrained(command.model)
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


def _of_standard_library(command: EvaluateCommand) -> EvaluateCommand:
    """The command with the text that every machine has, and with no more of it than takes seconds."""
    _, held_out = standard_library_files()
    windows = _LIBRARY_WINDOWS if command.max_windows is None else command.max_windows
    return dataclasses.replace(command, data=held_out, max_windows=windows)


def _perplexities(command: EvaluateCommand, model, tokenizer, mask_for) -> list:
    """Perplexity at each of --contexts, printed as a table."""
    ends = model.config.eos_token_ids
    documents = read_documents(
        command.data, tokenizer, eos_token_id=ends[0] if ends else None, vocab_size=model.config.vocab_size
    )
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


def heads(options: list[str]) -> None:
    config = parse(HeadsConfig, "heads", options)
    result = learn_heads(config)
    for layer, streams in enumerate(result.pattern.threshold(0.5)):
        print(f"layer {layer}: {streams.sum()} of {streams.size} KV heads stream at sparsity 0.5")
    path = result.output / "full_attention_heads.tsv"
    print(f"the pattern is {path}: try")
    print(
        f"  jsparse generate --model {config.model} --pattern {path} --sparsity 0.5 "
        f"--sink {config.sink} --window {config.window} --prompt 'import os'"
    )
