"""What ``quantization_config`` says of a checkpoint: which tensors hold the weight of a layer, and how.

Settings that say how the weights were found (calibration, damping) or how activations are to be rounded while
computing do not matter here: weights are decoded while loading, and computed with as they are. Nor do fixed
scales for keys and values: the cache keeps those in the model's dtype, or in codes with scales of its own.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jsparse.models.packed_weights import (
    PackedWeight,
    Shape,
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    compressed,
    gptq,
    scaled_float8,
)
from jsparse.models.safetensors_folder import StoredTensor

# From the name of a linear layer, its tensors by what follows that name, and the shape of its weight.
Find = Callable[[str, Mapping[str, StoredTensor], Shape], PackedWeight]

SCALAR = ((), (1,), (1, 1))  # how one scale for a whole matrix may be stored

# Scales for rounding activations, keys and values while computing, which is not done: they change no weight.
ACTIVATION_SCALES = re.compile(
    r".*\.(input_scale|input_zero_point|output_scale|output_zero_point|activation_scale"
    r"|k_scale|v_scale|kv_scale|q_scale|k_zero_point|v_zero_point|q_zero_point)"
)


def quantization_settings(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings in a ``config.json``, None if weights are stored as they are; ValueError for no object."""
    for name in ("quantization_config", "compression_config"):  # the second is what it was called first
        settings = fields.get(name)
        if settings is not None:
            if not isinstance(settings, dict):
                raise ValueError(f"{name} must be an object or null, not {settings!r}")
            nested = settings.get("quantization_config")
            return nested if isinstance(nested, dict) else settings
    return None


def read_quantization(settings: dict[str, Any]) -> Find:
    """How to find each weight. Raises ValueError for what we cannot read.

    >>> read_quantization({"quant_method": "awq", "bits": 3})
    Traceback (most recent call last):
    ValueError: quantization_config.bits=3 is not supported for awq; allowed is 4
    """
    method = settings.get("quant_method")
    if method is None and "quant_algo" in settings:
        method = "modelopt"
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(
            f"quantization_config.quant_method={method!r} is not supported; allowed are "
            f"{', '.join(_METHODS)}. Take a copy of the model with weights in bfloat16 or float16"
        )
    return _METHODS[method](settings)


def _awq(settings) -> Find:
    _require(settings, "awq", "bits", 4)
    version = settings.get("version") or settings.get("format", "gemm")
    if str(version).lower() != "gemm" or settings.get("backend") == "llm-awq":
        raise ValueError(
            f"quantization_config.version={version!r} with backend={settings.get('backend')!r} is not "
            "supported for awq; allowed is 'gemm'"
        )
    group_size = _group_size(settings, "awq")
    return lambda module, tensors, shape: awq(shape, group_size)


def _gptq(settings) -> Find:
    bits = _require(settings, "gptq", "bits", 4, 8, 2)
    symmetric = _require({"sym": True} | settings, "gptq", "sym", True, False)
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"quantization_config.checkpoint_format={layout!r} is not supported; allowed are 'gptq' and "
            "'gptq_v2'"
        )
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not rule.startswith("-:") for rule in dynamic):
        raise ValueError(
            f"quantization_config.dynamic={dynamic!r} gives layers settings of their own, which is not "
            "supported"
        )
    group_size = _group_size(settings, "gptq")
    less_one = layout == "gptq"
    return lambda module, tensors, shape: gptq(
        shape, bits, group_size, symmetric=symmetric, zeros_less_one=less_one
    )


def _fp8(settings) -> Find:
    _require({"fmt": "e4m3"} | settings, "fp8", "fmt", "e4m3", "float8_e4m3fn")
    block = settings.get("weight_block_size", [128, 128])  # null says: one scale per matrix
    if block is not None:
        block = _block(block, "weight_block_size")

    def find(module, tensors, shape):
        if "weight_scale" in tensors:  # as vLLM writes one scale per matrix
            return scaled_float8(shape, "weight_scale", SCALAR, shape)
        if block is None:
            return scaled_float8(shape, "weight_scale_inv", SCALAR, shape)
        grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        return scaled_float8(shape, "weight_scale_inv", (grid,), block)

    return find


