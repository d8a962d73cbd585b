"""PEFT's ``adapter_config.json``: which fields we read, which cannot matter, and which we refuse.

A field that is not known here may change the mathematics, so it is an error, as in a ``config.json``.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jsparse.hub import split_id
from jsparse.integers import require_integer
from jsparse.models.safetensors_folder import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LONGLORA_WEIGHTS = "trainable_params.safetensors"  # where LongLoRA has embeddings and norms

# Fields that change the mathematics, or the base's weights before anything is added to them, and the values
# with which they do not.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", None),  # pissa, olora, corda and loftq change the base
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "loftq_config"), ({}, None)),
    **dict.fromkeys(("layers_to_transform", "exclude_modules", "target_parameters"), ([], None)),
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None,)),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "arrow_config", "use_bdlora"), (None,)),
    **dict.fromkeys(("kasa_config", "velora_config", "monteclora_config", "megatron_config"), (None,)),
}
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_OPTIONAL = ("lora_dropout", "modules_to_save", "ensure_weight_tying")
# Where an adapter comes from, and options of the features refused above.
_IGNORED = frozenset(
    """
    base_model_name_or_path revision auto_mapping peft_version inference_mode layers_pattern megatron_core
    qalora_group_size runtime_config
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says about LoRA; the comments give the names there.

    ``targets_among`` and ``whole_among`` find the modules that ``targets`` and ``whole`` name.
    """

    rank: int  # r
    alpha: float | int  # lora_alpha
    dropout: float | int = 0.0  # lora_dropout
    targets: tuple[str, ...] | str  # target_modules: a string is a regular expression
    whole: tuple[str, ...] = ()  # modules_to_save: not adapted, but replaced
    tied: bool = False  # ensure_weight_tying: an lm_head tied to the embedding is replaced with it

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> "AdapterConfig":
        """The adapter that the fields of an ``adapter_config.json`` describe.

        ValueError names every field that is missing, unknown or asks for mathematics that is not here.
        """
        problems = [f"{name} is missing" for name in _REQUIRED if name not in fields]
        for name, value in fields.items():
            if name in _INERT_VALUES:
                if value not in _INERT_VALUES[name]:
                    allowed = " or ".join(map(repr, _INERT_VALUES[name]))
                    problems.append(f"{name}={value!r} is not supported (allowed: {allowed})")
            elif name not in _REQUIRED and name not in _OPTIONAL and name not in _IGNORED:
                problems.append(f"{name}={value!r} is not known")
        if problems:
            raise ValueError(f"the adapter may compute something else than LoRA: {'; '.join(problems)}")
        return cls(
            rank=_rank(fields["r"]),
            alpha=_number("lora_alpha", fields["lora_alpha"]),
            dropout=_number("lora_dropout", fields.get("lora_dropout") or 0.0),
            targets=_targets(fields["target_modules"]),
            whole=_names("modules_to_save", fields.get("modules_to_save") or []),
            tied=bool(fields.get("ensure_weight_tying")),
        )

    def to_peft(self, base: str) -> dict[str, Any]:
        """The fields of an ``adapter_config.json`` for the base model called ``base``: a folder or an id."""
        name, revision = split_id(base) or (base, None)
        fields: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
            "modules_to_save": list(self.whole) or None,
        }
        if revision is not None:
            fields["revision"] = revision
        # Only where it is needed: an older PEFT does not know it.
        return fields | {"ensure_weight_tying": True} if self.tied else fields


def named_base(directory: Path) -> str | None:
    """The base model that a folder's ``adapter_config.json`` names: a folder or an id; None if none."""
    fields = read_json(directory / CONFIG)
    base, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(base, str) or not base:
        return None
    given = split_id(base)
    return f"{base}@{revision}" if revision and given is not None and given[1] is None else base


def refuse_adapter(model: str | Path, directory: Path) -> None:
    """Raise FileNotFoundError, with what makes a model of it, if ``directory`` holds an adapter.

    ``model`` is what was given for the directory.
    """
    if not (directory / CONFIG).is_file():
        return
    base = named_base(directory)
    option, named = (" --model BASE", f"which its {CONFIG} does not name") if base is None else ("", base)
    raise FileNotFoundError(
        f"{model} is an adapter, and no model; jsparse merge --run {model} --output NEW_FOLDER{option} "
        f"makes a model of it and its base, {named}"
    )


def pickled(name: str) -> str:
    """The name that such weights have where torch.save wrote them.

    >>> pickled(WEIGHTS)
    'adapter_model.bin'
    """
    return name.replace(".safetensors", ".bin")


def _rank(value: Any) -> int:
    require_integer("r", value)
    return value


def _number(name: str, value: Any) -> float | int:
    allowed = {"lora_alpha": "a positive number", "lora_dropout": "a number in [0, 1)"}[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < math.inf if name == "lora_alpha" else 0 <= value < 1):
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    return value


def _targets(value: Any) -> tuple[str, ...] | str:
    if not value:
        raise ValueError(f"target_modules must name at least one module, not {value!r}")
    if not isinstance(value, str):
        return _names("target_modules", value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"target_modules {value!r} is no regular expression: {error}") from error
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"{name} must be a list of module names, not {value!r}")
    return tuple(value)


# How PEFT finds modules by name. For modules to adapt, a name is the end of a path, from a dot on. For
# modules to save whole it is the end of the string, so "norm" means input_layernorm too.


def targets_among(names: Iterable[str] | str, modules: Iterable[str]) -> list[str]:
    """Those of ``modules`` that PEFT adapts for ``target_modules`` ``names``.

    >>> targets_among(["v_proj"], ["layers.0.v_proj", "layers.0.kv_proj"])
    ['layers.0.v_proj']
    """
    if isinstance(names, str):
        return [module for module in modules if re.fullmatch(names, module)]
    return [module for module in modules if any(f".{module}".endswith(f".{name}") for name in names)]


def whole_among(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those of ``modules`` that PEFT replaces for ``modules_to_save`` ``names``.

    >>> whole_among(["norm"], ["norm", "layers.0.input_layernorm", "embed_tokens"])
    ['norm', 'layers.0.input_layernorm']
    """
    return [module for module in modules if module.endswith(tuple(names))]


def find_named(
    field: str, names: Iterable[str] | str, modules: Iterable[str], among: Callable[..., list[str]]
) -> list[str]:
    """What ``among``, one of the two above, finds; ValueError for those of ``names`` that mean no module."""
    modules = list(modules)
    found = {name: among(name if isinstance(names, str) else [name], modules) for name in _listed(names)}
    strangers = [name for name, meant in found.items() if not meant]
    if strangers:
        allowed = ", ".join(sorted({_last(module) for module in modules}))
        raise ValueError(f"{field} {strangers} name no module of the model; allowed are {allowed}")
    return among(names, modules)


def short_names(
    chosen: Iterable[str], modules: Iterable[str], among: Callable[..., list[str]]
) -> tuple[str, ...]:
    """Names with which ``among`` finds exactly the ``chosen`` modules.

    The last part of a path, or the whole where the last part means others too.

    >>> short_names(["model.norm"], ["model.norm", "model.layers.0.input_layernorm"], whole_among)
    ('model.norm',)
    """
    chosen, modules = set(chosen), list(modules)
    clear = {last for last in map(_last, chosen) if chosen.issuperset(among([last], modules))}
    return tuple(sorted({_last(module) if _last(module) in clear else module for module in chosen}))


def _listed(names):
    return [names] if isinstance(names, str) else names


def _last(module):
    return module.rsplit(".", 1)[-1]
