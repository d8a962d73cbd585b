"""Hugging Face folders: reading checks everything before it allocates, writing replaces whole files only."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from jsparse.models.config import LlamaConfig
from jsparse.models.hf_config import token_ids
from jsparse.models.safetensors_folder import INDEX, SINGLE, StoredTensor, find_tensors, read_json

# Our modules have Hugging Face's names. Parameters are called what they are, theirs are all "weight", and
# torch stores a linear layer as [out, in]. {our name: (their name, transposed)}
_PARAMETERS = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
_IGNORED_TENSORS = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)?rotary_emb\.inv_freq")
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def load_config(directory: str | Path) -> LlamaConfig:
    """The config of a Hugging Face folder; stop tokens in ``generation_config.json`` win over its own."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is not a checkpoint folder: it has no config.json")
    try:
        config = LlamaConfig.from_hf(read_json(directory / "config.json"))
        generation = directory / "generation_config.json"
        eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        return (
            config
            if eos is None
            else dataclasses.replace(config, eos_token_ids=token_ids(eos, "eos_token_id"))
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"{directory}: {error}") from error


def load_parameters(directory: str | Path, config: LlamaConfig, state: nnx.State, *, dtype=None) -> nnx.State:
    """The parameters of an abstract ``state``, read from the safetensors in a Hugging Face folder.

    ``dtype`` None keeps the stored dtype, which must then be one for all tensors.

    Raises FileNotFoundError for weights that are not there (pickled ones do not count), and ValueError with,
    in one message, every tensor that is missing, unexpected, misshapen or of a dtype other than float32,
    float16 and bfloat16. Nothing is allocated before that.
    """
    directory = Path(directory)
    stored = {
        name: tensor
        for name, tensor in find_tensors(directory).items()
        if not _IGNORED_TENSORS.fullmatch(name)
    }
    parameters = {_hf_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    _check_tensors(directory, config, stored, {name: _hf_shape(*found) for name, found in parameters.items()})
    if dtype is None:
        dtype = _common_dtype(directory, stored)

    loaded = []
    with contextlib.ExitStack() as stack:
        files = {
            file: stack.enter_context(_open(file)) for file in {tensor.file for tensor in stored.values()}
        }
        if config.tie_word_embeddings and "lm_head.weight" in stored:
            _check_tied(directory, files, stored)
        for name, (path, variable) in parameters.items():
            array = files[stored[name].file].get_tensor(name)
            array = array.T if _PARAMETERS[path[-1]][1] else array
            loaded.append((path, variable.replace(jnp.asarray(array, dtype))))
    return nnx.from_flat_state(loaded)


def _hf_name(path):
    *modules, parameter = map(str, path)
    name = ".".join([*modules, _PARAMETERS[parameter][0]])
    return name if modules[0] == "lm_head" else f"model.{name}"


def _hf_shape(path, variable):
    return variable.shape[::-1] if _PARAMETERS[path[-1]][1] else variable.shape


def _check_tensors(directory, config, stored, shapes):
    expected = set(shapes)
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        shapes = shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]}
    problems = [f"missing {name}" for name in sorted(expected - set(stored))]
    problems += [f"unexpected {name}" for name in sorted(set(stored) - set(shapes))]
    for name in sorted(set(stored) & set(shapes)):
        if stored[name].shape != shapes[name]:
            problems.append(
                f"{name} has shape {list(stored[name].shape)}, the config says {list(shapes[name])}"
            )
        if stored[name].dtype not in _DTYPES:
            problems.append(f"{name} has dtype {stored[name].dtype}, allowed are {', '.join(_DTYPES)}")
    if problems:
        raise ValueError(f"{directory} does not fit its config: {'; '.join(problems)}")


def _common_dtype(directory, stored):
    dtypes = sorted({tensor.dtype for tensor in stored.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"{directory} mixes {' and '.join(dtypes)}; choose one with dtype, for instance jnp.float32"
        )
    return _DTYPES[dtypes[0]]


@contextlib.contextmanager
def _open(file):
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _check_tied(directory, files, stored: dict[str, StoredTensor]):
    head, embedding = (
        files[stored[name].file].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    if not np.array_equal(head, embedding):
        raise ValueError(
            f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false to use both"
        )


def save(config: LlamaConfig, state: nnx.State, directory: str | Path, *, max_shard_bytes: int) -> None:
    """Write ``config.json``, ``generation_config.json`` and the weights, which transformers reads to the same
    logits.

    Weights keep their dtype and go into one ``model.safetensors``, or into shards of at most
    ``max_shard_bytes`` (one tensor may be larger) with an index. Everything is first written and flushed
    under a temporary name in the folder and then moved into place, so that a crash while writing leaves what
    was there. Files of other kinds, like ``tokenizer.json``, stay; weights of an earlier save that the new
    ones do not replace are removed.

    Raises ValueError for a ``max_shard_bytes`` below 1, NotADirectoryError where ``directory`` is a file.
    """
    directory = Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be >= 1, not {max_shard_bytes!r}")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory {directory} is a file")
    parameters = {_hf_name(path): (path, variable[...]) for path, variable in nnx.to_flat_state(state)}
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        _write_weights(staging, parameters, max_shard_bytes)
        _write_configs(staging, config, {str(array.dtype) for _, array in parameters.values()})
        _move_into_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(folder, parameters, max_shard_bytes):
    shards = _plan_shards({name: array.nbytes for name, (_, array) in parameters.items()}, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            path, array = parameters[name]
            array = np.asarray(jax.device_get(array))
            tensors[name] = np.ascontiguousarray(array.T if _PARAMETERS[path[-1]][1] else array)
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(array.nbytes for _, array in parameters.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(sizes, max_shard_bytes):
    shards, free = [[]], max_shard_bytes
    for name, size in sizes.items():
        if size > free and shards[-1]:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= size
    return shards


def _write_configs(folder, config, dtypes):
    fields = config.to_hf()
    if len(dtypes) == 1:
        fields["dtype"] = dtypes.pop()
    _write_json(folder / "config.json", fields)
    tokens = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(
        folder / "generation_config.json",
        {name: value for name, value in tokens.items() if value is not None},
    )


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move_into_place(staging, directory):
    new = sorted(
        staging.iterdir(), key=lambda file: file.suffix != ".safetensors"
    )  # weights, then what names them
    for file in new:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    names = {file.name for file in new}
    for file in new:
        os.replace(file, directory / file.name)
    for file in directory.iterdir():
        stale = file.name in (SINGLE, INDEX) or _SHARD_NAME.fullmatch(file.name)
        if stale and file.name not in names:
            file.unlink()
