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
from jax.sharding import Mesh

from jsparse.models import LlamaConfig, load_tokenizer
from jsparse.models.checkpoint import load_config
from jsparse.models.end_token import end_token
from jsparse.models.masking import ModelMask
from jsparse.models.positions import note
from jsparse.models.sharding import batch_sharding, put
from jsparse.texts.documents import check_files
from jsparse.train.config import FinetuneConfig
from jsparse.train.data.batches import batch_at, digest_data, position_at
from jsparse.train.data.windows import HEADER, Windows, open_windows, write_windows
from jsparse.train.export import export_model
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.run.identity import (
    DATA,
    checkpoint_folder,
    describe_run,
    steps_taken,
    with_commit,
)
from jsparse.train.run.loop import run_steps
from jsparse.train.run.processes import is_first_process, wait_for_all
from jsparse.train.start import extended_config, load_start, make_step
from jsparse.train.step import Metrics, SplitModel, TrainState


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves.

    - output: the Hugging Face folder.
    - losses: one per step, from the first; nan if the step was skipped.
    - metrics: the last step's line of metrics.jsonl.
    - finished: whether all steps were taken. A run that SIGTERM ended has written no model.
    """

    output: Path
    losses: tuple[float, ...]
    metrics: dict[str, Any]
    finished: bool = True


def finetune(config: FinetuneConfig, *, progress: bool = True) -> FinetuneResult:
    """Train ``config.model`` on ``config.data`` and write a Hugging Face folder to ``config.output``.

    LoRA on q, k, v and o, with embeddings and norms trained beside it, is merged into the weights at the
    end. A context within the model's own is read with full attention. For a longer one the default is
    LongLoRA: linear position interpolation, whose factor multiplies the checkpoint's and is saved in the new
    config.json, and attention in shifted groups, which never see a later token. The result is an ordinary
    Llama: serve it with full or any sparse attention.

    During the run, ``output`` holds ``metrics.jsonl`` (one line per step: step, loss, tokens that had a
    target, tokens per second, learning rate, gradient norm before clipping, steps skipped so far),
    ``checkpoints/`` and ``data/`` (the text as tokens). config.json, the weights and attention_pattern.json,
    which says what each head saw, are written at the end. After an interruption, the same call resumes from
    the last checkpoint, bit for bit as if nothing had happened. SIGTERM ends a run after the current step,
    with a checkpoint.

    A step is skipped and counted if its loss or gradient is not finite; its line has null for them.

    With a ``config.mesh``, the run uses all devices of all processes (call ``jax.distributed.initialize``
    first). Every process must make this call and see the same files.

    - config: the settings of the run.
    - progress: show a progress bar, if stderr is a terminal.

    Returns the losses, and whether the run has finished.

    Raises, before training and before anything is written: ValueError or FileNotFoundError for a checkpoint,
    data file or output folder that is missing, cannot be used or does not fit the others; FileExistsError
    for an output folder with other files; ValueError, naming the difference, if its checkpoints belong to
    another run. While training: FloatingPointError, naming the step, if ``config.max_skipped`` steps in a row
    were not finite; OSError if a checkpoint cannot be written.

    Source: LongLoRA (arXiv 2309.12307).
    """
    check_files(config.data_files)
    config = with_commit(config)
    base_config = load_config(config.model)
    model_config = extended_config(config, base_config)
    asked, config = config, config.for_model(base_config)
    pattern = config.pattern(model_config)
    mask = pattern.masks(model_config, config.context)
    tokenizer = load_tokenizer(config.model)
    eos = end_token(config.model, tokenizer, base_config)
    digest = digest_data(config.data_files, tokenizer, context=config.context, eos_token_id=eos)
    run = describe_run(config, digest, model_config, pattern)
    start = steps_taken(config, run)
    mesh = config.mesh.make() if config.mesh.devices > 1 or jax.process_count() > 1 else None
    state, split = load_start(config, model_config, mesh)
    if asked.attention is None:
        where = "within" if config.attention == "full" else "beyond"
        note(
            f"attention is {config.attention!r}: context={config.context} is {where} the model's own context"
        )
    windows = _windows(config, tokenizer, model_config, digest, eos_token_id=eos, progress=progress)
    with (
        open_checkpoints(checkpoint_folder(config.output_folder), writable=True) as checkpoints,
        jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext(),
    ):
        if start:
            state = checkpoints.restore(start, state)

        def save(step: int, state: TrainState) -> None:
            position = position_at(len(windows), step, config.batch_size)
            checkpoints.save(step, state, run | {"position": position})

        state, metrics = run_steps(
            state,
            _step_taker(config, split, mask, mesh, windows),
            output=config.output_folder,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            save=save,
            name="training",
            note=_note,
            progress=progress,
        )
    finished = int(state.step) == config.steps
    if finished:
        export_model(config, split.exported(state.params), pattern)
        if is_first_process():
            shutil.rmtree(config.output_folder / DATA)
        wait_for_all("export")
    losses = tuple(math.nan if line["loss"] is None else line["loss"] for line in metrics)
    return FinetuneResult(config.output_folder, losses, metrics[-1] if metrics else {}, finished)


def _windows(
    config: FinetuneConfig,
    tokenizer: Any,
    model_config: LlamaConfig,
    digest: str,
    *,
    eos_token_id: int | None,
    progress: bool,
) -> Windows:
    """The data as windows of tokens on disk: from an earlier call, or made now by the first process."""
    folder = config.output_folder / DATA / digest[:16]
    if is_first_process() and not (folder / HEADER).is_file():
        write_windows(
            config.data_files,
            tokenizer,
            folder,
            context=config.context,
            eos_token_id=eos_token_id,
            vocab_size=model_config.vocab_size,
            progress=progress,
        )
    wait_for_all("data")
    return open_windows(folder)


def _step_taker(
    config: FinetuneConfig, split: SplitModel, mask: ModelMask, mesh: Mesh | None, windows: Windows
) -> Callable[[int, TrainState], tuple[TrainState, dict[str, Any]]]:
    """``take_step(step, state) -> state, line of metrics.jsonl``."""
    compiled = None

    def take_step(step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        nonlocal compiled
        batch = _batch(config, windows, step, mesh)
        if compiled is None:  # compiled here, so that the first step is not timed with it
            compiled = make_step(config, split, mask, mesh).lower(state, split.frozen, *batch).compile()
        began = time.perf_counter()
        state, result = compiled(state, split.frozen, *batch)
        return state, _metrics_line(config, step + 1, result, began)

    return take_step


def _batch(config: FinetuneConfig, windows: Windows, step: int, mesh: Mesh | None) -> tuple:
    """Tokens, segment ids and which tokens are scored, [micro-batches, B, T] each."""
    batch = batch_at(windows, step, batch_size=config.batch_size, seed=config.seed)
    parts = tuple(x.reshape(config.micro_batches, -1, config.context) for x in batch)
    return parts if mesh is None else tuple(put(x, batch_sharding(mesh)) for x in parts)


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
    return {
        "step": step,
        "loss": None if in_row else loss,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        # The optimizer does not count the steps that were skipped.
        "learning_rate": config.learning_rate_at(step - 1 - skipped + (1 if in_row else 0)),
        "grad_norm": None if in_row else grad_norm,
        "skipped": skipped,
    }


def _note(line: dict[str, Any]) -> str:
    loss = "step skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"
    skipped = f", {line['skipped']} skipped" if line["skipped"] else ""
    return f"{loss}, {line['tokens_per_second']:,.0f} tokens/s{skipped}"
