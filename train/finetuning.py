"""Fine-tuning, with LongLoRA or of every parameter: from a checkpoint and text files to a checkpoint."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Integer

from jsparse.models import load_tokenizer
from jsparse.models.checkpoint import load_config
from jsparse.models.masking import ModelMask
from jsparse.models.sharding import batch_sharding, put, row_sharding
from jsparse.reports.console import print_facts
from jsparse.reports.options_file import as_yaml
from jsparse.reports.progress import print_line
from jsparse.train.config import FinetuneConfig
from jsparse.train.data.batches import batch_at, position_at, rows_at
from jsparse.train.data.run_data import (
    RunWindows,
    find_run_data,
    print_findings,
    removed_on_failure,
    store_run_data,
    warn_of_overlap,
    warn_of_windows,
)
from jsparse.train.data.windows import Windows
from jsparse.train.export import export_model
from jsparse.train.held_out import held_out_loss
from jsparse.train.preferences import held_out_preferences, reference_margins
from jsparse.train.run.checkpoint import Checkpoints, open_checkpoints
from jsparse.train.run.evaluations import EVAL, Evaluations, best_line
from jsparse.train.run.identity import (
    DATA,
    SETTINGS,
    checkpoint_folder,
    describe_run,
    has_held_out,
    steps_taken,
    with_commit,
)
from jsparse.train.run.loggers import loggers_open, require_loggers
from jsparse.train.run.loop import run_steps
from jsparse.train.run.processes import is_first_process, wait_for_all
from jsparse.train.start import extended_config, load_start, make_step
from jsparse.train.step import Metrics, Rewards, SplitModel, TrainState
from jsparse.train.summary import memory_line, summarize


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves.

    - output: the Hugging Face folder.
    - losses: one per step, from the first; nan if the step was skipped.
    - metrics: the last step's line of metrics.jsonl.
    - finished: whether all steps were taken, or ``config.patience`` was spent. A run that SIGTERM or Ctrl-C
      ended has written no model.
    - stopped_by: the number of the signal that ended a run that has not finished.
    - best_step, best_loss: the step with the lowest held-out loss so far, and that loss; None without one.
    - exported_step: the step whose model was written; None if the run has not finished.
    """

    output: Path
    losses: tuple[float, ...]
    metrics: dict[str, Any]
    finished: bool = True
    stopped_by: int | None = None
    best_step: int | None = None
    best_loss: float | None = None
    exported_step: int | None = None


