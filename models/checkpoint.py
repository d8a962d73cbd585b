"""Hugging Face folders: reading checks everything before it allocates, writing replaces whole files only."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jsparse.hub import GENERATION_FILE, model_folder
from jsparse.models.adapter_config import refuse_adapter
from jsparse.models.config import LlamaConfig
from jsparse.models.hf_config import token_ids
from jsparse.models.packed_weights import FLOATS, PackedWeight, Part
from jsparse.models.quantization import ACTIVATION_SCALES, Find, quantization_settings, read_quantization
from jsparse.models.safetensors_folder import (
    INDEX,
    SINGLE,
    StoredTensor,
    find_tensors,
    read_json,
    read_tensor,
    write_json,
    write_tensors,
    written_whole,
)

Parameters = dict[tuple, nnx.Variable]  # by path, as nnx.to_flat_state gives them

# Our modules have Hugging Face's names. Parameters are called what they are; theirs are all "weight", and
# torch stores a linear layer as [out, in]. {our name: (their name, transposed)}
_PARAMETERS = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
_IGNORED_TENSORS = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)?rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DTYPES = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
_PEFT_PREFIX = "base_model.model."  # of a model that was saved with PEFT's wrapper around it
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def load_config(directory: str | Path) -> LlamaConfig:
    """The config of a Hugging Face folder or id; ``generation_config.json`` overrides its stop tokens."""
    given, directory = directory, model_folder(directory)
    if not (directory / "config.json").is_file():
        refuse_adapter(given, directory)
        raise FileNotFoundError(f"{directory} is not a checkpoint folder: it has no config.json")
    try:
        config = LlamaConfig.from_hf(read_json(directory / "config.json"))
        generation = directory / GENERATION_FILE
        eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        if eos is not None:
            config = dataclasses.replace(config, eos_token_ids=token_ids(eos, "eos_token_id"))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return config


def load_parameters(
    directory: str | Path,
    config: LlamaConfig,
    parameters: Parameters,
    *,
    dtype=None,
    place: Callable[[nnx.Variable, np.ndarray], jax.Array] = lambda variable, array: jnp.asarray(array),
) -> Parameters:
    """The values of abstract ``parameters``, read from the safetensors in a Hugging Face folder.

    Quantized weights are decoded one by one. Names may have PEFT's prefix in front, or lack "model." as in a
    folder saved from transformers' LlamaModel. A tied embedding may be stored as ``lm_head`` alone. Only
    ``rotary_emb.inv_freq`` is ignored, which old checkpoints have and the config implies, and of quantized
    checkpoints the scales for rounding activations, which are not rounded here.

    - dtype: None takes the dtype in config.json, as transformers' "auto" does; without one, the stored dtype,
      which must then be the same for all tensors.
    - place: puts the array of one parameter on its devices.

    Raises, before anything is allocated: FileNotFoundError for missing weights (pickled ones do not count),
    and ValueError that names, in one message, every tensor that is missing, unexpected, misshapen or of a
    dtype other than float32, float16 and bfloat16; ValueError for a quantization that we cannot read.
    """
    given, directory = directory, model_folder(directory, weights=True)
    if not any(directory.glob("model*.safetensors*")):
        refuse_adapter(given, directory)
    if dtype is not None and jnp.dtype(dtype) not in _DTYPES.values():
        raise ValueError(f"dtype must be float32, float16, bfloat16 or None, not {jnp.dtype(dtype).name}")
    fields = read_json(directory / "config.json")
    find = _find_quantized(directory, fields)
    stored = _stored(directory, config, find is not None)
    shapes = {_hf_name(path): _hf_shape(path, variable.shape) for path, variable in parameters.items()}
    kernels = {_hf_name(path) for path in parameters if _PARAMETERS[path[-1]][1]}
    packed = {} if find is None else _packed_weights(directory, find, stored, kernels, shapes)
    parts = _expected_parts(shapes, packed, tied=config.tie_word_embeddings)
    _check_tensors(directory, stored, parts)
    if dtype is None:
        dtype = _stored_dtype(directory, fields, [stored[name] for name in shapes if name not in packed])
    dtype = jnp.dtype(dtype)
    if config.tie_word_embeddings and _HEAD in stored:
        _check_tied(directory, stored)

    def load(path, variable):
        name = _hf_name(path)
        array = (
            _decoded(directory, name, packed[name], stored) if name in packed else read_tensor(stored[name])
        )
        return variable.replace(place(variable, _hf_layout(path, array).astype(dtype, copy=False)))

    return {path: load(path, variable) for path, variable in parameters.items()}


def _find_quantized(directory, fields) -> Find | None:
    """How to find quantized weights, from config.json or NVIDIA's file beside it."""
    file, settings = directory / "config.json", quantization_settings(fields)
    beside = directory / "hf_quant_config.json"
    if settings is None and beside.is_file():
        file = beside
        settings = quantization_settings({"quantization_config": read_json(beside).get("quantization")})
    try:
        return None if settings is None else read_quantization(settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _stored(directory, config, is_quantized) -> dict[str, StoredTensor]:
    """The tensors that count, by the names that a LlamaForCausalLM of transformers gives them."""
    stored = find_tensors(directory)
    if all(name.startswith(_PEFT_PREFIX) for name in stored):
        stored = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in stored.items()}
    if any(".lora_A." in name for name in stored):
        raise ValueError(
            f"{directory} has a model with LoRA matrices in it; save what model.merge_and_unload() returns "
            "in PEFT"
        )
    if not any(name.startswith("model.") for name in stored):
        stored = {name if name == _HEAD else f"model.{name}": tensor for name, tensor in stored.items()}
        if _HEAD not in stored and _EMBEDDING in stored and not config.tie_word_embeddings:
            raise ValueError(
                f"{directory} has a model without {_HEAD}, as LlamaModel saves it, and tie_word_embeddings "
                "is false; save the whole LlamaForCausalLM, or set it to true if the embedding is the head"
            )
    if config.tie_word_embeddings and _EMBEDDING not in stored and _HEAD in stored:
        stored[_EMBEDDING] = stored.pop(_HEAD)
    return {
        name: tensor
        for name, tensor in stored.items()
        if not _IGNORED_TENSORS.fullmatch(name) and not (is_quantized and ACTIVATION_SCALES.fullmatch(name))
    }


