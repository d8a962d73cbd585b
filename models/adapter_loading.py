"""Adapters in PEFT's format, read into their base model: LoRA, what was trained beside it, and RoPE."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from flax import nnx

from jsparse.hub import model_folder
from jsparse.models.adapter_config import CONFIG, LONGLORA_WEIGHTS, WEIGHTS, AdapterConfig, pickled
from jsparse.models.adapter_parts import (
    BASE_HEAD,
    PREFIX,
    TABLE,
    Weight,
    linears_of,
    lora_weights,
    sizes_of,
    tensors_of,
    whole_weights,
)
from jsparse.models.checkpoint import load_config
from jsparse.models.config import LlamaConfig
from jsparse.models.llama import Llama
from jsparse.models.lora import add_lora, has_lora
from jsparse.models.peft_names import EMBEDDING, HEAD, unmatched_keys
from jsparse.models.positions import note
from jsparse.models.safetensors_folder import StoredTensor, read_header, read_json, read_tensor

_DTYPES = ("F32", "F16", "BF16")

V = TypeVar("V")

# Fields in which an adapter's config.json may differ: those it sets itself, and those no logit depends on.
POSITION_FIELDS = ("rope", "max_position_embeddings", "max_sequence_length")
_FREE = ("eos_token_ids", "bos_token_id", "pad_token_id", "initializer_range")


def load_adapter(model: Llama, directory: str | Path) -> None:
    """Attach the adapter in a PEFT folder to its base model, in place.

    The layers that it targets then compute ``x W + b + scale (x A) B``, A and B in float32; ``merge_lora``
    folds them in. The scale is ``lora_alpha / r``, or with rsLoRA ``lora_alpha / sqrt(r)``; ``rank_pattern``
    and ``alpha_pattern`` change both by layer. What is in the file whole, like an embedding, norms and
    ``lm_head``, replaces the model's, in the model's dtype. The model takes RoPE and the count of positions
    from the folder's ``config.json``, if there is one.

    It reads the folders of ``save_adapter``, of PEFT, and of LongLoRA, which keeps embeddings and norms in
    ``trainable_params.safetensors``; ``directory`` may also be an id on the Hugging Face Hub, org/name or
    org/name@revision. LongLoRA does not record how far it extended the context: set
    ``model.config = model.config.extend_context(length)``. Pickles (``.bin``) are never opened.

    Everything is checked before anything changes. Raises FileNotFoundError for files that are missing or are
    pickles. Raises ValueError for a model that has adapters already; for an ``adapter_config.json`` that
    asks for other mathematics (DoRA, biases, adapters of embeddings) or names no module of the model; for a
    ``config.json`` of another model; and, in one message, for all tensors that are missing, unexpected,
    misshapen or of a dtype other than float32, float16 and bfloat16.

    >>> from jsparse.models import LoRAParam, save_adapter
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
    sizes, whole = sizes_of(model), whole_weights(model)
    config, adapted, saved = _read_config(directory, sizes, whole)
    coded = [name for name, linear in linears_of(model).items() if name in saved and linear.codes is not None]
    if coded:
        raise ValueError(
            f"{directory} replaces {', '.join(coded)}, but the model's base is quantized; "
            "call dequantize_base(model) first"
        )
    model_config = _extended(directory, model.config)
    stored = _find_tensors(directory)
    lora = _lora_shapes({name: (*sizes[name], config.rank_of(name)) for name in adapted})
    # LongLoRA's folders do not say that embeddings and norms are in them, and PEFT's not that the head is.
    replaced = tensors_of(
        whole, [name for name in whole if name in saved or name not in sizes or name == HEAD]
    )
    if HEAD in adapted:
        replaced[BASE_HEAD] = replaced.pop(f"{HEAD}.weight")
    _check_tensors(directory, stored, lora, replaced, _required(whole, saved))
    if model.config.tie_word_embeddings:
        _check_tied(
            directory, stored, config, head_adapted=HEAD in adapted, embedding_saved=EMBEDDING in saved
        )
    arrays = {name: read_tensor(tensor) for name, tensor in stored.items()}

    add_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        rank_pattern=_meaning(directory, "rank_pattern", config.rank_pattern, adapted),
        alpha_pattern=_meaning(directory, "alpha_pattern", config.alpha_pattern, adapted),
        dropout=config.dropout,
        targets=[name.removeprefix("model.") for name in adapted],
        rngs=nnx.Rngs(0),
    )
    linears = linears_of(model)
    weights = replaced | lora_weights({name: linears[name] for name in adapted})
    for name, array in arrays.items():
        weights[name].set(array)
    model.config = model_config


