"""The small trained model that ships with the package."""

from pathlib import Path


def shipped_model() -> Path:
    """The Hugging Face folder of the small Llama that is part of this package; nothing is downloaded.

    It holds what every checkpoint does (config.json, model.safetensors, tokenizer.json) and was trained on
    Python sources. It says little, but it reads its whole context, so it shows what a sparse cache loses.

    >>> from jsparse.models import load_config
    >>> load_config(shipped_model()).max_position_embeddings
    2048
    """
    return Path(__file__).parent / "small"
