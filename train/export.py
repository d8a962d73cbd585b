"""From a run to files that others read: a Hugging Face folder, or an adapter in PEFT's format."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jsparse.checks import require_new_folder
from jsparse.hub import GENERATION_FILE, model_folder, pinned_model, split_id
from jsparse.models import (
    Llama,
    LlamaConfig,
    has_lora,
    load_config,
    load_tokenizer,
    merge_lora,
    save_adapter,
)
from jsparse.models.adapter_config import CONFIG as ADAPTER_CONFIG
from jsparse.models.adapter_config import named_base
from jsparse.models.adapter_loading import POSITION_FIELDS
from jsparse.models.checkpoint import generation_fields
from jsparse.models.companions import (
    companions,
    companions_of_merged,
    copy_files,
    same_tokens,
)
from jsparse.models.end_token import also_ends_at, end_token
from jsparse.models.hf_config import token_ids
from jsparse.models.merge_adapters import agreed_config, merge_adapters
from jsparse.models.patterns import AttentionPattern, save_pattern
from jsparse.models.positions import note
from jsparse.models.safetensors_folder import read_json, write_json
from jsparse.models.sharding import MeshConfig
from jsparse.reports.options_file import read_options
from jsparse.texts.chat_template import template_sources
from jsparse.texts.plain_form import TEMPLATE_FILE, plain_chat_template
from jsparse.train.config import FinetuneConfig
from jsparse.train.merge_config import MergeConfig as MergeConfig
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.run.evaluations import best_line
from jsparse.train.run.identity import SETTINGS, checkpoint_folder, digest_model, metrics_until
from jsparse.train.run.processes import is_first_process
from jsparse.train.start import extended_config, is_trained, load_start


def export_model(
    config: FinetuneConfig,
    model: Llama,
    pattern: AttentionPattern,
    output: Path | None = None,
    *,
    form: str = "",
) -> None:
    """Merge the adapters and write the Hugging Face folder.

    The tokenizer and its like come first, because the config.json, written last, makes the folder a model.

    - form: what rendered the instructions and conversations of the run (``Findings.form``).
    """
    output = config.output_folder if output is None else output
    if has_lora(model):
        merge_lora(model)
    model.config = _stopping_config(config, model)
    if jax.process_count() > 1:
        model = _gathered(model)
    if is_first_process():
        _copy_companions(config, output, form)
        save_pattern(pattern, output)
        model.save_pretrained(output)


def _copy_companions(config: FinetuneConfig, output: Path, form: str) -> None:
    """The files beside the weights, and the plain form as chat template if the run taught it to the model."""
    copy_files(companions(config.model_folder), output)
    if form == "plain":
        tokenizer = load_tokenizer(config.model)
        template = plain_chat_template(
            tokenizer, end_token(config.model, tokenizer, load_config(config.model))
        )
        (output / TEMPLATE_FILE).write_text(template.templates["default"].source, encoding="utf-8")


def _stopping_config(config: FinetuneConfig, model: Llama) -> LlamaConfig:
    """The model's config, which also stops at the token that ended texts in training."""
    tokenizer = load_tokenizer(config.model)
    return also_ends_at(model.config, end_token(config.model, tokenizer, model.config))


def _gathered(model: Llama) -> Llama:
    """The whole model, on every process."""
    from jax.experimental import multihost_utils

    graphdef, state = nnx.split(model)
    whole = jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), state)
    return nnx.merge(graphdef, whole)


class Merged(NamedTuple):
    """What was merged: the step of a run's checkpoint, None for adapters, and the base model, by its name.

    ``best`` is whether the step was taken for its held-out loss.
    """

    step: int | None
    base: str
    best: bool = False


def merge(merging: MergeConfig) -> int | None:
    """Write a Hugging Face folder with the adapters merged, or an adapter.

    Tokenizer, chat template, generation_config.json and licence are the base model's; an adapter that brings
    its own tokenizer keeps it.

    - merging: the run or the adapters, and what to write where.

    Returns the step of the checkpoint that was taken; None for adapters.

    Raises FileNotFoundError for a run without checkpoints or without that step, its best one included, and
    for a base that is not there; ValueError for a base model that is not the run's, for an adapter of a run
    that trained all weights, for one that does not fit its base, and for several that disagree in their
    base, RoPE or tokenizer; FileExistsError for an output folder that is not empty.
    """
    return write_merged(merging).step


