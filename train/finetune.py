"""Fine-tuning (LongLoRA) and pretraining: from a checkpoint and text files to a checkpoint."""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, load_tokenizer, merge_lora
from jsparse.models.checkpoint import load_config
from jsparse.models.llama import Mask
from jsparse.train.checkpoint import open_checkpoints
from jsparse.train.config import FinetuneConfig
from jsparse.train.data import Windows, batch_at, check_files, pack, read_documents
from jsparse.train.longlora import is_trained_with_lora, shifted_head_masks
from jsparse.train.progress import progress_bar
from jsparse.train.run import METRICS, checkpoint_folder, describe_run, steps_taken
from jsparse.train.step import Metrics, SplitModel, TrainState, split_model, train_step

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """``output``: the Hugging Face folder. ``losses``: one a step, from the first. ``metrics``: the last
    step's line.
    """

    output: Path
    losses: tuple[float, ...]
    metrics: dict[str, Any]


def finetune(config: FinetuneConfig, *, progress: bool = True) -> FinetuneResult:
    """Train ``config.model`` on ``config.data`` and write a Hugging Face folder to ``config.output``.

    LongLoRA (arXiv 2309.12307) by default: a context beyond the model's own is reached by linear position
    interpolation, which multiplies with what the checkpoint has and is saved in the new config.json;
    attention in shifted groups, which never see a later token; LoRA on q, k, v and o with embeddings and
    norms trained beside it, merged into the weights at the end. The result is an ordinary Llama: serve it
    with full or any sparse attention.

    While it runs, ``output`` holds ``metrics.jsonl`` (a line a step: step, loss, tokens that had a target,
    tokens a second, learning rate, gradient norm before clipping) and ``checkpoints/``. config.json and the
    weights appear at the end. The same call after an interruption goes on from the last checkpoint, bit for
    bit as if nothing had happened.

    progress: a progress bar, if stderr is a terminal.

    Raises, before training and before anything is written: ValueError or FileNotFoundError for a checkpoint,
    data file or output folder that is not there, cannot be used or does not fit the others; FileExistsError
    for an output folder with other files; ValueError naming the difference where its checkpoints belong to
    another run. While training: FloatingPointError naming the step where the loss or the gradient is not
    finite.
    """
    check_files(config.data_files)
    model_config = load_config(config.model)
    mask = _mask(config, model_config)
    extended = model_config.extend_context(config.context)
    eos = model_config.eos_token_ids[0] if model_config.eos_token_ids else None
    documents = read_documents(
        config.data_files, load_tokenizer(config.model), eos_token_id=eos, vocab_size=model_config.vocab_size
    )
    windows = pack(documents, config.context)
    run = describe_run(config, windows)
    start = steps_taken(config, run)

    model = Llama.from_pretrained(config.model, dtype=config.dtype and jnp.dtype(config.dtype))
    if model.embed_tokens.embedding[...].dtype == jnp.float16:
        raise ValueError(
            f"dtype must be float32 or bfloat16, for {config.model} is stored as float16, which overflows"
        )
    model.config = extended
    if config.lora_rank is not None:
        add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, rngs=nnx.Rngs(config.seed))
    params, split = split_model(model, _trained(config))
    state = TrainState(params, config.optimizer().init(params), jnp.zeros((), jnp.int32))
    with open_checkpoints(checkpoint_folder(config), writable=True) as checkpoints:
        if start:
            state = checkpoints.restore(start, state)
        state, metrics = _train(
            config,
            split,
            mask,
            windows,
            state,
            save=lambda step, state: checkpoints.save(step, state, run),
            progress=progress,
        )
    _export(config, split.join(state.params, split.frozen))
    return FinetuneResult(
        config.output_folder, tuple(line["loss"] for line in metrics), metrics[-1] if metrics else {}
    )


def _mask(config: FinetuneConfig, model_config: LlamaConfig) -> Mask | None:
    group_size = config.shifted_group_size
    return None if group_size is None else shifted_head_masks(model_config.num_attention_heads, group_size)


def _trained(config: FinetuneConfig) -> Any:
    """Which parameters to train: a filter for ``nnx.split``."""
    if config.lora_rank is None:
        return nnx.Param
    return is_trained_with_lora if config.train_embeddings_and_norms else LoRAParam


def _train(
    config: FinetuneConfig,
    split: SplitModel,
    mask: Mask | None,
    windows: Windows,
    state: TrainState,
    *,
    save: Callable[[int, TrainState], None],
    progress: bool,
) -> tuple[TrainState, list[dict]]:
    """Take the steps that ``state`` has not taken; returns the last state and all lines of metrics.jsonl."""
    start = int(state.step)
    metrics = _metrics_until(config.output_folder / METRICS, start)
    take_step = None
    with open(config.output_folder / METRICS, "w", encoding="utf-8") as file, progress_bar(progress) as bar:
        file.writelines(json.dumps(line) + "\n" for line in metrics)
        file.flush()
        task = bar.add_task("training", total=config.steps, completed=start, note="compiling")
        for step in range(start, config.steps):
            batch = batch_at(windows, step, batch_size=config.batch_size, seed=config.seed)
            if take_step is None:  # compiled apart, so that the first step's tokens a second are its own
                jitted = train_step(split, config.optimizer(), mask, remat=config.remat)
                take_step = jitted.lower(state, split.frozen, *batch).compile()
            began = time.perf_counter()
            state, result = take_step(state, split.frozen, *batch)
            line = _metrics_line(step + 1, result, config.learning_rate_at(step), began)
            metrics.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            note = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, advance=1, note=note)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                os.fsync(file.fileno())  # whoever finds the checkpoint finds the metrics up to it
                save(step + 1, state)
    return state, metrics


def _metrics_line(step: int, result: Metrics, learning_rate: float, began: float) -> dict[str, Any]:
    """One line of metrics.jsonl; waits for the step, which ``began`` then."""
    loss, grad_norm, tokens = float(result.loss), float(result.grad_norm), int(result.tokens)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss is {loss} and the gradient's norm {grad_norm}. Earlier checkpoints are kept; "
            "a lower learning_rate or a longer warm-up may help, in a new output folder"
        )
    return {
        "step": step,
        "loss": loss,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
    }


def _metrics_until(path: Path, step: int) -> list[dict]:
    """The lines of an interrupted run's metrics.jsonl up to a step; those after it will be written again."""
    lines = path.read_text(encoding="utf-8").splitlines()[:step] if path.is_file() else []
    return [line for line in map(json.loads, lines) if line["step"] <= step]


def _export(config: FinetuneConfig, model: Llama) -> None:
    """Write the Hugging Face folder: the tokenizer first, for the folder becomes a model with its
    config.json.
    """
    if config.lora_rank is not None:
        merge_lora(model)
    for name in TOKENIZER_FILES:
        if (config.model_folder / name).is_file():
            shutil.copyfile(config.model_folder / name, config.output_folder / name)
    model.save_pretrained(config.output_folder)
