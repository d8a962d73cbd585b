"""Trained adapters as folders in PEFT's format: LoRA, what was trained beside it, and the RoPE it was for."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding

from jsparse.hub import model_folder
from jsparse.models.adapter_config import (
    CONFIG,
    LONGLORA_WEIGHTS,
    WEIGHTS,
    AdapterConfig,
    find_named,
    pickled,
    short_names,
    targets_among,
    whole_among,
)
from jsparse.models.checkpoint import load_config
from jsparse.models.config import LlamaConfig
from jsparse.models.layers import Linear, LoRAParam, RMSNorm, linear_layers
from jsparse.models.llama import Llama
from jsparse.models.lora import add_lora, has_lora
from jsparse.models.safetensors_folder import (
    INDEX,
    SINGLE,
    StoredTensor,
    read_header,
    read_json,
    read_tensor,
    written_whole,
)
from jsparse.models.sharding import put

_PREFIX = "base_model.model."  # of every tensor in PEFT's file; then comes its name in transformers
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"  # the modules' names in transformers
_DTYPES = ("F32", "F16", "BF16")

# Fields in which an adapter's config.json may differ: those it sets itself, and those no logit depends on.
_OWN = ("rope", "max_position_embeddings", "max_sequence_length")
_FREE = ("eos_token_ids", "bos_token_id", "pad_token_id", "initializer_range")


def save_adapter(model: Llama, directory: str | Path, *, base: str | Path, trained: Any) -> None:
    """Write the adapters of ``model``, and what was trained beside them, as PEFT reads them.

    ``adapter_model.safetensors`` has every adapter, ``lora_A`` [rank, in] and ``lora_B`` [out, rank]. It also
    has, whole, the embedding, norms and ``lm_head`` that ``trained`` selects; ``adapter_config.json`` names
    those as ``modules_to_save``. A tied embedding is written as ``lm_head`` too, because PEFT would otherwise
    keep the base's. ``config.json`` is the model's own, with its RoPE, which may be extended: PEFT has no
    place for that. Load it in transformers with ::

        longer = AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(directory))
        model = PeftModel.from_pretrained(longer, directory)

    ``AutoModelForCausalLM.from_pretrained(directory)`` fails: transformers expects a whole model beside a
    config.json. (Without one it would take the RoPE of the base and say nothing, as PEFT's own
    ``AutoPeftModelForCausalLM`` does.)

    Weights keep their dtype. Files appear whole, ``adapter_config.json`` last.

    - base: the folder of the model that was fine-tuned, or its name on the Hugging Face Hub.
    - trained: a filter for ``nnx.split``, the one used in training; LoRAParam writes adapters alone.

    Raises, before anything is written: ValueError for a model without adapters or with several ranks, scales
    or dropouts, for a ``trained`` that selects what an adapter cannot hold, an empty ``base``, and a folder
    with other weights in it; NotADirectoryError where ``directory`` is a file.

    >>> config = LlamaConfig.tiny()
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj", "v_proj"))
    >>> save_adapter(model, "adapter", base="my-llama", trained=LoRAParam)
    >>> sorted(file.name for file in Path("adapter").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'config.json']
    """
    directory = Path(directory)
    if not str(base):
        raise ValueError("base must be a folder or a name on the Hugging Face Hub, not ''")
    _check_folder(directory)
    linears, whole = _linears(model), _whole_weights(model)
    adapted = {name: linear for name, linear in linears.items() if linear.lora_a is not None}
    saved = _selected(model, trained, whole)
    rank, alpha, dropout = _settings(adapted.values())
    config = AdapterConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=short_names(adapted, linears, targets_among),
        whole=short_names(saved, whole, whole_among),
        tied=model.lm_head is None and _EMBEDDING in saved,
    )
    weights = _lora_weights(adapted) | {f"{name}.weight": whole[name] for name in saved}
    _write(directory, weights, {"config.json": model.config.to_hf(), CONFIG: config.to_peft(str(base))})


def load_adapter(model: Llama, directory: str | Path) -> None:
    """Attach the adapter in a PEFT folder to its base model, in place.

    The linear layers that it targets then compute ``x W + b + (lora_alpha / r) (x A) B``, A and B in float32;
    ``merge_lora`` folds them in. An embedding, norms and ``lm_head`` in the file replace the model's, in the
    model's dtype. The model takes RoPE and the count of positions from the folder's ``config.json``, if
    there is one.

    It reads the folders of ``save_adapter``, of PEFT, and of LongLoRA, which keeps embeddings and norms in
    ``trainable_params.safetensors``; ``directory`` may also be an id on the Hugging Face Hub, org/name or
    org/name@revision. LongLoRA does not record how far it extended the context: set
    ``model.config = model.config.extend_context(length)``. Pickles (``.bin``) are never opened.

    Everything is checked before anything changes. Raises FileNotFoundError for files that are missing or are
    pickles. Raises ValueError for a model that has adapters already; for an ``adapter_config.json`` that
    asks for other mathematics (DoRA, rsLoRA, biases, ranks by layer) or names no module of the model; for a
    ``config.json`` of another model; and, in one message, for all tensors that are missing, unexpected,
    misshapen or of a dtype other than float32, float16 and bfloat16.

    >>> config = LlamaConfig.tiny()
    >>> base, tuned = Llama(config, rngs=nnx.Rngs(0)), Llama(config, rngs=nnx.Rngs(0))
    >>> add_lora(tuned, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj",))
    >>> save_adapter(tuned, "adapter", base="my-llama", trained=LoRAParam)
    >>> load_adapter(base, "adapter")
    >>> base.layers[0].self_attn.q_proj.lora_scale
    2.0
    """
    directory = model_folder(directory, weights=True)
    if has_lora(model):
        raise ValueError("the model has LoRA adapters already; merge_lora(model) folds them in")
    linears, whole = _linears(model), _whole_weights(model)
    config, adapted, saved = _read_config(directory, linears, whole)
    model_config = _extended(directory, model.config)
    stored = _find_tensors(directory)
    lora = _lora_shapes({name: linears[name] for name in adapted}, config.rank)
    _check_tensors(directory, stored, lora, whole, saved)
    if model.lm_head is None:
        _check_tied(directory, stored, apart=_EMBEDDING in saved and not config.tied)
    arrays = {name: read_tensor(tensor) for name, tensor in stored.items()}

    add_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=[name.removeprefix("model.") for name in adapted],
        rngs=nnx.Rngs(0),
    )
    weights = {f"{name}.weight": weight for name, weight in whole.items()}
    weights |= _lora_weights({name: linears[name] for name in adapted})
    for name, array in arrays.items():
        weights[name].set(array)
    model.config = model_config


# The parts of a model that an adapter can hold, by the names of the modules in transformers.


class _Weight(NamedTuple):
    """A parameter, and whether torch stores its transpose."""

    parameter: nnx.Param
    transposed: bool = False

    def shape(self) -> tuple[int, ...]:
        """As torch has it."""
        shape = self.parameter[...].shape
        return shape[::-1] if self.transposed else shape

    def get(self) -> np.ndarray:
        array = np.asarray(self.parameter[...])
        return np.ascontiguousarray(array.T if self.transposed else array)

    def set(self, array: np.ndarray) -> None:
        """Replace the value; it keeps its dtype and, on a mesh, its place."""
        old = self.parameter[...]
        new = (array.T if self.transposed else array).astype(old.dtype)
        on_mesh = isinstance(old.sharding, NamedSharding)
        self.parameter[...] = put(new, old.sharding) if on_mesh else jnp.asarray(new)


def _linears(model: Llama) -> dict[str, Linear]:
    return {f"model.{path}": linear for path, linear in linear_layers(model)}


def _whole_weights(model: Llama) -> dict[str, _Weight]:
    """The weight of every module that can be saved whole; a tied ``lm_head`` has the embedding's."""
    embedding = _Weight(model.embed_tokens.embedding)
    norms = {
        f"model.{'.'.join(map(str, path))}": _Weight(module.scale)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, RMSNorm)
    }
    head = embedding if model.lm_head is None else _Weight(model.lm_head.kernel, transposed=True)
    return {_EMBEDDING: embedding, **norms, _HEAD: head}