def _packed_weights(directory, find: Find, stored, kernels, shapes) -> dict[str, PackedWeight]:
    """The weights that are stored quantized, whatever the config says of their layers."""
    modules = {name.removesuffix(".weight"): {} for name in kernels}
    for name, tensor in stored.items():
        module = next((part for part in _modules_above(name) if part in modules), None)
        if module is not None and (name in kernels or name not in shapes):
            modules[module][name[len(module) + 1 :]] = tensor
    packed = {}
    for module, tensors in modules.items():
        is_plain = "weight" in tensors and tensors["weight"].dtype in FLOATS and len(tensors) == 1
        if tensors and not is_plain:
            name = f"{module}.weight"
            try:
                packed[name] = find(module, tensors, shapes[name])
            except ValueError as error:
                raise ValueError(f"{directory}: {module}: {error}") from error
    return packed


def _modules_above(name):
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _expected_parts(shapes, packed, *, tied) -> dict[str, Part]:
    """What each tensor must be, by its name."""
    parts = {name: Part(FLOATS, (shape,)) for name, shape in shapes.items() if name not in packed}
    for name, weight in packed.items():
        module = name.removesuffix("weight")
        parts = {module + end: part for end, part in weight.parts.items()} | parts  # its own bias stays
    if tied:
        parts[_HEAD] = Part(FLOATS, (shapes[_EMBEDDING],), optional=True)
    return parts


def _decoded(directory, name, weight, stored):
    module = name.removesuffix("weight")
    names = {end: module + end for end in weight.parts if module + end in stored}
    try:
        return weight.decode({end: read_tensor(stored[full]) for end, full in names.items()})
    except ValueError as error:
        raise ValueError(f"{directory}: {module[:-1]}: {error}") from error


def _hf_name(path):
    *modules, parameter = map(str, path)
    name = ".".join([*modules, _PARAMETERS[parameter][0]])
    return name if modules[0] == "lm_head" else f"model.{name}"


def _hf_layout(path, array):
    """The same parameter as torch lays it out; its own inverse."""
    return array.T if _PARAMETERS[path[-1]][1] else array


def _hf_shape(path, shape):
    return shape[::-1] if _PARAMETERS[path[-1]][1] else shape


def _check_tensors(directory, stored, parts):
    problems = [f"missing {name}" for name, part in parts.items() if name not in stored and not part.optional]
    for name, tensor in stored.items():
        part = parts.get(name)
        if part is None:
            problems.append(f"unexpected {name}")
        elif tensor.shape not in part.shapes:
            allowed = " or ".join(str(list(shape)) for shape in part.shapes)
            problems.append(f"{name} has shape {list(tensor.shape)}, the config says {allowed}")
        elif tensor.dtype not in part.dtypes:
            problems.append(f"{name} has dtype {tensor.dtype}, allowed are {', '.join(part.dtypes)}")
    if problems:
        raise ValueError(f"{directory}: the tensors do not fit the config: {'; '.join(problems)}")


