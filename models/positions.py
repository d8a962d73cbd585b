"""How many positions a model has, where Hugging Face's fields leave that open."""

import dataclasses
import functools
import logging
from typing import Protocol, runtime_checkable

from jsparse.models.rope import RopeConfig


@runtime_checkable
class PositionFields(Protocol):
    """The fields of a LlamaConfig that say how many positions it has."""

    @property
    def rope(self) -> RopeConfig: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def max_sequence_length(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class Positions:
    """How many positions a model has: ``certain`` by every reading of its config, ``most`` by the larger."""

    certain: int
    most: int


def positions_of(config: PositionFields) -> Positions:
    """How many positions the model of a config has.

    - YaRN: ``original_max_position_embeddings`` times the factor, whatever ``max_position_embeddings`` says.
      Published recipes set the factor alone.
    - Linear: published files disagree. LongLoRA's and Vicuna's ``max_position_embeddings`` is the length
      before the factor, Together's the length after it. Both readings are given, unless
      ``max_sequence_length`` decides between them: Vicuna's files have it, and so do those that we write.
    - Other kinds: ``max_position_embeddings``.

    >>> from jsparse.models import LlamaConfig, RopeConfig
    >>> config = LlamaConfig.tiny(max_position_embeddings=64, rope=RopeConfig(kind="linear", factor=8.0))
    >>> positions_of(config)
    Positions(certain=64, most=512)
    """
    rope, written = config.rope, config.max_position_embeddings
    if rope.kind == "yarn":
        assert rope.original_max_position_embeddings and rope.factor
        count = _times(rope.original_max_position_embeddings, rope.factor)
        return Positions(count, count)
    if rope.kind == "linear":
        assert rope.factor
        if config.max_sequence_length is not None:
            return Positions(config.max_sequence_length, config.max_sequence_length)
        return Positions(written, _times(written, rope.factor))
    return Positions(written, written)


def sequence_length_from_hf(value: object, rope_kind: str, factor: float | None, written: int) -> int | None:
    """``max_sequence_length`` of a config.json if it decides between the two readings of a linear factor."""
    if rope_kind != "linear" or not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if written <= value <= _times(written, factor or 1.0) else None


def note_length(config: PositionFields, length: int) -> None:
    """Log a note if a text that is only measured has more tokens than the model has positions."""
    has = positions_of(config)
    if length > has.most:
        note(f"{length} tokens are more than the model's {describe(config)}: it has not learned those beyond")
    elif length > has.certain:
        note(f"{length} tokens are more than {has.certain}, but within the model's {describe(config)}")


def check_length(config: PositionFields, length: int, what: str, otherwise: str) -> None:
    """Raise ValueError for a length beyond all readings; log a note where only the larger one allows it.

    - what: the length and what it is of, to begin the message with.
    - otherwise: what to do about a length that is too large.
    """
    has = positions_of(config)
    if length > has.most:
        raise ValueError(f"{what}: more than the model's {describe(config)}; {otherwise}")
    if length > has.certain:
        note(f"{what}: more than {has.certain}, but within the model's {describe(config)}")


def describe(config: PositionFields) -> str:
    """The largest number of positions, and the fields that it comes from.

    >>> from jsparse.models import LlamaConfig
    >>> describe(LlamaConfig.tiny())
    'max_position_embeddings=64'
    >>> describe(LlamaConfig.tiny(rope=RopeConfig(kind="linear", factor=8.0)))
    '512 positions (max_position_embeddings=64 x linear factor 8)'
    """
    rope, has = config.rope, positions_of(config)
    written = f"max_position_embeddings={config.max_position_embeddings}"
    if rope.kind == "yarn":
        return (
            f"{has.most} positions (YaRN: {rope.original_max_position_embeddings} x factor {rope.factor:g})"
        )
    if config.max_sequence_length is not None and has.most != config.max_position_embeddings:
        return f"max_sequence_length={config.max_sequence_length}"
    if has.most > has.certain:
        return f"{has.most} positions ({written} x linear factor {rope.factor:g})"
    return written


@functools.cache
def note(text: str) -> None:
    """Log a note about a model, once in a process; on stderr unless logging is configured otherwise."""
    logging.getLogger("jsparse").warning("note: %s", text)


def _times(positions: int, factor: float) -> int:
    return int(positions * factor + 1e-6)
