"""A training step with LongLoRA's shifted groups beside one with full attention, on the device at hand.

    python benchmarks/training/train_step.py --output benchmarks/results/cpu-train

For each context the step of ``jsparse finetune`` is compiled for both kinds of attention, with LongLoRA's
groups of a quarter of the context, and the two run in turns. So does attention alone, forward and backward,
with the masks, segments and shapes of the step. Medians are reported, and a ratio is taken within a round.
Weights and tokens are random: times do not depend on them.

Beside the times are the FLOPs of the same step, by formula from the lists of blocks that are visited
(``jsparse.train.model_flops``). The smaller a model, the larger the part of attention in its step. So shifted
groups save more of a step here than of a large model's step at the same context; what they save of attention
is the same.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import jsparse
from jsparse.checks import require_new_folder
from jsparse.evaluate.speed.results import RESULTS
from jsparse.evaluate.speed.settings import check_integers, check_list
from jsparse.evaluate.speed.turns import Timing, in_turns, milliseconds
from jsparse.models import Llama, LlamaConfig
from jsparse.models.masking import layer_masks
from jsparse.reports.console import short_count, write_json
from jsparse.reports.figures import COLORS, can_draw, length_axis, new_figure, plain_numbers, save, tidy
from jsparse.reports.machine import describe_machine, installed_versions, machine_line
from jsparse.train import FinetuneConfig
from jsparse.train.model_flops import step_flops
from jsparse.train.start import is_trained, make_step, prepare
from jsparse.train.step import new_state, split_model

KINDS = ("full", "shifted")
FIGURE = "train_step.png"
_COLORS = {"full": COLORS["black"], "shifted": COLORS["blue"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStepBench:
    """The sizes of the benchmark. Heads have 64 dimensions, and two query heads or more share a KV head."""

    output: Path
    """A new folder for results.json and train_step.png."""
    contexts: tuple[int, ...] = (4096, 8192, 16384)
    """Tokens of the one window of a step, multiples of 8."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 8
    """Query heads, an even number; the model is 64 times as wide."""
    rounds: int = 5
    """Rounds that count, after one that does not; in each, everything is measured in turn."""

    def __post_init__(self):
        object.__setattr__(self, "output", Path(self.output))
        check_list("contexts", self.contexts, minimum=8)
        check_integers(self, layers=None, heads=None, rounds=None)
        if self.heads % 2:
            raise ValueError(f"heads={self.heads} must be even: half of them are shifted")
        for context in self.contexts:
            if context % 8:
                raise ValueError(
                    f"contexts has {context}, not a multiple of 8: a quarter is to be an even group"
                )

    def model(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=8192,
            hidden_size=64 * self.heads,
            intermediate_size=192 * self.heads,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=2 if self.heads % 4 == 0 else self.heads // 2,
            max_position_embeddings=max(self.contexts),
        )

    def finetuning(self, attention: str, context: int) -> FinetuneConfig:
        """LongLoRA's recipe; a step reads no files."""
        return FinetuneConfig(
            model="-", data="-", output="-", context=context, attention=attention, batch_size=1
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of attention at one context. Times are in seconds, for a step of one window.

    - ``step``: the whole training step; ``attention_part``: attention alone, forward and backward, in all
      layers.
    - ``step_flops`` and ``attention_flops``: by formula. ``..._times_fewer``: full attention's divided by
      these.
    - ``..._times_faster``: the median over the rounds of full attention's time divided by this one's.
    """

    context: int
    attention: str
    group_size: int | None
    step: Timing
    attention_part: Timing
    step_flops: int
    attention_flops: int
    step_times_faster: float
    attention_times_faster: float
    step_times_fewer_flops: float
    attention_times_fewer_flops: float


def main(arguments: list[str] | None = None) -> None:
    bench_train_step(tyro.cli(TrainStepBench, description=__doc__, args=arguments))


def bench_train_step(config: TrainStepBench) -> list[Row]:
    """Measures, prints a table in Markdown, and writes results.json after each context and then the figure.

    Raises FileExistsError for an output folder with something in it, before anything is compiled.
    """
    require_new_folder(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for context in config.contexts:
        rows += measure(config, context)
        write(config, rows)
        print(f"context {context} is measured", file=sys.stderr)
    print(markdown(rows))
    if can_draw(FIGURE):
        draw(config, rows, config.output / FIGURE)
    return rows


# Measuring ---------------------------------------------------------------------------------------------


def measure(config: TrainStepBench, context: int) -> list[Row]:
    """The rows of one context: steps in turns, and then attention alone in turns."""
    steps = {kind: timed_step(config, kind, context) for kind in KINDS}
    step_times = in_turns(steps, config.rounds)
    del steps  # and the optimizers' states with them
    attention_times = in_turns(
        {kind: timed_attention(config, kind, context) for kind in KINDS}, config.rounds
    )
    flops = {kind: count_flops(config, kind, context) for kind in KINDS}
    return [
        Row(
            context=context,
            attention=kind,
            group_size=config.finetuning(kind, context).groups,
            step=step_times[kind],
            attention_part=attention_times[kind],
            step_flops=flops[kind].total,
            attention_flops=flops[kind].attention.total,
            step_times_faster=step_times["full"].ratio_to(step_times[kind]),
            attention_times_faster=attention_times["full"].ratio_to(attention_times[kind]),
            step_times_fewer_flops=flops["full"].total / flops[kind].total,
            attention_times_fewer_flops=flops["full"].attention.total / flops[kind].attention.total,
        )
        for kind in KINDS
    ]


def timed_step(config: TrainStepBench, kind: str, context: int) -> Callable[[], float]:
    """A call that takes one step from where the last one ended, and says how many seconds it took."""
    run, llama = config.finetuning(kind, context), config.model()
    model = prepare(run, Llama(llama, rngs=nnx.Rngs(0)))
    params, split = split_model(model, is_trained(run))
    step = make_step(run, split, run.pattern(llama).masks(llama, context), None)
    state = new_state(params, run.optimizer())
    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (1, 1, context)).astype(np.int32)
    batch = tokens, np.ones_like(tokens), np.ones(tokens.shape, bool)

    def timed() -> float:
        nonlocal state
        time, (state, metrics) = milliseconds(lambda: step(state, split.frozen, *batch))
        if not np.isfinite(metrics.loss):
            raise FloatingPointError(f"the loss of {kind} attention at {context} tokens is {metrics.loss}")
        return time / 1e3

    return timed


def timed_attention(config: TrainStepBench, kind: str, context: int) -> Callable[[], float]:
    """A call that runs attention, forward and backward, once for each layer, and says how long it took."""
    llama = config.model()
    masks = layer_masks(llama, config.finetuning(kind, context).pattern(llama).masks(llama, context))
    heads, kv_heads = llama.num_attention_heads, llama.num_key_value_heads
    q, k, v, d_out = (
        jax.random.normal(jax.random.key(number), (1, context, n, llama.head_dim))
        for number, n in enumerate((heads, kv_heads, kv_heads, heads))
    )
    segments = jnp.ones((1, context), jnp.int32)  # as in training, where windows may hold several documents

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(mask, q, k, v, d_out):
        def attend(q, k, v):
            return jsparse.attention(q, k, v, mask, q_segment_ids=segments, kv_segment_ids=segments)

        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(d_out)

    # One layer after another, as in a step: outputs of an earlier one are freed meanwhile.
    def all_layers():
        for mask in masks:
            jax.block_until_ready(both_ways(mask, q, k, v, d_out))

    return lambda: milliseconds(all_layers)[0] / 1e3


def count_flops(config: TrainStepBench, kind: str, context: int) -> Any:
    """``StepFlops`` of the step that is measured."""
    run, llama = config.finetuning(kind, context), config.model()
    model = nnx.eval_shape(lambda: prepare(run, Llama(llama, rngs=nnx.Rngs(0))))
    mask = run.pattern(llama).masks(llama, context)
    return step_flops(model, mask, context=context, windows=1, remat=run.remat)


# Reporting ---------------------------------------------------------------------------------------------


def write(config: TrainStepBench, rows: Sequence[Row]) -> None:
    """Writes results.json: how and on what it was measured, and all rows so far."""
    results = {
        "command": f"python benchmarks/training/train_step.py --output {config.output}",
        "settings": dataclasses.asdict(config) | {"output": str(config.output)},
        "model": dataclasses.asdict(config.model()),
        "machine": machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(config.output / RESULTS, results)


def machine() -> dict[str, Any]:
    """What the benchmark ran on, with which versions, and when."""
    return describe_machine() | installed_versions(("jaxlib", "flax", "optax", "numpy"))


def markdown(rows: Sequence[Row]) -> str:
    """A table of one line per context: both times, and the ratios of times and of FLOPs."""
    lines = [
        "| context | step, full (s) | shifted (s) | times faster | by FLOPs "
        "| attention, full (s) | shifted (s) | times faster | by FLOPs |",
        "|---" * 9 + "|",
    ]
    of = {(row.context, row.attention): row for row in rows}
    for context in dict.fromkeys(row.context for row in rows):
        full, shifted = (of[context, kind] for kind in KINDS)
        cells = (
            short_count(context),
            f"{full.step.median:.2f}",
            f"{shifted.step.median:.2f}",
            f"{shifted.step_times_faster:.2f}",
            f"{shifted.step_times_fewer_flops:.2f}",
            f"{full.attention_part.median:.2f}",
            f"{shifted.attention_part.median:.2f}",
            f"{shifted.attention_times_faster:.2f}",
            f"{shifted.attention_times_fewer_flops:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(config: TrainStepBench, rows: Sequence[Row], path: Path) -> None:
    """Seconds of a step, and of the attention in it, against the context."""
    figure, (axes,) = new_figure(width=7.5, height=4.8)
    for kind in KINDS:
        mine = [row for row in rows if row.attention == kind]
        contexts, name = [row.context for row in mine], {"shifted": "shifted groups"}.get(kind, kind)
        color = _COLORS[kind]
        axes.plot(contexts, [r.step.median for r in mine], "o-", color=color, label=f"step, {name}")
        parts = [r.attention_part.median for r in mine]
        axes.plot(contexts, parts, "o:", color=color, label=f"attention alone, {name}")
    length_axis(axes, config.contexts, "context (tokens)")
    axes.set_yscale("log")
    plain_numbers(axes.yaxis, at=(1, 2, 5))
    tidy(axes)
    axes.legend(frameon=False)
    axes.set_ylabel("time (s)")
    model = f"{config.layers} layers of {config.heads} heads of 64, one window, groups of a quarter"
    axes.set_title(f"A LongLoRA step: {model}\n{machine_line(machine())}", loc="left", fontsize=9)
    save(figure, path, dpi=150)


if __name__ == "__main__":
    main()
