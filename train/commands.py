"""The commands of this room: ``jsparse pretrain | finetune | merge | plan finetune | heads``.

What needs jax is imported once the options are parsed, so that --help answers at once.
"""

import dataclasses
import shlex
import signal
import sys
from pathlib import Path

from jsparse.masks.head_pattern import PATTERN_FILE
from jsparse.plan.memory_fraction import DEFAULT_MEMORY_FRACTION
from jsparse.reports.console import check_can_write, parse, write_json
from jsparse.reports.options_file import with_file
from jsparse.train.config import FinetuneConfig
from jsparse.train.config_checks import EITHER
from jsparse.train.heads_config import HeadsConfig
from jsparse.train.merge_config import MergeConfig
from jsparse.train.pretrain_config import PretrainConfig

# What the commands do, at the head of their --help.
_FINETUNE = """Fine-tune a model in its own context, or to a longer one: then the defaults are LongLoRA's.

With --lora-rank None and --attention full, every parameter is trained with causal attention.
"""
_PRETRAIN = "Train a small model from scratch; the defaults are those of the model that jsparse ships."
_HEADS = """Learn which KV heads need the whole context and which can stream; the defaults are DuoAttention's.

The model itself does not change.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneCommand(FinetuneConfig):
    """The settings of a run, and which of several processes this one is."""

    config: Path | None = None
    """A YAML file of options by their names (batch_size: 4), as a run writes it to run.yaml. Options given
    beside it win. Paths in it are relative to the current folder."""
    coordinator: str | None = None
    """For several processes: "host:port" of the first. Start each of them with this command."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFinetuneCommand(FinetuneConfig):
    """Plan a run on devices that this machine does not have. Neither data nor weights are read."""

    data: tuple[Path, ...] = (Path("-"),)
    """Not read."""
    output: Path = Path("-")
    """Not written."""
    config: Path | None = None
    """A YAML file of options, as for jsparse finetune."""
    device: str = "h200"
    """"h200", "h100-80gb" or "a100-80gb"; --mesh.* sets how many."""
    hosts: int = 1
    """Machines that hold the devices."""
    memory_fraction: float = DEFAULT_MEMORY_FRACTION
    """Fraction of the memory that JAX takes for arrays (XLA_CLIENT_MEM_FRACTION)."""
    json: Path | None = None
    """Write the plan to this file instead of printing tables; "-" is stdout."""


def finetune(options: list[str]) -> int:
    command = parse(
        FinetuneCommand, "finetune", with_file(FinetuneCommand, options, either=EITHER), _FINETUNE
    )
    import jax

    from jsparse.train.finetuning import finetune as run_finetune

    given = command.coordinator, command.processes, command.process
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ValueError("--coordinator, --processes and --process must be given together")
        jax.distributed.initialize(*given)
    result = run_finetune(_settings(command))
    last = f"last loss {result.losses[-1]:.4f}"
    if result.best_loss is not None:
        last += f", lowest held-out loss {result.best_loss:.4f} after step {result.best_step}"
    if result.finished:
        which = "" if result.best_step is None else f"; the model is that of step {result.exported_step}"
        print(f"{result.output}: trained for {len(result.losses)} steps, {last}{which}")
        return 0
    return _stopped(result.stopped_by, f"after step {len(result.losses)}, {last}", result.output)


def _stopped(by: int | None, where: str, output: Path) -> int:
    """Say which signal ended a run that can be resumed; returns its exit code."""
    from jsparse.train.run.stopping import stopped_by

    number = signal.SIGTERM if by is None else by
    print(
        f"jsparse: stopped by {stopped_by(number)} {where}; its checkpoint is in {output}; "
        "run the same command to resume",
        file=sys.stderr,
    )
    return 128 + number


def pretrain(options: list[str]) -> int:
    config = parse(PretrainConfig, "pretrain", options, _PRETRAIN)
    from jsparse.train.pretraining import pretrain as run_pretrain

    result = run_pretrain(config, command=shlex.join(["jsparse", "pretrain", *options]))
    if result.finished:
        print(f"{result.output}: a model after {len(result.metrics)} steps")
        return 0
    return _stopped(result.stopped_by, f"after step {len(result.metrics)}", result.output)


def merge(options: list[str]) -> None:
    config = parse(MergeConfig, "merge", options)
    from jsparse.train.export import loading_advice, write_merged

    step, base, best = write_merged(config)
    if step is None:
        count = len(config.runs)
        parts = "the adapter and its base" if count == 1 else f"{count} adapters and their base"
        print(f"{config.output}: the model of {parts}")
    else:
        why = ", which has the lowest held-out loss" if best else ""
        print(f"{config.output}: the {'adapter' if config.adapter else 'model'} of step {step}{why}")
    advice = loading_advice(Path(config.output), base)
    if advice is not None:
        # Lines to copy belong to the result; that nothing is needed is a note.
        print(advice if config.adapter else f"jsparse: {advice}", file=None if config.adapter else sys.stderr)


def plan_finetune(options: list[str]) -> int:
    command = parse(
        PlanFinetuneCommand, "plan finetune", with_file(PlanFinetuneCommand, options, either=EITHER)
    )
    check_can_write(command.json, "json")
    from jsparse.models import load_config
    from jsparse.plan.compile_only import prepare_process
    from jsparse.plan.program import compiler_errors_explained, print_plan
    from jsparse.train.plan import plan_finetune as make_plan

    prepare_process()
    with compiler_errors_explained():
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


def heads(options: list[str]) -> None:
    config = parse(HeadsConfig, "heads", options, _HEADS)
    from jsparse.train.heads import learn_heads

    result = learn_heads(config)
    for layer, streams in enumerate(result.pattern.threshold(0.5)):
        print(f"layer {layer}: {streams.sum()} of {streams.size} KV heads stream at sparsity 0.5")
    path = result.output / PATTERN_FILE
    print(f"the pattern is {path}: try")
    print(
        f"  jsparse generate --model {config.model} --pattern {path} --sparsity 0.5 "
        f"--sink {config.sink} --window {config.window} --prompt 'import os'"
    )