def _modelopt(settings) -> Find:
    algorithm = _require(settings, "modelopt", "quant_algo", "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    if algorithm == "FP8":
        return lambda module, tensors, shape: scaled_float8(shape, "weight_scale", SCALAR, shape)
    return lambda module, tensors, shape: scaled_float8(
        shape, "weight_scale", ((shape[0],), (shape[0], 1)), (1, shape[1])
    )


def _bitsandbytes(settings) -> Find:
    def find(module, tensors, shape):
        if any(re.fullmatch(r"weight\.quant_state\.bitsandbytes__(nf4|fp4)", name) for name in tensors):
            return bitsandbytes_4bit(tensors, shape)
        if "SCB" in tensors:
            return bitsandbytes_8bit(tensors, shape)
        raise ValueError("it has neither bitsandbytes' quant_state of 4 bits (nf4 or fp4) nor its SCB of 8")

    return find


def _compressed_tensors(settings) -> Find:
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise ValueError(
            f"quantization_config.sparsity_config={sparsity!r} is not supported; allowed is format 'dense'"
        )
    if settings.get("transform_config"):
        raise ValueError("quantization_config.transform_config is not supported: it rotates activations")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ValueError(
            "quantization_config.config_groups must be an object of objects for compressed-tensors"
        )
    read = [
        (_patterns(group.get("targets"), "targets"), _compressed_group(name, group, settings))
        for name, group in groups.items()
    ]
    ignored = _patterns(settings.get("ignore"), "ignore")

    def find(module, tensors, shape):
        if any(_matches(module, pattern) for pattern in ignored):
            raise ValueError(
                f"quantization_config.ignore names {module}, yet its tensors are {', '.join(tensors)}"
            )
        for rank in (_is_name, _is_pattern, _is_class):  # the most precise target counts
            for targets, make in read:
                if any(rank(target) and _matches(module, target) for target in targets):
                    return make(tensors, shape)
        raise ValueError(f"no target in quantization_config.config_groups is {module}")

    return find


def _compressed_group(name, group, settings):
    """The layout of the layers that one entry of config_groups targets."""
    where = f"config_groups.{name}"
    layout = group.get("format") or settings.get("format")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"quantization_config.{where}.weights must be an object, not {weights!r}")
    number, kind = (weights.get(field, default) for field, default in (("num_bits", 8), ("type", "int")))
    allowed = {
        "pack-quantized": [(4, "int"), (8, "int"), (2, "int")],
        "int-quantized": [(8, "int"), (4, "int")],
        "float-quantized": [(8, "float")],
        "naive-quantized": [(8, "int"), (4, "int"), (8, "float")],
    }
    if not isinstance(layout, str) or layout not in allowed:
        raise ValueError(
            f"quantization_config.format={layout!r} of {where} is not supported; allowed are "
            f"{', '.join(allowed)}"
        )
    if (number, kind) not in allowed[layout]:
        shown = ", ".join(f"{kind}{bits}" for bits, kind in allowed[layout])
        raise ValueError(
            f"quantization_config.{where} has weights of type {kind!r} and num_bits {number!r}; allowed for "
            f"{layout} are {shown}"
        )
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ValueError(
            f"quantization_config.{where} has weights of strategy {strategy!r}; allowed are tensor, channel, "
            "group, block"
        )
    group_size = _group_size(weights, where) if strategy == "group" else -1
    rows, columns = (
        _block(weights.get("block_structure"), f"{where}.block_structure") if strategy == "block" else (1, 1)
    )
    packed = layout == "pack-quantized"
    symmetric = _require({"symmetric": True, **weights}, where, "symmetric", True, False)
    packed_zeros = packed and not symmetric and strategy in ("group", "channel")

    def make(tensors, shape):
        block = {
            "tensor": shape,
            "channel": (1, shape[1]),
            "group": (1, shape[1] if group_size == -1 else group_size),
            "block": (rows, columns),
        }[strategy]
        grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        scales = {"tensor": SCALAR, "channel": (grid, grid[:1])}.get(strategy, (grid,))
        return compressed(
            tensors,
            shape,
            packed_bits=number if packed else None,
            dtype="F8_E4M3" if kind == "float" else "I8",
            scales=scales,
            block=block,
            symmetric=symmetric,
            packed_zeros=packed_zeros,
        )

    return make


def _patterns(value, name):
    """A list of names, classes and regular expressions (``re:...``), or null."""
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ValueError(f"quantization_config.{name} must be a list of strings, not {value!r}")
    for target in filter(_is_pattern, value):
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"quantization_config.{name} has {target!r}: {error}") from error
    return value


def _matches(module, target):
    if _is_class(target):
        return True
    if _is_pattern(target):
        return re.match(target.removeprefix("re:"), module) is not None
    return module == target


def _is_class(target):
    return target == "Linear"  # every module that is asked for is one


def _is_pattern(target):
    return target.startswith("re:")


def _is_name(target):
    return not _is_class(target) and not _is_pattern(target)


def _require(settings, method, field, *allowed) -> Any:
    value = settings.get(field)
    if value not in allowed or (isinstance(value, bool) != isinstance(allowed[0], bool)):
        shown = " or ".join(str(one) for one in allowed)
        raise ValueError(
            f"quantization_config.{field}={value!r} is not supported for {method}; allowed is {shown}"
        )
    return value


def _group_size(settings, method):
    size = settings.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise ValueError(
            f"quantization_config.group_size of {method} must be an integer > 0 or -1, not {size!r}"
        )
    return size


def _block(value, name):
    numbers = value.split("x") if isinstance(value, str) else value  # "128x128" in old files
    try:
        rows, columns = map(int, numbers)
    except (TypeError, ValueError, OverflowError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise ValueError(f"quantization_config.{name} must be two integers > 0, not {value!r}")
    return rows, columns


_METHODS: dict[str, Callable[[dict[str, Any]], Find]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
}