def _stored_dtype(directory, fields, tensors):
    """The dtype that config.json gives, as transformers reads it, or else that of all tensors."""
    name = fields.get("torch_dtype") if fields.get("dtype") is None else fields["dtype"]
    if name is not None:
        if name not in [dtype.name for dtype in _DTYPES.values()]:
            raise ValueError(
                f"{directory}: config.json gives dtype {name!r}; give one, for instance jnp.float32"
            )
        return jnp.dtype(name)
    dtypes = sorted({tensor.dtype for tensor in tensors})
    if len(dtypes) > 1:
        raise ValueError(
            f"{directory} mixes {' and '.join(dtypes)}, and config.json has no dtype; give one, for instance "
            "jnp.float32"
        )
    return _DTYPES[dtypes[0]]


def _check_tied(directory, stored):
    if not np.array_equal(read_tensor(stored[_HEAD]), read_tensor(stored[_EMBEDDING])):
        raise ValueError(
            f"{directory}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}; "
            "set it to false to use both"
        )


def save(config: LlamaConfig, parameters: Parameters, directory: str | Path, *, max_shard_bytes: int) -> None:
    """Write ``config.json``, ``generation_config.json`` and the weights as transformers reads them.

    Weights keep their dtype and go into one ``model.safetensors``, or into shards of at most
    ``max_shard_bytes`` (one tensor may be larger) with an index. Everything is first written and flushed
    under a temporary name in the folder and then moved into place, so a crash while writing leaves what was
    there. Files of other kinds, like ``tokenizer.json``, stay; so do the other fields of a
    ``generation_config.json``, like those for sampling. Weights of an earlier save that the new ones do not
    replace are removed.

    Raises ValueError for a ``max_shard_bytes`` below 1, for parameters of a dtype that we would not read
    back, and for a ``generation_config.json`` that is there and cannot be read; NotADirectoryError where
    ``directory`` is a file.
    """
    directory = Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be >= 1, not {max_shard_bytes!r}")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory {directory} is a file")
    dtypes = sorted({variable.dtype.name for variable in parameters.values()})
    if not set(dtypes) <= {dtype.name for dtype in _DTYPES.values()}:
        raise ValueError(f"parameters have dtype {', '.join(dtypes)}; allowed are float32, float16, bfloat16")
    generation = generation_fields(directory, config)
    with written_whole(directory, last="config.json") as staging:
        _write_weights(staging, parameters, max_shard_bytes)
        _write_config(staging, config, dtypes)
        write_json(staging / GENERATION_FILE, generation)
        names = {file.name for file in staging.iterdir()}
    for file in directory.iterdir():
        is_weights = file.name in (SINGLE, INDEX) or _SHARD_NAME.fullmatch(file.name)
        if is_weights and file.name not in names:
            file.unlink()


def generation_fields(folder: Path, config: LlamaConfig) -> dict[str, Any]:
    """The ``generation_config.json`` of a model with ``config`` that is written into ``folder``.

    A file that is there keeps all its fields, and stops at the tokens of ``config``. Without one, it has the
    token ids of ``config``.

    Raises ValueError, naming the file, if it cannot be read.
    """
    fields, file = config.to_hf(), folder / GENERATION_FILE
    if not file.is_file():
        tokens = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {name: value for name, value in tokens.items() if value is not None}
    kept = read_json(file)
    try:
        stops = token_ids(kept.get("eos_token_id"), "eos_token_id")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return kept if stops == config.eos_token_ids else kept | {"eos_token_id": fields["eos_token_id"]}


def _write_weights(folder, parameters, max_shard_bytes):
    by_name = {_hf_name(path): (path, variable) for path, variable in parameters.items()}

    def read(name):
        path, variable = by_name[name]
        return np.ascontiguousarray(_hf_layout(path, np.asarray(variable[...])))

    sizes = {name: variable[...].nbytes for name, (_, variable) in by_name.items()}
    write_tensors(folder, sizes, read, max_shard_bytes)


def _write_config(folder, config, dtypes):
    fields = config.to_hf()
    if len(dtypes) == 1:
        fields["dtype"] = dtypes[0]
    write_json(folder / "config.json", fields)