def finetune(config: FinetuneConfig, *, progress: bool = True) -> FinetuneResult:
    """Train ``config.model`` on ``config.data`` and write a Hugging Face folder to ``config.output``.

    LoRA on q, k, v and o, with embeddings and norms trained beside it, is merged into the weights at the
    end. A context within the model's own is read with full attention. For a longer one the default is
    LongLoRA: linear position interpolation, whose factor multiplies the checkpoint's and is saved in the new
    config.json, and attention in shifted groups, which never see a later token. The result is an ordinary
    Llama: serve it with full or any sparse attention.

    During the run, ``output`` holds ``metrics.jsonl`` (one line per step: step, loss, tokens that had a
    target, tokens read per second, learning rate, gradient norm before clipping, steps skipped so far),
    ``checkpoints/`` and ``data/`` (the text as tokens). config.json, the weights and attention_pattern.json,
    which says what each head saw, are written at the end. After an interruption, the same call resumes from
    the last checkpoint, bit for bit as if nothing had happened. SIGTERM or Ctrl-C ends a run after the
    current step, with a checkpoint; a second Ctrl-C ends it at once.

    A step is skipped and counted if its loss or gradient is not finite; its line has null for them. Windows
    without any target, such as a last one that holds one token, are not taken.

    With ``config.eval_data``, the line of every step after which held-out loss was measured has it under
    "eval": loss, perplexity and tokens of all, and of "documents" and "instructions" alone. The first line
    also has it under "eval_before", as it was before the first step. The checkpoint of the lowest loss is
    kept, and its model is written at the end. Samples of the held-out data that are in the training data too
    are counted in a warning. A run that is resumed may get held-out data that it did not have.

    With ``config.dpo_beta``, the data are pairs of answers, and the loss is that of direct preference
    optimisation against the model before the run. Lines then also have "reward_margin" and
    "reward_accuracy", the means over the pairs of the step.

    With a ``config.mesh``, the run uses all devices of all processes (call ``jax.distributed.initialize``
    first). Every process must make this call and see the same files.

    - config: the settings of the run.
    - progress: say on stderr what the run is about to do, and how far it is: with a bar in a terminal,
      elsewhere with a line now and then.

    Returns the losses, and whether the run has finished.

    Raises, before training and before anything is written: ValueError or FileNotFoundError for a checkpoint,
    data file or output folder that is missing, cannot be used or does not fit the others; FileExistsError
    for an output folder with other files; ValueError, naming the difference, if its checkpoints belong to
    another run. While training: FloatingPointError, naming the step, if ``config.max_skipped`` steps in a row
    were not finite; OSError if a checkpoint cannot be written.

    Sources: LongLoRA (arXiv 2309.12307), DPO (arXiv 2305.18290).
    """
    require_loggers(config.log_to)
    config = with_commit(config)
    base_config = load_config(config.model)
    model_config = extended_config(config, base_config)
    asked, config = config, config.for_model(base_config)
    pattern = config.pattern(model_config)
    mask = pattern.masks(model_config, config.context)
    data = find_run_data(config, load_tokenizer(config.model), base_config)
    run = describe_run(config, data.digest, model_config, pattern, eval_digest=data.eval_digest)
    steps_taken(config, run)
    mesh = config.mesh.make() if config.mesh.devices > 1 or jax.process_count() > 1 else None
    state, split = load_start(config, model_config, mesh)
    with removed_on_failure(config.output_folder, config.output_folder / DATA):
        stored = store_run_data(data, config.output_folder, progress=progress)
        windows, rows, held_out = stored.windows, stored.rows, stored.held_out
        config = config.for_windows(len(rows))
        run = describe_run(config, data.digest, model_config, pattern, eval_digest=data.eval_digest)
        start = steps_taken(config, run)
    is_held_out_new = not has_held_out(config.output_folder)
    wait_for_all("run")  # all have looked into the folder before the first process makes something there
    evaluations, reference = None, None
    if config.dpo_beta is not None:
        folder = config.output_folder / DATA
        with _mesh_in_context(mesh):
            reference = reference_margins(config, split, mask, mesh, windows, state, folder=folder, run=run)
    if held_out is not None:
        with _mesh_in_context(mesh):
            measure = _measure(config, split, mesh, held_out, state)
        evaluations = Evaluations(measure, config.evaluation_interval, config.patience)
    if is_first_process():
        _describe_new(config, stored, start == 0, is_held_out_new, progress=progress)
    _write_settings(asked)
    with loggers_open(
        config.log_to,
        config.output_folder,
        run["config"],
        start=start,
        steps=config.total_steps,
        quiet=not progress,
    ) as logs:
        with (
            open_checkpoints(checkpoint_folder(config.output_folder), writable=True) as checkpoints,
            _mesh_in_context(mesh),
        ):
            if start:
                state = checkpoints.restore(start, state)
            if progress and start < config.total_steps and is_first_process():
                trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
                counts = {"trained": trained, "windows": len(rows), "start": start}
                chosen = asked.attention is None
                print_facts(summarize(config, base_config, model_config, pattern, chosen=chosen, **counts))

            def save(step: int, state: TrainState, best: int | None) -> None:
                position = position_at(len(rows), step, config.batch_size)
                checkpoints.save(
                    step, state, run | {"position": position, "form": stored.findings.form}, keep=best
                )

            state, metrics, stopped_by = run_steps(
                state,
                _step_taker(config, split, mask, mesh, windows, rows, reference, progress=progress),
                output=config.output_folder,
                steps=config.total_steps,
                checkpoint_every=config.checkpoint_every,
                save=save,
                name="training",
                note=_note,
                progress=progress,
                evaluations=evaluations,
                log=logs.log,
            )
            best = None if held_out is None else best_line(metrics)
            exported_step = None
            if stopped_by is None:
                exported_step = int(state.step) if best is None or config.export_last else best["step"]
                state = _state_of(exported_step, state, checkpoints)
            else:
                logs.stopped()
        if exported_step is not None:
            export_model(config, split.exported(state.params), pattern, form=stored.findings.form)
            if is_first_process():
                shutil.rmtree(config.output_folder / DATA)
            wait_for_all("export")
    return FinetuneResult(
        config.output_folder,
        losses=tuple(math.nan if line["loss"] is None else line["loss"] for line in metrics),
        metrics=metrics[-1] if metrics else {},
        finished=stopped_by is None,
        stopped_by=stopped_by,
        best_step=None if best is None else best["step"],
        best_loss=None if best is None else best[EVAL]["loss"],
        exported_step=exported_step,
    )


def _describe_new(
    config: FinetuneConfig, stored: RunWindows, is_new: bool, is_held_out_new: bool, *, progress: bool
) -> None:
    """What was found in the data, and warnings of it: before the first step that they are there for."""
    if progress and is_new:
        print_findings(stored.findings, "data")
    if progress and is_held_out_new:
        print_findings(stored.eval_findings, "eval_data")
    if is_new:
        warn_of_windows(stored)
    if is_held_out_new:
        warn_of_overlap(stored, pairs=config.reading.pairs)