def _lora_weights(adapted: Mapping[str, Linear]) -> dict[str, _Weight]:
    weights = {}
    for name, linear in adapted.items():
        assert linear.lora_a is not None and linear.lora_b is not None
        weights[f"{name}.lora_A.weight"] = _Weight(linear.lora_a, transposed=True)
        weights[f"{name}.lora_B.weight"] = _Weight(linear.lora_b, transposed=True)
    return weights


def _lora_shapes(linears: Mapping[str, Linear], rank: int) -> dict[str, tuple[int, ...]]:
    """The ``_Weight.shape`` that adapters will have once they are attached."""
    shapes = {}
    for name, linear in linears.items():
        shapes[f"{name}.lora_A.weight"] = (rank, linear.in_size)
        shapes[f"{name}.lora_B.weight"] = (linear.out_size, rank)
    return shapes


# Saving


def _check_folder(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory {directory} is a file")
    others = (SINGLE, INDEX, LONGLORA_WEIGHTS, pickled(LONGLORA_WEIGHTS), pickled(WEIGHTS))
    found = [name for name in others if (directory / name).exists()]
    if found:
        raise ValueError(f"directory {directory} has other weights ({', '.join(found)}); give another folder")


def _settings(adapted: Iterable[Linear]) -> tuple[int, int | float, float]:
    """Rank, alpha and dropout, which PEFT has once for all adapters."""
    settings = {
        (linear.lora_a[...].shape[1], linear.lora_scale, linear.lora_dropout)
        for linear in adapted
        if linear.lora_a is not None
    }
    if not settings:
        raise ValueError("the model has no LoRA adapters; save_pretrained writes a model without")
    if len(settings) > 1:
        found = ", ".join(f"({rank}, {scale}, {dropout})" for rank, scale, dropout in sorted(settings))
        raise ValueError(f"adapters must all have one rank, scale and dropout, but the model has {found}")
    ((rank, scale, dropout),) = settings
    alpha = scale * rank
    nearest = round(alpha)
    return rank, nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha, dropout


def _selected(model: Llama, trained: Any, whole: Mapping[str, _Weight]) -> list[str]:
    """The modules to save whole: those of all parameters that ``trained`` selects, except adapters."""
    selected = nnx.to_flat_state(nnx.state(model, trained))
    paths = [".".join(map(str, path)) for path, variable in selected if not isinstance(variable, LoRAParam)]
    modules = {path: path.rsplit(".", 1)[0] for path in paths}
    names = {path: module if module == _HEAD else f"model.{module}" for path, module in modules.items()}
    strangers = [path for path, name in names.items() if name not in whole]
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise ValueError(
            f"trained selects {shown}; beside LoRA, an adapter holds only the embedding, norms and lm_head "
            "(merge_lora and save_pretrained write everything)"
        )
    chosen = set(names.values())
    is_tied = model.lm_head is None and _EMBEDDING in chosen
    return sorted(chosen | {_HEAD} if is_tied else chosen)


def _write(directory: Path, weights: Mapping[str, _Weight], jsons: Mapping[str, dict]) -> None:
    with written_whole(directory, last=CONFIG) as staging:
        tensors = {_PREFIX + name: weight.get() for name, weight in weights.items()}
        safetensors.numpy.save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        for name, content in jsons.items():
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Loading


def _read_config(
    directory: Path, linears: Iterable[str], whole: Iterable[str]
) -> tuple[AdapterConfig, list[str], list[str]]:
    """What adapter_config.json says, and the modules that it means: adapted, and saved whole."""
    file = directory / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is not an adapter folder: it has no {CONFIG}")
    try:
        config = AdapterConfig.from_peft(read_json(file))
        adapted = find_named("target_modules", config.targets, linears, targets_among)
        saved = find_named("modules_to_save", config.whole, whole, whole_among)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config, adapted, saved


def _extended(directory: Path, config: LlamaConfig) -> LlamaConfig:
    """The model's config with the RoPE that the adapter was trained with."""
    if not (directory / "config.json").is_file():
        return config
    stored = load_config(directory)
    names = {field.name for field in dataclasses.fields(LlamaConfig)}.difference(_OWN, _FREE)
    differences = [
        f"{name} is {getattr(stored, name)!r}, the model's {getattr(config, name)!r}"
        for name in sorted(names)
        if getattr(stored, name) != getattr(config, name)
    ]
    if differences:
        raise ValueError(f"{directory / 'config.json'} is of another model: {'; '.join(differences)}")
    return dataclasses.replace(config, **{name: getattr(stored, name) for name in _OWN})


def _find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of an adapter by their names in transformers, from the headers alone."""
    for name in (WEIGHTS, LONGLORA_WEIGHTS):
        if (directory / pickled(name)).is_file() and not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / pickled(name)} is a pickle file, which can run code and is not opened; "
                f"allowed is {name}: jsparse convert --model {directory} --output NEW_FOLDER writes it"
            )
    if not (directory / WEIGHTS).is_file():
        raise FileNotFoundError(f"{directory} has no {WEIGHTS}")
    tensors = {
        name.removeprefix(_PREFIX): tensor for name, tensor in read_header(directory / WEIGHTS).items()
    }
    beside = read_header(directory / LONGLORA_WEIGHTS) if (directory / LONGLORA_WEIGHTS).is_file() else {}
    twice = sorted(tensors.keys() & beside.keys())
    if twice:
        raise ValueError(f"{directory} has in {WEIGHTS} and in {LONGLORA_WEIGHTS}: {', '.join(twice)}")
    return tensors | beside


def _check_tensors(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    lora: Mapping[str, tuple[int, ...]],
    whole: Mapping[str, _Weight],
    saved: Iterable[str],
) -> None:
    shapes = dict(lora) | {f"{name}.weight": weight.shape() for name, weight in whole.items()}
    # _check_tied says when a tied lm_head, which is the embedding, must be there.
    own = [name for name in saved if name == _EMBEDDING or whole[name] is not whole[_EMBEDDING]]
    required = [*lora, *(f"{name}.weight" for name in own)]
    problems = [f"missing {name}" for name in required if name not in stored]
    for name, tensor in stored.items():
        if name not in shapes:
            problems.append(f"unexpected {name}")
        elif tensor.shape != shapes[name]:
            shape, expected = list(tensor.shape), list(shapes[name])
            problems.append(f"{name} has shape {shape}, not {expected}{_about_rows(name, shape, expected)}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"{name} has dtype {tensor.dtype}, allowed are {', '.join(_DTYPES)}")
    if problems:
        raise ValueError(f"{directory}: the tensors do not fit the model and r: {'; '.join(problems)}")


def _about_rows(name: str, shape: list[int], expected: list[int]) -> str:
    is_table = name in (f"{_EMBEDDING}.weight", f"{_HEAD}.weight")
    if not is_table or len(shape) != 2 or shape[1] != expected[1] or shape[0] <= expected[0]:
        return ""
    return (
        " (tokens were added to the vocabulary before training, as LongLoRA adds [PAD]; add them to the base "
        f"first: in transformers, model.resize_token_embeddings({shape[0]}) and model.save_pretrained)"
    )


def _check_tied(directory: Path, stored: Mapping[str, StoredTensor], *, apart: bool) -> None:
    """Refuse an lm_head that is not the embedding. ``apart``: if none is in the file, it is the base's."""
    embedding, head = stored.get(f"{_EMBEDDING}.weight"), stored.get(f"{_HEAD}.weight")
    if head is None and not apart:
        return
    if head is None or embedding is None or not np.array_equal(read_tensor(head), read_tensor(embedding)):
        raise ValueError(
            f"{directory}: the model ties lm_head to the embedding, but with this adapter PEFT would have "
            "two different ones; untie the base (tie_word_embeddings false, and both weights in its file)"
        )
