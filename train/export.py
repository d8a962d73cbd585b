"""From a run to files that others read: a Hugging Face folder, or an adapter in PEFT's format."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jsparse.checks import require_new_folder
from jsparse.hub import model_folder, pinned_model, split_id
from jsparse.models import (
    Llama,
    has_lora,
    load_adapter,
    load_config,
    load_tokenizer,
    merge_lora,
    save_adapter,
)
from jsparse.models.adapter_config import CONFIG as ADAPTER_CONFIG
from jsparse.models.adapter_config import named_base
from jsparse.models.end_token import also_ends_at, end_token
from jsparse.models.patterns import AttentionPattern, save_pattern
from jsparse.models.sharding import MeshConfig
from jsparse.train.config import FinetuneConfig
from jsparse.train.merge_config import MergeConfig as MergeConfig
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.run.identity import checkpoint_folder, digest_model
from jsparse.train.run.processes import is_first_process
from jsparse.train.start import extended_config, is_trained, load_start

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export_model(
    config: FinetuneConfig, model: Llama, pattern: AttentionPattern, output: Path | None = None
) -> None:
    """Merge the adapters and write the Hugging Face folder.

    The tokenizer comes first, because the config.json, written last, makes the folder a model.
    """
    output = config.output_folder if output is None else output
    if has_lora(model):
        merge_lora(model)
    tokenizer = load_tokenizer(config.model)
    model.config = also_ends_at(model.config, end_token(config.model, tokenizer, model.config))
    if jax.process_count() > 1:
        model = _gathered(model)
    if is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(config.model_folder, output)
        save_pattern(pattern, output)
        model.save_pretrained(output)


def copy_tokenizer(model: Path, output: Path) -> None:
    """Copy the tokenizer's files unchanged."""
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, output / name)


def _gathered(model: Llama) -> Llama:
    """The whole model, on every process."""
    from jax.experimental import multihost_utils

    graphdef, state = nnx.split(model)
    whole = jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), state)
    return nnx.merge(graphdef, whole)


def merge(merging: MergeConfig) -> int | None:
    """Write a Hugging Face folder with the adapters merged, or an adapter.

    - merging: the run or the adapter, and what to write where.

    Returns the step of the checkpoint that was taken; None for an adapter.

    Raises FileNotFoundError for a run without checkpoints or without that step, and for a base that is not
    there; ValueError for a base model that is not the run's, for an adapter of a run that trained all
    weights, and for one that does not fit its base; FileExistsError for an output folder that is not empty.
    """
    output = Path(merging.output)
    require_new_folder(output)
    adapter = Path(merging.run) if split_id(merging.run) is None else model_folder(merging.run, weights=True)
    if (adapter / ADAPTER_CONFIG).is_file():
        _merge_adapter(merging, adapter, output)
        return None
    folder = checkpoint_folder(Path(merging.run))
    with open_checkpoints(folder, writable=False) as checkpoints:
        steps = checkpoints.steps()
        step = max(steps, default=None) if merging.step is None else merging.step
        if step is None or step not in steps:
            asked = "" if step is None else f" of step {step}"
            raise FileNotFoundError(f"{folder} has no checkpoint{asked}; it has steps {steps}")
        run = checkpoints.read_run(step)
        config = run_config(run, model=merging.model)
        config = dataclasses.replace(config, model=pinned_model(config.model))
        if merging.adapter and config.lora_rank is None:
            raise ValueError(f"{merging.run} trained all weights, without adapters; leave --adapter away")
        if digest_model(config.model_folder) != run["model"]:
            raise ValueError(
                f"model={config.model} has other content than the model that the run started from"
            )
        model_config = extended_config(config, load_config(config.model))
        state, split = load_start(config, model_config, mesh=None)
        state = checkpoints.restore(step, state)
    model = split.exported(state.params)
    if merging.adapter:
        save_adapter(model, output, base=config.model, trained=is_trained(config))
        copy_tokenizer(config.model_folder, output)
    else:
        export_model(config, model, AttentionPattern.from_json(json.dumps(run["attention"])), output)
    return step


def _merge_adapter(merging: MergeConfig, adapter: Path, output: Path) -> None:
    """Write the model of an adapter and its base, with the adapter's tokenizer, or else the base's."""
    if merging.step is not None:
        raise ValueError(
            f"step={merging.step} is of a run's checkpoints, but run={merging.run} is an adapter"
        )
    if merging.adapter:
        raise ValueError(f"run={merging.run} is an adapter already; leave --adapter away")
    base = named_base(adapter) if merging.model is None else merging.model
    if base is None:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} names no base: --model must say where it is")
    try:
        model = Llama.from_pretrained(base)
    except FileNotFoundError as error:
        if merging.model is not None:
            raise
        named = f"{adapter / ADAPTER_CONFIG} names it as the base; --model says where else it is"
        raise FileNotFoundError(f"{error}. {named}") from error
    load_adapter(model, adapter)
    merge_lora(model)
    output.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(adapter if (adapter / "tokenizer.json").is_file() else model_folder(base), output)
    model.save_pretrained(output)


def run_config(run: dict, *, model: str | Path | None = None) -> FinetuneConfig:
    """The settings that a run was started with, for one device, from the description in its checkpoints."""
    fields: dict[str, Any] = dict(run["config"], mesh=MeshConfig())
    for name in ("lora_targets", "lora_layers", "modules_to_save", "full_layers"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    if model is not None:
        fields["model"] = model
    return FinetuneConfig(**fields)
