"""What the settings of a fine-tuning run must be, each alone and with one another."""

import dataclasses
from typing import Any

from jsparse.checks import (
    require_choice,
    require_fraction,
    require_integers,
    require_numbers,
    require_positive,
    require_seed,
)
from jsparse.integers import is_integer, require_integer
from jsparse.models.choices import EXTENSIONS, KINDS, REMAT
from jsparse.models.peft_names import check_pattern

BLOCK = 128  # tokens, of strided attention
GROUP_RATIO = 0.25  # of the context, by default
# Settings that say the same in two ways.
EITHER = (("epochs", "steps"), ("warmup_ratio", "warmup_steps"), ("group_ratio", "group_size"))
SERVICES = ("tensorboard", "wandb", "mlflow")

_CHOICES = {
    "attention": (None, *KINDS),
    "rope": (None, *EXTENSIONS),
    "base_bits": (None, 4, 8),
    "dtype": (None, "float32", "bfloat16"),
    "remat": REMAT,
    "schedule": ("constant", "cosine", "linear"),
}
# The kinds of attention that each setting is for.
_READ_BY = {
    ("group_size", "group_ratio"): ("shifted", "grouped"),
    ("sink", "window"): ("longgen", "streaming"),
    ("stride", "full_layers"): ("longgen",),
    ("head_pattern", "sparsity"): ("streaming",),
}
# Settings that only LoRA reads.
OF_LORA = (
    "lora_alpha",
    "rslora",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "lora_layers",
    "lora_dropout",
    "lora_targets",
    "train_embeddings_and_norms",
    "modules_to_save",
)


def check_settings(config: Any) -> None:
    """Raise ValueError for the first setting of a FinetuneConfig that cannot be; it says what is allowed."""
    if not config.data_files:
        raise ValueError("data must name at least one file, folder, pattern or dataset")
    _ = config.reading  # which checks its settings
    _check_either(config)
    for name, least in (("steps", 1), ("warmup_steps", 0)):
        if getattr(config, name) is not None:
            require_integers(config, least, name)
    require_integers(config, 1, "batch_size", "micro_batches", "checkpoint_every", "max_skipped")
    require_integers(config, 2, "context")
    require_seed(config)
    require_numbers(config, "max_grad_norm", "lora_alpha")
    for field in ("learning_rate", "dpo_beta"):
        if getattr(config, field) is not None:
            require_numbers(config, field)
    if config.dpo_beta is not None and config.loss_on == "all":
        raise ValueError("loss_on='all' is not for dpo_beta, which compares answers; leave one of them out")
    require_numbers(config, "weight_decay", allow_zero=True)
    for field in ("attention", "rope", "base_bits", "dtype", "remat", "schedule"):
        require_choice(config, field, *_CHOICES[field])
    if not set(config.log_to) <= set(SERVICES):
        raise ValueError(f"log_to must be some of {', '.join(map(repr, SERVICES))}, not {config.log_to!r}")
    if len(set(config.log_to)) < len(config.log_to):
        raise ValueError(f"log_to must name each service once, not {config.log_to!r}")
    _check_lora(config)
    _check_batch(config)
    _check_attention(config)
    _check_length(config)
    _check_evaluation(config)


def _check_either(config: Any) -> None:
    for name, other in EITHER:
        if getattr(config, name) is not None and getattr(config, other) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)} and {other}={getattr(config, other)} say the same in two "
                "ways; give one of them"
            )


def _check_length(config: Any) -> None:
    """Of the run, and of its warm-up."""
    if config.epochs is not None:
        require_numbers(config, "epochs")
    if config.warmup_ratio is not None:
        require_numbers(config, "warmup_ratio", allow_zero=True)
        require_fraction("warmup_ratio", config.warmup_ratio)
    elif config.epochs is None and config.schedule != "constant" and config.warmup >= config.total_steps:
        raise ValueError(f"warmup_steps={config.warmup} must be less than steps={config.total_steps}")


def _check_evaluation(config: Any) -> None:
    for name, default in (("eval_every", None), ("patience", None), ("export_last", False)):
        if not config.eval_files and getattr(config, name) != default:
            raise ValueError(f"{name}={getattr(config, name)} is for a run with eval_data, and none is given")
    for name in ("eval_every", "patience"):
        if getattr(config, name) is not None:
            require_integers(config, 1, name)


