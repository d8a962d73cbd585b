"""Trained adapters written in PEFT's format: LoRA, what was trained beside it, and the RoPE it was for."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy
from flax import nnx

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
from jsparse.models.layers import Linear, LoRAParam
from jsparse.models.llama import Llama
from jsparse.models.peft_names import (
    EMBEDDING,
    HEAD,
    module_name,
    short_names,
    short_patterns,
    short_targets,
    whole_among,
)
from jsparse.models.safetensors_folder import INDEX, SINGLE, written_whole


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

    >>> from jsparse.models import LlamaConfig, add_lora
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
    adapted = {name: linear for name, linear in linears_of(model).items() if linear.lora_a is not None}
    whole = whole_weights(model)
    saved = _selected(model, trained, whole, adapted)
    tied = model.config.tie_word_embeddings and EMBEDDING in saved
    targets, layers = short_targets(adapted, sizes_of(model))
    config = AdapterConfig(
        **_settings(adapted),
        targets=targets,
        layers=layers,
        whole=short_names(saved, whole, whole_among),
        tied=tied and HEAD not in adapted,
    )
    weights = lora_weights(adapted) | tensors_of(whole, saved)
    if tied and HEAD in adapted:
        weights[BASE_HEAD] = weights[TABLE]
    _write(directory, weights, {"config.json": model.config.to_hf(), CONFIG: config.to_peft(str(base))})


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


def _write(directory: Path, weights: Mapping[str, Weight], jsons: Mapping[str, dict]) -> None:
    with written_whole(directory, last=CONFIG) as staging:
        tensors = {PREFIX + name: weight.get() for name, weight in weights.items()}
        safetensors.numpy.save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        for name, content in jsons.items():
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