def write_merged(merging: MergeConfig) -> Merged:
    """What :func:`merge` does."""
    output = Path(merging.output)
    require_new_folder(output)
    folders = [
        Path(run) if split_id(run) is None else model_folder(run, weights=True) for run in merging.runs
    ]
    are_adapters = [(folder / ADAPTER_CONFIG).is_file() for folder in folders]
    if all(are_adapters):
        return _merge_adapters(merging, folders, output)
    run = merging.runs[are_adapters.index(False)]
    if len(folders) > 1 or merging.weights is not None:
        raise ValueError(
            f"weights are for adapters, but run={run} has no {ADAPTER_CONFIG}; of a run, jsparse merge --run "
            f"{run} --adapter --output NEW_FOLDER writes an adapter"
        )
    return _merge_run(merging, run, output)


def _merge_run(merging: MergeConfig, run: str | Path, output: Path) -> Merged:
    """Write the model or the adapter of a checkpoint: that of a given step, or the one the run writes."""
    folder = checkpoint_folder(Path(run))
    with open_checkpoints(folder, writable=False) as checkpoints:
        steps = checkpoints.steps()
        best = _best_step(Path(run), max(steps)) if steps and merging.step is None else None
        step = best if merging.step is None else merging.step
        step = max(steps, default=None) if step is None else step
        if step is None or step not in steps:
            raise FileNotFoundError(_no_checkpoint(folder, step, best, steps))
        described = checkpoints.read_run(step)
        config = run_config(described, model=merging.model)
        try:
            config = dataclasses.replace(config, model=pinned_model(config.model))
        except FileNotFoundError as error:
            if merging.model is not None:
                raise
            raise FileNotFoundError(f"{error}. {run} began with it; --model says where else it is") from error
        if merging.adapter and config.lora_rank is None:
            raise ValueError(f"{run} trained all weights, without adapters; leave out --adapter")
        if digest_model(config.model_folder) != described["model"]:
            raise ValueError(
                f"model={config.model} has other content than the model that the run started from"
            )
        model_config = extended_config(config, load_config(config.model))
        state, split = load_start(config, model_config, mesh=None)
        state = checkpoints.restore(step, state)
    model = split.exported(state.params)
    if merging.adapter:
        model.config = _stopping_config(config, model)
        _copy_companions(config, output, described.get("form", ""))
        write_json(output / GENERATION_FILE, generation_fields(output, model.config))
        save_adapter(model, output, base=config.model, trained=is_trained(config))
    else:
        pattern = AttentionPattern.from_json(json.dumps(described["attention"]))
        export_model(config, model, pattern, output, form=described.get("form", ""))
    return Merged(step, str(config.model), best=best is not None)


def _best_step(run: Path, last: int) -> int | None:
    """The step with the lowest held-out loss up to the last checkpoint, which is the one that the run writes.

    None if there is none, or if the run writes the last step nevertheless. run.yaml says how it was started
    last: a run that had finished then has no newer checkpoint.
    """
    best = best_line(metrics_until(run, last))
    settings = run / SETTINGS
    exports_last = settings.is_file() and read_options(settings).get("export_last", False)
    return None if best is None or exports_last else best["step"]


def _no_checkpoint(folder: Path, step: int | None, best: int | None, steps: list[int]) -> str:
    if best is not None:
        return (
            f"{folder}: the checkpoint of step {step}, which has the lowest held-out loss, is gone; --step "
            f"takes another of {steps}"
        )
    asked = "" if step is None else f" of step {step}"
    return f"{folder} has no checkpoint{asked}; it has steps {steps}"


