"""Trained adapters as folders in PEFT's format: LoRA, what was trained beside it, and the RoPE it was for."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
    pickled,
)
from jsparse.models.checkpoint import load_config
from jsparse.models.config import LlamaConfig
from jsparse.models.layers import Linear, LoRAParam, RMSNorm, adaptable_layers, linear_layers
from jsparse.models.llama import Llama
from jsparse.models.lora import add_lora, has_lora
from jsparse.models.peft_names import (
    EMBEDDING,
    HEAD,
    module_name,
    short_names,
    short_patterns,
    short_targets,
    unmatched_keys,
    whole_among,
)
from jsparse.models.positions import note
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
_TABLE = f"{EMBEDDING}.weight"
# What PEFT writes beside an adapter on the head: the weight that it was trained on.
_BASE_HEAD = f"{HEAD}.base_layer.weight"
_DTYPES = ("F32", "F16", "BF16")

V = TypeVar("V")

# Fields in which an adapter's config.json may differ: those it sets itself, and those no logit depends on.
POSITION_FIELDS = ("rope", "max_position_embeddings", "max_sequence_length")
_FREE = ("eos_token_ids", "bos_token_id", "pad_token_id", "initializer_range")


def save_adapter(model: Llama, directory: str | Path, *, base: str | Path, trained: Any) -> None:
    """Write the adapters of ``model``, and what was trained beside them, as PEFT reads them.

    ``adapter_model.safetensors`` has every adapter, ``lora_A`` [rank, in] and ``lora_B`` [out, rank]. It also
    has, whole, the embedding, norms, linear layers and ``lm_head`` that ``trained`` selects;
    ``adapter_config.json`` names those as ``modules_to_save``. A tied embedding is written as ``lm_head``
    too, because PEFT would otherwise keep the base's; with an adapter on that head, as its ``base_layer``.
    Ranks and alphas that differ are written as ``rank_pattern`` and ``alpha_pattern``, rsLoRA as
    ``use_rslora``. ``config.json`` is the model's own, with its RoPE, which may be extended: PEFT has no
    place for that. Load it in transformers with ::

        longer = AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(directory))
        model = PeftModel.from_pretrained(longer, directory)

    ``AutoModelForCausalLM.from_pretrained(directory)`` fails: transformers expects a whole model beside a
    config.json. (Without one it would take the RoPE of the base and say nothing, as PEFT's own
    ``AutoPeftModelForCausalLM`` does.)

    Weights keep their dtype. Files appear whole, ``adapter_config.json`` last.

    - base: the folder of the model that was fine-tuned, or its name on the Hugging Face Hub.
    - trained: a filter for ``nnx.split``, the one used in training; LoRAParam writes adapters alone.

    Raises, before anything is written: ValueError for a model without adapters or with several dropouts, for
    a ``trained`` that selects what an adapter cannot hold, an empty ``base``, and a folder with other weights
    in it; NotADirectoryError where ``directory`` is a file.

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
    adapted = {name: linear for name, linear in _linears(model).items() if linear.lora_a is not None}
    whole = _whole_weights(model)
    saved = _selected(model, trained, whole, adapted)
    tied = model.config.tie_word_embeddings and EMBEDDING in saved
    targets, layers = short_targets(adapted, _sizes(model))
    config = AdapterConfig(
        **_settings(adapted),
        targets=targets,
        layers=layers,
        whole=short_names(saved, whole, whole_among),
        tied=tied and HEAD not in adapted,
    )
    weights = _lora_weights(adapted) | _tensors(whole, saved)
    if tied and HEAD in adapted:
        weights[_BASE_HEAD] = weights[_TABLE]
    _write(directory, weights, {"config.json": model.config.to_hf(), CONFIG: config.to_peft(str(base))})


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
    sizes, whole = _sizes(model), _whole_weights(model)
    config, adapted, saved = _read_config(directory, sizes, whole)
    coded = [name for name, linear in _linears(model).items() if name in saved and linear.codes is not None]
    if coded:
        raise ValueError(
            f"{directory} replaces {', '.join(coded)}, but the model's base is quantized; "
            "call dequantize_base(model) first"
        )
    model_config = _extended(directory, model.config)
    stored = _find_tensors(directory)
    lora = _lora_shapes({name: (*sizes[name], config.rank_of(name)) for name in adapted})
    # LongLoRA's folders do not say that embeddings and norms are in them, and PEFT's not that the head is.
    replaced = _tensors(whole, [name for name in whole if name in saved or name not in sizes or name == HEAD])
    if HEAD in adapted:
        replaced[_BASE_HEAD] = replaced.pop(f"{HEAD}.weight")
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
    linears = _linears(model)
    weights = replaced | _lora_weights({name: linears[name] for name in adapted})
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
    return {module_name(path): linear for path, linear in adaptable_layers(model)}


