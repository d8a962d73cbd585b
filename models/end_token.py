"""The token that ends a text in training."""

import dataclasses
from pathlib import Path

import tokenizers

from jsparse.models.config import LlamaConfig
from jsparse.texts.tokenizer import eos_token_id


def end_token(directory: str | Path, tokenizer: tokenizers.Tokenizer, config: LlamaConfig) -> int | None:
    """The tokenizer's ``eos_token``; the first of ``config.eos_token_ids`` if its folder names none; or None.

    Raises ValueError for an ``eos_token`` that the tokenizer or the model's vocabulary does not have.
    """
    token = eos_token_id(directory, tokenizer)
    if token is None:
        return config.end_token
    if token >= config.vocab_size:
        raise ValueError(
            f"{directory}: eos_token has the id {token}, but the model's vocabulary has {config.vocab_size} "
            "entries: the tokenizer is not this model's"
        )
    return token


def also_ends_at(config: LlamaConfig, token: int | None) -> LlamaConfig:
    """The config of a model that also stops at the token that ended the texts of its training."""
    if token is None or token in config.eos_token_ids:
        return config
    return dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, token))