def _merge_adapters(merging: MergeConfig, adapters: list[Path], output: Path) -> Merged:
    """Write the model of adapters and their base, with an adapter's tokenizer, or else the base's."""
    what = f"run={merging.run} is an adapter" if len(adapters) == 1 else "several runs are adapters"
    if merging.step is not None:
        raise ValueError(f"step={merging.step} is of a run's checkpoints, but {what}")
    if merging.adapter:
        raise ValueError(f"{what} already; leave out --adapter")
    base = _common_base(adapters) if merging.model is None else merging.model
    tokenizer = _common_tokenizer(adapters)  # and the chat template beside it
    try:
        agreed_config(adapters, load_config(base))  # before weights are read
        model = Llama.from_pretrained(base)
    except FileNotFoundError as error:
        if merging.model is not None:
            raise
        named = f"{adapters[0] / ADAPTER_CONFIG} names it as the base; --model says where else it is"
        raise FileNotFoundError(f"{error}. {named}") from error
    weights = [1.0] * len(adapters) if merging.weights is None else merging.weights
    merge_adapters(model, list(zip(adapters, weights, strict=True)))
    for token in (token for adapter in adapters for token in _stops(adapter)):
        model.config = also_ends_at(model.config, token)
    folder = model_folder(base)
    files = companions(folder) if tokenizer is None else companions_of_merged(folder, tokenizer)
    copy_files(files, output)
    model.save_pretrained(output)
    return Merged(None, str(base))


def loading_advice(output: Path, base: str) -> str | None:
    """What transformers must be given to load what :func:`merge` wrote; None where RoPE is the base's.

    - output: the folder of a model or an adapter.
    - base: the model that it comes from, a folder or an id.
    """
    ours, theirs = load_config(output), load_config(base)
    if all(getattr(ours, name) == getattr(theirs, name) for name in POSITION_FIELDS):
        return None
    if not (output / ADAPTER_CONFIG).is_file():
        return (
            f"its RoPE is extended; from_pretrained({str(output)!r}) needs nothing else: config.json has it"
        )
    name, revision = split_id(base) or (base, None)
    at = "" if revision is None else f", revision={revision!r}"
    return (
        "its RoPE is extended, and PEFT has no place for that: in transformers, load the base with it\n"
        f"  config = AutoConfig.from_pretrained({str(output)!r})\n"
        f"  base = AutoModelForCausalLM.from_pretrained({name!r}{at}, config=config)\n"
        f"  model = PeftModel.from_pretrained(base, {str(output)!r})"
    )


def _stops(adapter: Path) -> tuple[int, ...]:
    """The stop tokens in an adapter's folder, which has them if a run wrote it."""
    if (adapter / "config.json").is_file():
        return load_config(adapter).eos_token_ids
    file = adapter / GENERATION_FILE
    return token_ids(read_json(file).get("eos_token_id"), "eos_token_id") if file.is_file() else ()


def _common_base(adapters: list[Path]) -> str:
    """The base that all adapters name."""
    bases = {adapter: named_base(adapter) for adapter in adapters}
    for adapter, base in bases.items():
        if base is None:
            raise ValueError(f"{adapter / ADAPTER_CONFIG} names no base: --model must say where it is")
        if base != bases[adapters[0]]:
            raise ValueError(
                f"{adapters[0]} is an adapter of {bases[adapters[0]]}, and {adapter} of {base}; --model says "
                "which base they are merged with"
            )
    return str(bases[adapters[0]])


def _common_tokenizer(adapters: list[Path]) -> Path | None:
    """The first adapter that brings a tokenizer and, if any does, a chat template.

    The tokenizers must have the same tokens; where the chat templates differ, a note says which is taken.
    """
    own = [adapter for adapter in adapters if (adapter / "tokenizer.json").is_file()]
    for adapter in own[1:]:
        if not same_tokens(own[0], adapter):
            raise ValueError(
                f"the tokenizers of {own[0]} and {adapter} have different tokens, so the adapters do not add "
                "up"
            )
    templates = {adapter: template_sources(adapter) for adapter in own}
    first = next((adapter for adapter in own if templates[adapter]), own[0] if own else None)
    for adapter in own:
        if first is not None and templates[adapter] and templates[adapter] != templates[first]:
            note(
                f"{first} and {adapter} have different chat templates; the model gets that of {first}, which "
                "comes first"
            )
    return first


def run_config(run: dict, *, model: str | Path | None = None) -> FinetuneConfig:
    """The settings that a run was started with, for one device, from the description in its checkpoints."""
    fields: dict[str, Any] = dict(run["config"], mesh=MeshConfig())
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    if model is not None:
        fields["model"] = model
    return FinetuneConfig(**fields)