def _sizes(model: Llama) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every layer that can be adapted; a head is among them also if it is tied."""
    sizes = {module_name(path): (linear.in_size, linear.out_size) for path, linear in linear_layers(model)}
    return sizes | {HEAD: (model.config.hidden_size, model.config.vocab_size)}


def _whole_weights(model: Llama) -> dict[str, dict[str, _Weight]]:
    """The weights of every module that can be saved whole; a tied ``lm_head`` has the embedding's."""
    embedding = {"weight": _Weight(model.embed_tokens.embedding)}
    norms = {
        module_name(".".join(map(str, path))): {"weight": _Weight(module.scale)}
        for path, module in nnx.iter_modules(model)
        if isinstance(module, RMSNorm)
    }
    linears = {
        name: {"weight": _Weight(linear.kernel, transposed=True)}
        | ({} if linear.bias is None else {"bias": _Weight(linear.bias)})
        for name, linear in _linears(model).items()
    }
    head = {HEAD: embedding} if model.config.tie_word_embeddings else {}
    return {EMBEDDING: embedding} | norms | linears | head


def _tensors(whole: Mapping[str, dict[str, _Weight]], names: Iterable[str]) -> dict[str, _Weight]:
    """The weights of these modules by the names of their tensors."""
    return {f"{name}.{part}": weight for name in names for part, weight in whole[name].items()}


def _lora_weights(adapted: Mapping[str, Linear]) -> dict[str, _Weight]:
    weights = {}
    for name, linear in adapted.items():
        assert linear.lora_a is not None and linear.lora_b is not None
        weights[f"{name}.lora_A.weight"] = _Weight(linear.lora_a, transposed=True)
        weights[f"{name}.lora_B.weight"] = _Weight(linear.lora_b, transposed=True)
    return weights


def _lora_shapes(sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, ...]]:
    """The ``_Weight.shape`` that adapters will have, from their inputs, outputs and ranks."""
    shapes = {}
    for name, (inputs, outputs, rank) in sizes.items():
        shapes[f"{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, rank)
    return shapes


# Saving


def _check_folder(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory {directory} is a file")
    others = (SINGLE, INDEX, LONGLORA_WEIGHTS, pickled(LONGLORA_WEIGHTS), pickled(WEIGHTS))
    found = [name for name in others if (directory / name).exists()]
    if found:
        raise ValueError(f"directory {directory} has other weights ({', '.join(found)}); give another folder")


def _settings(adapted: Mapping[str, Linear]) -> dict[str, Any]:
    """Ranks, alphas and dropout, as the fields of an AdapterConfig."""
    if not adapted:
        raise ValueError("the model has no LoRA adapters; save_pretrained writes a model without")
    dropouts = sorted({linear.lora_dropout for linear in adapted.values()})
    if len(dropouts) > 1:
        raise ValueError(f"adapters must all have one dropout, but the model has {dropouts}")
    rslora = all(linear.lora_rslora for linear in adapted.values())
    ranks, alphas = {}, {}
    for name, linear in adapted.items():
        assert linear.lora_a is not None
        ranks[name] = rank = linear.lora_a[...].shape[1]
        alpha = linear.lora_scale * (math.sqrt(rank) if rslora else rank)
        nearest = round(alpha)
        alphas[name] = nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "rank": rank,
        "alpha": alpha,
        "rslora": rslora,
        "rank_pattern": short_patterns(ranks, rank),
        "alpha_pattern": short_patterns(alphas, alpha),
        "dropout": dropouts[0],
    }


def _selected(model: Llama, trained: Any, whole: Iterable[str], adapted: Collection[str]) -> list[str]:
    """The modules to save whole: those of all parameters that ``trained`` selects, except adapters."""
    selected = nnx.to_flat_state(nnx.state(model, trained))
    paths = [".".join(map(str, path)) for path, variable in selected if not isinstance(variable, LoRAParam)]
    names = {path: module_name(path.rsplit(".", 1)[0]) for path in paths}
    strangers = [path for path, name in names.items() if name not in whole or name in adapted]
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise ValueError(
            f"trained selects {shown}; an adapter holds a module's LoRA or its whole weights, not both "
            "(merge_lora and save_pretrained write everything)"
        )
    chosen = set(names.values())
    as_head = model.config.tie_word_embeddings and EMBEDDING in chosen and HEAD not in adapted
    return sorted(chosen | {HEAD} if as_head else chosen)


def _write(directory: Path, weights: Mapping[str, _Weight], jsons: Mapping[str, dict]) -> None:
    with written_whole(directory, last=CONFIG) as staging:
        tensors = {_PREFIX + name: weight.get() for name, weight in weights.items()}
        safetensors.numpy.save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        for name, content in jsons.items():
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Loading


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


def _required(whole: Mapping[str, dict[str, _Weight]], saved: Iterable[str]) -> list[str]:
    """The tensors that must be there. ``_check_tied`` says when a tied lm_head, the embedding, must be."""
    own = [name for name in saved if name == EMBEDDING or whole[name] is not whole[EMBEDDING]]
    return list(_tensors(whole, own))


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
    replaced: Mapping[str, _Weight],
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
    is_table = name in (_TABLE, _BASE_HEAD, f"{HEAD}.weight")
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
    embedding, head = stored.get(_TABLE), stored.get(_BASE_HEAD if head_adapted else f"{HEAD}.weight")
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