def _check_lora(config: Any) -> None:
    if config.lora_rank is not None:
        require_integers(config, 1, "lora_rank")
    elif config.base_bits is not None:
        raise ValueError(
            f"base_bits={config.base_bits} keeps the base frozen, but lora_rank=None trains all of it; "
            "give a lora_rank"
        )
    require_fraction("lora_dropout", config.lora_dropout)
    if config.lora_rank is None:
        _refuse_for_lora(config)
    for name in ("lora_targets", "modules_to_save"):
        if isinstance(getattr(config, name), str):
            raise ValueError(f"{name} must be a tuple of names, not the string {getattr(config, name)!r}")
    if config.lora_layers is not None and not (
        config.lora_layers and all(is_integer(layer) and layer >= 0 for layer in config.lora_layers)
    ):
        raise ValueError(f"lora_layers must be None or numbers of layers, from 0, not {config.lora_layers!r}")
    check_pattern("lora_rank_pattern", config.lora_rank_pattern, require_integer)
    check_pattern("lora_alpha_pattern", config.lora_alpha_pattern, require_positive)


def _refuse_for_lora(config: Any) -> None:
    """What a run of every parameter does not read would be ignored."""
    for field in dataclasses.fields(config):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(config, field.name)
        if field.name in OF_LORA and value != default:
            raise ValueError(
                f"{field.name}={value!r} is for LoRA, but lora_rank=None trains every parameter; "
                "leave one of them out"
            )


def _check_batch(config: Any) -> None:
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"micro_batches={config.micro_batches} must divide batch_size={config.batch_size} windows"
        )
    windows = config.batch_size // config.micro_batches
    if windows % config.mesh.batch:
        raise ValueError(
            f"batch_size={config.batch_size} in micro_batches={config.micro_batches} is {windows} windows at "
            f"a time, which {config.mesh.batch} devices (data * fsdp of the mesh) cannot share evenly"
        )
    if config.context % config.mesh.sequence:
        raise ValueError(
            f"context={config.context} must be a multiple of the mesh's sequence={config.mesh.sequence}"
        )


def _check_attention(config: Any) -> None:
    """Refuse what the chosen attention does not read: it would be ignored."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for names, kinds in _READ_BY.items():
        for name in names:
            value = getattr(config, name)
            if config.attention not in kinds and value != fields[name].default:
                wanted = " or ".join(map(repr, kinds))
                given = "which must be given" if config.attention is None else f"not for {config.attention!r}"
                raise ValueError(f"{name}={value} is for attention={wanted}, {given}")
    if config.attention in ("longgen", "streaming"):
        require_integers(config, 0, "sink")
        require_integers(config, 1, "window")
    if config.stride is not None:
        require_integers(config, 1, "stride")
        if config.mesh.sequence > 1:
            raise ValueError(
                f"stride={config.stride} gives lists of blocks, which are not split over the mesh's "
                f"sequence={config.mesh.sequence} devices; allowed are sink and window, without a stride"
            )
        if config.window % BLOCK or config.window < BLOCK:
            raise ValueError(
                f"window={config.window} must be a multiple of {BLOCK} tokens with a stride, which shows "
                "whole blocks"
            )
        if config.sink != BLOCK:
            raise ValueError(
                f"sink={config.sink} is for sink and window; with a stride the first block of {BLOCK} "
                "tokens is seen, and every stride-th after it"
            )
    if config.attention == "streaming" and config.head_pattern is None:
        raise ValueError("attention='streaming' needs a head_pattern that says which heads stream")
    if not 0 <= config.sparsity <= 1:
        raise ValueError(f"sparsity must be a number in [0, 1], not {config.sparsity!r}")
    if config.attention not in ("shifted", "grouped"):
        return
    if config.group_size is not None:
        require_integers(config, 2, "group_size")
    if config.group_ratio is not None and not 0 < config.group_ratio <= 1:
        raise ValueError(f"group_ratio must be a number in (0, 1], not {config.group_ratio!r}")
    size = config.groups
    if size is None or size < 2 or size % 2 or config.context % size:
        origin = (
            f" ({config.group_ratio or GROUP_RATIO:g} of the context)" if config.group_size is None else ""
        )
        raise ValueError(
            f"group_size={size}{origin} does not fit context={config.context}: "
            "it must be even and divide the context"
        )