def _read_config(
    directory: Path, modules: Iterable[str], savable: Iterable[str]
) -> tuple[AdapterConfig, list[str], list[str]]:
    """What adapter_config.json says, and the modules that it means: adapted, and saved whole."""
    file = directory / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is not an adapter folder: it has no {CONFIG}")
    try:
        config = AdapterConfig.from_peft(read_json(file))
        adapted, saved = config.find(modules, savable)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config, adapted, saved


def _meaning(directory: Path, name: str, pattern: Mapping[str, V], adapted: Iterable[str]) -> dict[str, V]:
    """A rank_pattern or alpha_pattern without the keys that mean no adapter, which PEFT ignores."""
    unmatched = unmatched_keys(pattern, adapted)
    if unmatched:
        note(f"{directory / CONFIG}: {name} {unmatched} means none of the adapted modules")
    return {key: value for key, value in pattern.items() if key not in unmatched}


def _required(whole: Mapping[str, dict[str, Weight]], saved: Iterable[str]) -> list[str]:
    """The tensors that must be there. ``_check_tied`` says when a tied lm_head, the embedding, must be."""
    own = [name for name in saved if name == EMBEDDING or whole[name] is not whole[EMBEDDING]]
    return list(tensors_of(whole, own))


def _extended(directory: Path, config: LlamaConfig) -> LlamaConfig:
    """The model's config with the RoPE that the adapter was trained with."""
    if not (directory / "config.json").is_file():
        return config
    stored = load_config(directory)
    names = {field.name for field in dataclasses.fields(LlamaConfig)}.difference(POSITION_FIELDS, _FREE)
    differences = [
        f"{name} is {getattr(stored, name)!r}, the model's {getattr(config, name)!r}"
        for name in sorted(names)
        if getattr(stored, name) != getattr(config, name)
    ]
    if differences:
        raise ValueError(f"{directory / 'config.json'} is of another model: {'; '.join(differences)}")
    return dataclasses.replace(config, **{name: getattr(stored, name) for name in POSITION_FIELDS})


def _lora_shapes(sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, ...]]:
    """The ``Weight.shape`` that adapters will have, from their inputs, outputs and ranks."""
    shapes = {}
    for name, (inputs, outputs, rank) in sizes.items():
        shapes[f"{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, rank)
    return shapes


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
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_header(directory / WEIGHTS).items()}
    beside = read_header(directory / LONGLORA_WEIGHTS) if (directory / LONGLORA_WEIGHTS).is_file() else {}
    twice = sorted(tensors.keys() & beside.keys())
    if twice:
        raise ValueError(f"{directory} has in {WEIGHTS} and in {LONGLORA_WEIGHTS}: {', '.join(twice)}")
    return tensors | beside


def _check_tensors(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    lora: Mapping[str, tuple[int, ...]],
    replaced: Mapping[str, Weight],
    required: Iterable[str],
) -> None:
    shapes = dict(lora) | {name: weight.shape() for name, weight in replaced.items()}
    problems = [f"missing {name}" for name in (*lora, *required) if name not in stored]
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
    is_table = name in (TABLE, BASE_HEAD, f"{HEAD}.weight")
    if not is_table or len(shape) != 2 or shape[1] != expected[1] or shape[0] <= expected[0]:
        return ""
    return (
        " (tokens were added to the vocabulary before training, as LongLoRA adds [PAD]; add them to the base "
        f"first: in transformers, model.resize_token_embeddings({shape[0]}) and model.save_pretrained)"
    )


def _check_tied(
    directory: Path,
    stored: Mapping[str, StoredTensor],
    config: AdapterConfig,
    *,
    head_adapted: bool,
    embedding_saved: bool,
) -> None:
    """Refuse an lm_head that is not the embedding."""
    embedding, head = stored.get(TABLE), stored.get(BASE_HEAD if head_adapted else f"{HEAD}.weight")
    if head_adapted and config.tied and embedding_saved:
        raise ValueError(
            f"{directory}: with ensure_weight_tying, lm_head is the embedding, which modules_to_save names, "
            "and cannot have an adapter too"
        )
    # A head that is not in the file is the base's, unless PEFT ties it.
    if head is None and (config.tied or not embedding_saved):
        return
    if head_adapted and embedding is None:
        return  # in PEFT too, what the adapted head was trained on is the embedding
    if head is None or embedding is None or not np.array_equal(read_tensor(head), read_tensor(embedding)):
        raise ValueError(
            f"{directory}: the model ties lm_head to the embedding, but with this adapter PEFT would have "
            "two different ones; untie the base (tie_word_embeddings false, and both weights in its file)"
        )
