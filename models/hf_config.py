"""Hugging Face's ``config.json``: the fields that we read, to and from those of a LlamaConfig."""

from collections.abc import Mapping
from typing import Any

from jsparse.models.hf_fields import check_unread
from jsparse.models.positions import sequence_length_from_hf
from jsparse.models.quantization import quantization_settings, read_quantization
from jsparse.models.rope import FIELDS_OF_KIND, ROPE_KINDS, RopeConfig

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Fields that may be absent, with the value that transformers then uses, for each model type. A type that
# lacks a field here does not have it: there, only a value that switches it off is accepted.
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON
    | {
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": _COMMON
    | {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _COMMON
    | {
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    "qwen3": _COMMON
    | {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
}

MODEL_TYPES = tuple(_DEFAULTS)

# Read besides those.
_READ = {"model_type", "rope_theta", "rope_scaling", "rope_parameters", "rope_condense_ratio"}
_READ |= {"max_sequence_length", "dual_chunk_attention_config", "quantization_config", "compression_config"}

# What a RoPE entry may have although its kind does not read it, and the values that change nothing.
_INERT_IN_ROPE = {"finetuned": (True, False), "attn_factor": (1,), "extrapolation_factor": (1,)}


def fields_from_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of LlamaConfig from the fields of a ``config.json``."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not supported; allowed are {', '.join(MODEL_TYPES)}")
    defaults = _DEFAULTS[model_type]
    check_unread(fields, known={*_REQUIRED, *defaults, *_READ}, model_type=model_type)
    quantization = quantization_settings(fields)
    if quantization is not None:
        read_quantization(quantization)  # refuses what we cannot decode
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")

    # null means "the default" except where it has a meaning of its own
    values = defaults | {name: fields[name] for name in (*_REQUIRED, *defaults) if name in fields}
    for name in ("rms_norm_eps", "tie_word_embeddings", "initializer_range", "max_position_embeddings"):
        values[name] = defaults[name] if values[name] is None else values[name]
    require_size("num_hidden_layers", values["num_hidden_layers"], MAX_LAYERS)
    require_size("max_position_embeddings", values["max_position_embeddings"])
    for name in ("attention_bias", "mlp_bias"):
        values[name] = False if values.get(name) is None else values[name]
    values["model_type"] = model_type
    values["rope"] = rope = _rope_from_hf(fields, values["max_position_embeddings"])
    _check_condense_ratio(fields.get("rope_condense_ratio"), rope)
    values["max_sequence_length"] = sequence_length_from_hf(
        fields.get("max_sequence_length"), rope.kind, rope.factor, values["max_position_embeddings"]
    )
    values["max_position_embeddings"] = _ordinary_positions(fields, values["max_position_embeddings"], rope)
    values["eos_token_ids"] = token_ids(
        values.pop("eos_token_id", fields.get("eos_token_id")), "eos_token_id"
    )
    values["bos_token_id"] = values.get("bos_token_id", fields.get("bos_token_id"))
    values["pad_token_id"] = fields.get("pad_token_id")
    values["sliding_windows"] = _windows_from_hf(values)
    for name in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        values.pop(name, None)
    return {name: value for name, value in values.items() if value is not None}  # null: LlamaConfig's default


MAX_LAYERS = 10_000  # far above any model, and below what a damaged config could make us allocate


def require_size(name: str, value: Any, most: int = 2**31 - 1) -> None:
    """Raise ValueError unless ``value`` is an integer from 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} must be an integer from 1 to {most}, not {value!r}")


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """An int, a list of them or null, as Hugging Face writes stop tokens, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ValueError(f"{name} must be an integer, a list of integers or null, not {value!r}")
    return tuple(ids)


def _ordinary_positions(fields, max_position_embeddings, rope):
    """How many positions attend as usual: dual chunk attention is another one beyond its original length."""
    entry = fields.get("dual_chunk_attention_config")
    if entry in (None, {}):
        return max_position_embeddings
    original = entry.get("original_max_position_embeddings") if isinstance(entry, Mapping) else None
    if original is None:
        raise ValueError(
            "dual_chunk_attention_config must have original_max_position_embeddings, up to which it is "
            f"ordinary attention, not {entry!r}"
        )
    require_size("dual_chunk_attention_config.original_max_position_embeddings", original)
    if rope.kind != "default":
        raise ValueError(
            f"dual_chunk_attention_config beside a RoPE of type {rope.kind!r} is not supported: it must be "
            "'default'"
        )
    return min(max_position_embeddings, original)


def _check_condense_ratio(ratio, rope):
    """LongChat's own name for a linear factor, which its code reads; it must not say anything else."""
    if ratio not in (None, 1) and (rope.kind != "linear" or rope.factor != ratio):
        raise ValueError(
            f"rope_condense_ratio={ratio!r} divides positions by it, but the RoPE is of type "
            f"{rope.kind!r} with factor {rope.factor!r}; "
            f'set rope_scaling to {{"type": "linear", "factor": {ratio!r}}}'
        )


def _windows_from_hf(values):
    layers = values["num_hidden_layers"]
    window = values.get("sliding_window")
    if values["model_type"] in ("llama", "mistral"):
        return (window,) * layers
    if values["use_sliding_window"] not in (True, False, None):
        raise ValueError(f"use_sliding_window must be true or false, not {values['use_sliding_window']!r}")
    if not values["use_sliding_window"]:
        window = None
    types = values.get("layer_types")
    if types is None:
        start = values["max_window_layers"]
        if isinstance(start, bool) or not isinstance(start, int):
            raise ValueError(f"max_window_layers must be an integer, not {start!r}")
        slides = [window is not None and layer >= start for layer in range(layers)]
        return tuple(window if slide else None for slide in slides)
    if not isinstance(types, list):
        raise ValueError(f"layer_types must be a list or null, not {types!r}")
    unknown = sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types has {unknown}; allowed are 'full_attention' and 'sliding_attention'")
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={layers}")
    if window is None and "sliding_attention" in types:
        raise ValueError(
            "layer_types has 'sliding_attention', but use_sliding_window or sliding_window is not set"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope_from_hf(fields, max_position_embeddings):
    readings = [
        _read_rope(name, fields[name], fields, max_position_embeddings)
        for name in ("rope_scaling", "rope_parameters")
        if fields.get(name) not in (None, {})
    ]
    if not readings:
        return _read_rope("rope_parameters", {}, fields, max_position_embeddings)
    if any(reading != readings[0] for reading in readings):
        raise ValueError("rope_scaling and rope_parameters disagree; keep one of them")
    return readings[0]


def _read_rope(name, entry, fields, max_position_embeddings):
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} must be an object or null, not {entry!r}")
    if entry and all(isinstance(value, Mapping) for value in entry.values()):  # one entry per layer type
        readings = [
            _read_rope(f"{name}.{kind}", value, fields, max_position_embeddings)
            for kind, value in entry.items()
        ]
        if any(reading != readings[0] for reading in readings):
            raise ValueError(
                f"{name} differs between layer types {sorted(entry)}; one RoPE for all layers is allowed"
            )
        return readings[0]

    entry = {key: value for key, value in entry.items() if value is not None}
    kinds = [entry.pop(key) for key in ("rope_type", "type") if key in entry] or ["default"]
    for kind in kinds:
        if kind not in ROPE_KINDS:
            raise ValueError(f"{name} has RoPE type {kind!r}; allowed are {', '.join(ROPE_KINDS)}")
    kind = kinds[0]
    if kind != kinds[-1]:
        raise ValueError(f"{name} has a rope_type {kinds[0]!r} and a type {kinds[1]!r}, which disagree")

    if entry.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{name} has a partial_rotary_factor; only 1 is supported")
    theta = fields.get("rope_theta")
    theta = entry.pop("rope_theta", 10000.0 if theta is None else theta)
    if fields.get("rope_theta") not in (None, theta):
        raise ValueError(f"rope_theta={fields['rope_theta']!r} disagrees with {name}.rope_theta={theta!r}")
    reads = FIELDS_OF_KIND[kind]
    if "original_max_position_embeddings" in reads.required:
        outside = fields.get("original_max_position_embeddings")
        inside = entry.get("original_max_position_embeddings", outside)
        if outside not in (None, inside):
            raise ValueError(
                f"original_max_position_embeddings={outside!r} disagrees with {inside!r} in {name}"
            )
        original = max_position_embeddings if inside is None else inside
        require_size("original_max_position_embeddings", original)
        entry["original_max_position_embeddings"] = original
        if kind == "yarn":
            entry.setdefault("factor", max_position_embeddings / original)
    if kind == "linear":
        entry.pop("original_max_position_embeddings", None)  # transformers does not read it
    unknown = sorted(set(entry) - {*reads.required, *reads.optional})
    unknown = [key for key in unknown if entry[key] not in _INERT_IN_ROPE.get(key, ())]
    entry = {key: value for key, value in entry.items() if key not in _INERT_IN_ROPE or key in unknown}
    if unknown:
        raise ValueError(f"{name} has fields that RoPE type {kind!r} does not read: {', '.join(unknown)}")
    return RopeConfig(kind=kind, theta=theta, **entry)


def fields_to_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``config.json``, as transformers 5 spells them, from the fields of a LlamaConfig."""
    model_type = values["model_type"]
    eos = list(values["eos_token_ids"])
    fields = {
        "architectures": [f"{_CLASS_PREFIX[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_hidden_layers": values["num_hidden_layers"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": values["max_position_embeddings"],
        "rms_norm_eps": values["rms_norm_eps"],
        "initializer_range": values["initializer_range"],
        "rope_parameters": _rope_to_hf(values["rope"]),
        "max_sequence_length": values["max_sequence_length"],
        "tie_word_embeddings": values["tie_word_embeddings"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "pad_token_id": values["pad_token_id"],
    }
    if values["max_sequence_length"] is None:
        del fields["max_sequence_length"]
    windows = values["sliding_windows"] or ()
    window = next((window for window in windows if window is not None), None)
    if model_type in ("llama", "qwen3"):
        fields["attention_bias"] = values["attention_bias"]
    if model_type == "llama":
        fields["mlp_bias"] = values["mlp_bias"]
    if model_type == "mistral":
        fields["sliding_window"] = window
    if model_type in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = window is not None
        fields["sliding_window"] = window
        fields["layer_types"] = [
            "full_attention" if size is None else "sliding_attention" for size in windows
        ]
    return fields


_CLASS_PREFIX = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _rope_to_hf(rope):
    reads = FIELDS_OF_KIND[rope.kind]
    entry = {"rope_type": rope.kind, "rope_theta": rope.theta}
    entry |= {name: getattr(rope, name) for name in (*reads.required, *reads.optional)}
    return {name: value for name, value in entry.items() if value is not None}
