"""PEFT's ``adapter_config.json``: which fields we read, which cannot matter, and which we refuse.

A field that is not known here may change the mathematics, so it is an error, as in a ``config.json``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jsparse.checks import require_fraction
from jsparse.hub import split_id
from jsparse.integers import require_integer
from jsparse.models.peft_names import (
    check_alpha,
    check_expression,
    check_pattern,
    excluded_among,
    find_named,
    not_adapted_among,
    pattern_value,
    targets_among,
    whole_among,
)
from jsparse.models.safetensors_folder import read_json

V = TypeVar("V")

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
    "loftq_config": ({}, None),
    "target_parameters": ([], None),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None,)),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "arrow_config", "use_bdlora"), (None,)),
    **dict.fromkeys(("kasa_config", "velora_config", "monteclora_config", "megatron_config"), (None,)),
}
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_OPTIONAL = (
    *("lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("exclude_modules", "modules_to_save", "ensure_weight_tying"),
)
# Where an adapter comes from, and options of the features refused above.
_IGNORED = frozenset(
    """
    base_model_name_or_path revision auto_mapping peft_version inference_mode megatron_core
    qalora_group_size runtime_config
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says about LoRA; the comments give the names there.

    Modules are named as in transformers; ``jsparse.models.peft_names`` has the rules.
    """

    rank: int  # r
    alpha: float | int  # lora_alpha
    rslora: bool = False  # use_rslora: the product is scaled by alpha / sqrt(rank)
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    dropout: float | int = 0.0  # lora_dropout
    targets: tuple[str, ...] | str  # target_modules: a string is a regular expression, or all-linear
    layers: tuple[int, ...] = ()  # layers_to_transform; none means all
    layers_patterns: tuple[str, ...] = ()  # layers_pattern
    excluded: tuple[str, ...] | str = ()  # exclude_modules
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
        targets = _modules("target_modules", fields["target_modules"])
        if not targets:
            raise ValueError(
                f"target_modules must name at least one module, not {fields['target_modules']!r}"
            )
        layers = _layers(fields.get("layers_to_transform"))
        if layers and isinstance(targets, str):
            raise ValueError(
                f"layers_to_transform={list(layers)} needs a list of target_modules, not {targets!r}"
            )
        return cls(
            rank=_checked("r", fields["r"], require_integer),
            alpha=_checked("lora_alpha", fields["lora_alpha"], check_alpha),
            rslora=_flag("use_rslora", fields.get("use_rslora")),
            rank_pattern=_pattern("rank_pattern", fields.get("rank_pattern"), require_integer),
            alpha_pattern=_pattern("alpha_pattern", fields.get("alpha_pattern"), check_alpha),
            dropout=_checked("lora_dropout", fields.get("lora_dropout") or 0.0, require_fraction),
            targets=targets,
            layers=layers,
            layers_patterns=_layers_patterns(fields.get("layers_pattern")),
            excluded=_modules("exclude_modules", fields.get("exclude_modules")),
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
        # Only where they are needed: an older PEFT does not know some of them.
        others = {
            "revision": revision,
            "use_rslora": self.rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "layers_to_transform": list(self.layers),
            "layers_pattern": list(self.layers_patterns),
            "exclude_modules": self.excluded if isinstance(self.excluded, str) else list(self.excluded),
            "ensure_weight_tying": self.tied,
        }
        return fields | {name: value for name, value in others.items() if value}

    def find(self, modules: Iterable[str], savable: Iterable[str]) -> tuple[list[str], list[str]]:
        """Those of the linear ``modules`` that PEFT adapts, and those of the ``savable`` that it replaces.

        ValueError for names that mean no module, and where none is left to adapt.
        """
        modules = list(modules)
        saved = find_named("modules_to_save", self.whole, savable, whole_among)
        find_named("target_modules", self.targets, modules, targets_among)
        targets = targets_among(
            self.targets, modules, layers=self.layers, layers_patterns=self.layers_patterns
        )
        not_adapted = {*excluded_among(self.excluded, modules), *not_adapted_among(self.whole, modules)}
        adapted = [module for module in targets if module not in not_adapted]
        if not adapted:
            raise ValueError(
                f"target_modules {self.targets!r} leave no module to adapt, with layers_to_transform="
                f"{list(self.layers)}, exclude_modules={self.excluded!r} and modules_to_save={self.whole!r}"
            )
        both = sorted(set(adapted).intersection(saved))
        if both:
            raise ValueError(f"modules_to_save {self.whole!r} and target_modules both name {', '.join(both)}")
        return adapted, saved

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return pattern_value(self.rank_pattern, module, self.rank)


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


def _checked(name: str, value: V, check: Callable[[str, Any], None]) -> V:
    check(name, value)
    return value


def _flag(name: str, value: Any) -> bool:
    if value not in (True, False, None):
        raise ValueError(f"{name} must be True, False or None, not {value!r}")
    return bool(value)


def _pattern(name: str, value: Any, check: Callable[[str, Any], None]) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern."""
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name} must map names of modules to numbers, not {value!r}")
    check_pattern(name, value or {}, check)
    return dict(value or {})


def _layers(value: Any) -> tuple[int, ...]:
    numbers = [value] if isinstance(value, int) and not isinstance(value, bool) else value or []
    if not isinstance(numbers, list):
        raise ValueError(f"layers_to_transform must be a number or a list of numbers, not {value!r}")
    for number in numbers:
        require_integer("layers_to_transform", number, 0)
    return tuple(numbers)


def _layers_patterns(value: Any) -> tuple[str, ...]:
    patterns = _names("layers_pattern", [value] if value and isinstance(value, str) else value or [])
    for pattern in patterns:
        check_expression("layers_pattern", pattern)
    return patterns


def _modules(name: str, value: Any) -> tuple[str, ...] | str:
    """Names, or a regular expression."""
    if not value or not isinstance(value, str):
        return _names(name, value or [])
    check_expression(name, value)
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"{name} must be a list of module names, not {value!r}")
    return tuple(value)