def _state_of(step: int, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state after a step; ``state``, the last one, is given up first if it is another."""
    if step == int(state.step):
        return state
    if step not in checkpoints.steps():
        raise FileNotFoundError(
            f"the checkpoint of step {step}, which has the lowest held-out loss, is gone; export_last=True "
            f"writes the model of step {int(state.step)} instead"
        )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)  # two at a time may not fit
    return checkpoints.restore(step, like)


def _mesh_in_context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext()


def _measure(
    config: FinetuneConfig, split: SplitModel, mesh: Mesh | None, held_out: Windows, state: TrainState
) -> Callable[[TrainState], dict[str, Any]]:
    """What is measured of the held-out data. ``state``: before the first step."""
    if config.dpo_beta is None:
        return held_out_loss(config, split, mesh, held_out)
    return held_out_preferences(config, split, mesh, held_out, state)


def _write_settings(config: FinetuneConfig) -> None:
    """All settings as a file from which the command line runs, or resumes, the same run."""
    if is_first_process():
        path = config.output_folder / SETTINGS
        head = f"# In the folder where the run began: jsparse finetune --config {path}\n"
        path.write_text(head + as_yaml(config), encoding="utf-8")


def _step_taker(
    config: FinetuneConfig,
    split: SplitModel,
    mask: ModelMask,
    mesh: Mesh | None,
    windows: Windows,
    rows: Integer[np.ndarray, " M"],
    reference: Float32[np.ndarray, "N P"] | None,
    *,
    progress: bool,
) -> Callable[[int, TrainState], tuple[TrainState, dict[str, Any]]]:
    """``take_step(step, state) -> state, line of metrics.jsonl``."""
    compiled = None

    def take_step(step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        nonlocal compiled
        batch = _batch(config, windows, rows, reference, step, mesh)
        if compiled is None:  # compiled here, so that the first step is not timed with it
            compiled = make_step(config, split, mask, mesh).lower(state, split.frozen, *batch).compile()
            if progress and is_first_process():
                print_line(memory_line(compiled, state, split))
        began = time.perf_counter()
        state, result = compiled(state, split.frozen, *batch)
        return state, _metrics_line(config, step + 1, result, began)

    return take_step


def _batch(
    config: FinetuneConfig,
    windows: Windows,
    rows: Integer[np.ndarray, " M"],
    reference: Float32[np.ndarray, "N P"] | None,
    step: int,
    mesh: Mesh | None,
) -> tuple:
    """Tokens, segment ids and scored tokens, [micro-batches, B, T] each, and the margins of pairs."""
    order = {"batch_size": config.batch_size, "seed": config.seed}
    batch = batch_at(windows, step, among=rows, **order)
    beside = () if reference is None else (np.array(reference[rows_at(rows, step, **order)]),)
    parts = tuple(x.reshape(config.micro_batches, -1, x.shape[-1]) for x in (*batch, *beside))
    if mesh is None:
        return parts
    shardings = [batch_sharding(mesh)] * 3 + [row_sharding(mesh)] * len(beside)
    return tuple(put(x, sharding) for x, sharding in zip(parts, shardings, strict=True))


def _metrics_line(config: FinetuneConfig, step: int, result: Metrics, began: float) -> dict[str, Any]:
    """One line of metrics.jsonl. Waits for the end of the step, which started at ``began``."""
    loss, grad_norm, tokens = float(result.loss), float(result.grad_norm), int(result.tokens)
    skipped, in_row = int(result.skipped), int(result.skipped_in_row)
    if in_row >= config.max_skipped:
        raise FloatingPointError(
            f"step {step}: loss is {loss} and the gradient's norm {grad_norm}, and so were not finite in "
            f"max_skipped={config.max_skipped} steps in a row. Earlier checkpoints are kept; a lower "
            "learning_rate or a longer warm-up may help, in a new output folder"
        )
    is_skipped = in_row > 0 or tokens == 0
    return {
        "step": step,
        "loss": None if is_skipped else loss,
        "tokens": tokens,
        "tokens_per_second": config.batch_size * config.context / (time.perf_counter() - began),
        # The optimizer does not count the steps that were skipped.
        "learning_rate": config.learning_rate_at(step - 1 - skipped + (1 if is_skipped else 0)),
        "grad_norm": None if is_skipped else grad_norm,
        "skipped": skipped,
        **({} if result.rewards is None or is_skipped else _rewards_line(result.rewards)),
    }


def _rewards_line(rewards: Rewards) -> dict[str, float]:
    return {"reward_margin": float(rewards.margin), "reward_accuracy": float(rewards.accuracy)}


def _note(line: dict[str, Any]) -> str:
    loss = "step skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"
    skipped = f", {line['skipped']} skipped" if line["skipped"] else ""
    return f"{loss}, {line['tokens_per_second']:,.0f} tokens/s{skipped}"
