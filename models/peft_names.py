"""How PEFT finds the modules of a model by name.

Modules are named as in transformers: ``model.layers.0.self_attn.q_proj``, ``lm_head``. A name among
``target_modules`` is the end of a module's name, from a dot on. One among ``modules_to_save`` is the end of
the string, so "norm" means input_layernorm too. A key of ``rank_pattern`` or ``alpha_pattern`` is a regular
expression for an end from a dot on.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jsparse.checks import require_positive

V = TypeVar("V")

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ALL_LINEAR = "all-linear"  # as target_modules: every linear layer except the head


def module_name(path: str) -> str:
    """The name in transformers of the module at a dotted path of :class:`Llama`.

    >>> module_name("layers.0.mlp.up_proj"), module_name("lm_head")
    ('model.layers.0.mlp.up_proj', 'lm_head')
    """
    return path if path == HEAD else f"model.{path}"


def targets_among(
    names: Iterable[str] | str,
    modules: Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    layers_patterns: Sequence[str] = (),
) -> list[str]:
    """Those of ``modules`` that PEFT adapts for ``target_modules`` ``names``.

    A string is a regular expression, or "all-linear". ``layers``, ``layers_to_transform``, holds for modules
    that are not named in full; a module's layer is the first number in its name, or that after one of
    ``layers_patterns``.

    >>> targets_among(["v_proj"], ["layers.0.v_proj", "layers.0.kv_proj"])
    ['layers.0.v_proj']
    >>> targets_among(["v_proj", "lm_head"], ["model.layers.0.v_proj", "lm_head"], layers=[1])
    ['lm_head']
    """
    if isinstance(names, str):
        if names.lower() == ALL_LINEAR:
            return [module for module in modules if module != HEAD]
        return [module for module in modules if re.fullmatch(names, module)]

    def is_target(module: str) -> bool:
        if module in names:
            return True
        ends = any(module.endswith(f".{name}") for name in names)
        return ends and (not layers or _layer(module, layers_patterns) in layers)

    names = list(names)
    return [module for module in modules if is_target(module)]


def excluded_among(names: Iterable[str] | str, modules: Iterable[str]) -> list[str]:
    """Those of ``modules`` that PEFT does not adapt because of ``exclude_modules`` ``names``."""
    if isinstance(names, str):
        return [module for module in modules if re.fullmatch(names, module)]
    return targets_among(names, modules)


def not_adapted_among(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those of ``modules`` that PEFT does not adapt because of ``modules_to_save`` ``names``.

    Not the same as ``whole_among``: here a name is a regular expression for a part between dots.
    """
    return [
        module for module in modules if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)
    ]


def whole_among(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those of ``modules`` that PEFT replaces for ``modules_to_save`` ``names``.

    >>> whole_among(["norm"], ["norm", "layers.0.input_layernorm", "embed_tokens"])
    ['norm', 'layers.0.input_layernorm']
    """
    return [module for module in modules if module.endswith(tuple(names))]


def pattern_value(patterns: Mapping[str, V], module: str, default: V) -> V:
    """The value of the first key of a ``rank_pattern`` or ``alpha_pattern`` that means ``module``.

    >>> patterns = {r"layers.1.*.up_proj": 4, "up_proj": 2}
    >>> [pattern_value(patterns, f"model.layers.{layer}.mlp.up_proj", 1) for layer in (0, 1)]
    [2, 4]
    """
    return next((value for key, value in patterns.items() if _means(key, module)), default)


def unmatched_keys(patterns: Mapping[str, V], modules: Iterable[str]) -> list[str]:
    """The keys of a ``rank_pattern`` or ``alpha_pattern`` that mean none of ``modules``."""
    modules = list(modules)
    return [key for key in patterns if not any(_means(key, module) for module in modules)]


def short_patterns(values: Mapping[str, V], default: V) -> dict[str, V]:
    """Patterns that give each module of ``values`` its value, where it is not the default.

    The key is the last part of its name, or all of it but "model." where others have another value.

    >>> short_patterns({"model.layers.0.q": 4, "model.layers.1.q": 2, "model.layers.0.v": 4}, 2)
    {'layers.0.q': 4, 'v': 4}
    """
    patterns = {}
    for module, value in values.items():
        alike = all(other == value for name, other in values.items() if _last(name) == _last(module))
        if value != default:
            patterns[_last(module) if alike else module.removeprefix("model.")] = value
    return patterns


def find_named(
    field: str, names: Iterable[str] | str, modules: Iterable[str], among: Callable[..., list[str]]
) -> list[str]:
    """What ``among``, one of those above, finds; ValueError for those of ``names`` that mean no module."""
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


def check_expression(name: str, value: str) -> None:
    """ValueError, beginning with ``name``, unless ``value`` is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} {value!r} is no regular expression: {error}") from error


def check_pattern(name: str, pattern: Mapping[str, Any], check: Callable[[str, Any], None]) -> None:
    """ValueError unless the keys of a ``rank_pattern`` or ``alpha_pattern`` are regular expressions.

    - name: what a message calls the pattern.
    - check: of a value, by what a message calls it, such as :func:`check_alpha`.
    """
    for key, value in pattern.items():
        check_expression(name, key)
        check(f"{name}[{key!r}]", value)


def check_alpha(name: str, value: Any) -> None:
    """ValueError unless an alpha is a finite number above 0."""
    require_positive(name, value, "a positive number")


def short_targets(chosen: Iterable[str], modules: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Target names, and the layers that they are limited to, with which PEFT adapts the ``chosen`` modules.

    >>> modules = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("q", "v")]
    >>> short_targets(modules[:2], modules), short_targets(modules[:3], modules)
    ((('q', 'v'), (0,)), (('model.layers.0.v', 'q'), ()))
    """
    chosen, modules = set(chosen), list(modules)
    names = tuple(sorted({_last(module) for module in chosen}))
    layers, all_layers = (
        {layer for layer in (_layer(module, ()) for module in some) if layer is not None}
        for some in (chosen, modules)
    )
    if layers and layers != all_layers and chosen == set(targets_among(names, modules, layers=tuple(layers))):
        return names, tuple(sorted(layers))
    return short_names(chosen, modules, targets_among), ()


def _means(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _layer(module: str, layers_patterns: Sequence[str]) -> int | None:
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in layers_patterns]
    expressions = expressions or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    found = next(filter(None, (re.match(expression, module) for expression in expressions)), None)
    return None if found is None else int(found["layer"])


def _listed(names):
    return [names] if isinstance(names, str) else names


def _last(module):
    return module.rsplit(".", 1)[-1]
