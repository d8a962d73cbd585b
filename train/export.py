"""From a run to files that others read: a Hugging Face folder, or an adapter in PEFT's format."""

import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jsparse.models import Llama, has_lora, merge_lora
from jsparse.train.config import FinetuneConfig
from jsparse.train.patterns import AttentionPattern, save_pattern
from jsparse.train.processes import is_first_process

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export_model(
    config: FinetuneConfig, model: Llama, pattern: AttentionPattern, output: Path | None = None
) -> None:
    """Merge the adapters and write the Hugging Face folder: the tokenizer first, for the folder becomes a
    model with its config.json.
    """
    output = config.output_folder if output is None else output
    if has_lora(model):
        merge_lora(model)
    if jax.process_count() > 1:
        model = _gathered(model)
    if is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(config.model_folder, output)
        save_pattern(pattern, output)
        model.save_pretrained(output)


def copy_tokenizer(model: Path, output: Path) -> None:
    """The tokenizer's files, as they are."""
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, output / name)


def _gathered(model: Llama) -> Llama:
    """The model whole on every process."""
    from jax.experimental import multihost_utils

    graphdef, state = nnx.split(model)
    whole = jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), state)
    return nnx.merge(graphdef, whole)
