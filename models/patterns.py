"""Attention patterns: what each layer and query head sees, as data that is saved beside the model."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from jsparse import BlockMask, TokenMask, causal, shifted_groups, streaming
from jsparse.hub import model_folder
from jsparse.models import LlamaConfig
from jsparse.models.choices import KINDS as KINDS
from jsparse.models.longlora import shifted_head_masks
from jsparse.models.masking import LayerMask

PATTERN_FILE = "attention_pattern.json"
_VERSION = 1  # of the file


@dataclasses.dataclass(frozen=True)
class StridedBlocks:
    """LongGen's block-sparse attention (arXiv 2410.01485, figure 1): a window of blocks, and strided blocks.

    With tokens cut into blocks of ``block``, query ``i`` sees key ``j`` where both of these hold::

        j <= i
        i // block - j // block < window  or  (j // block) % stride == 0

    so ``window`` counts blocks, the query's own included, and the first block is always seen. Blocks are
    counted from the start: those that outlive the window are the same for every later query, so a cache can
    drop the others. On a GPU the kernels take blocks of a multiple of 64 tokens.
    """

    block: int
    window: int
    stride: int

    def __post_init__(self):
        for field in ("block", "window", "stride"):
            _require_positive(field, getattr(self, field))


HeadRule = TokenMask | StridedBlocks


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """What each query head of each layer sees; ``layers[i][h]`` is the rule of head h in layer i.

    ``kind`` names how the pattern was made, one of "full", "shifted", "grouped", "longgen" and "streaming";
    the functions below make them. The rules alone say what is seen, at any length: ``masks`` gives what a
    model takes as ``mask``. All rules are causal.

    Raises ValueError for an unknown kind, for layers of different numbers of heads, and for a layer in which
    only some heads have ``StridedBlocks`` or where they differ.

    >>> config = LlamaConfig.tiny(num_hidden_layers=3)
    >>> pattern = longgen_pattern(config, streaming(sink=2, window=6))
    >>> [layer[0] == causal() for layer in pattern.layers]
    [False, True, False]
    >>> AttentionPattern.from_json(pattern.to_json()) == pattern
    True
    """

    kind: str
    layers: tuple[tuple[HeadRule, ...], ...]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {self.kind!r}")
        if not self.layers or not self.layers[0]:
            raise ValueError("layers must have at least one layer of at least one head")
        for number, layer in enumerate(self.layers):
            if len(layer) != len(self.layers[0]):
                raise ValueError(
                    f"layers[{number}] has {len(layer)} heads, but layers[0] has {len(self.layers[0])}"
                )
            if any(isinstance(rule, StridedBlocks) for rule in layer) and len(set(layer)) > 1:
                raise ValueError(
                    f"layers[{number}]: where one head has StridedBlocks, all must have the same, for the "
                    "heads of a layer share the lists of blocks"
                )

    def masks(self, config: LlamaConfig, length: int) -> tuple[LayerMask, ...]:
        """The mask of each layer for sequences of ``length`` tokens: what a model takes as ``mask``.

        A layer's entry is a tuple of TokenMasks, one per query head, or a BlockMask. That is the same object
        for the same rule and length, so nothing compiles twice. A model adds its own sliding windows.

        Groups keep their size at every length. Raises ValueError where it does not divide the length, and
        for a model of other layers or heads.
        """
        _require_positive("length", length)
        self._check_model(config)
        self._check_groups(length)
        return tuple(_mask_of_rules(layer, length) for layer in self.layers)

    def _check_model(self, config: LlamaConfig) -> None:
        own = len(self.layers), len(self.layers[0])
        given = config.num_hidden_layers, config.num_attention_heads
        if own != given:
            raise ValueError(
                f"the pattern is for {own[0]} layers of {own[1]} query heads, but the model has {given[0]} "
                f"of {given[1]}"
            )

    def _check_groups(self, length: int) -> None:
        rules = {rule for layer in self.layers for rule in layer}
        for rule in rules:
            size = rule.group_size if isinstance(rule, TokenMask) else None
            if size is not None and length % size:
                raise ValueError(
                    f"length={length} is not a multiple of the {self.kind} pattern's group_size={size}; "
                    f"choose one that is, such as {-(-length // size) * size}"
                )

    def to_json(self) -> str:
        """The pattern as JSON text: the different rules, and for each layer and head the number of its rule.

        >>> print(AttentionPattern("shifted", (shifted_head_masks(2, 4),) * 2).to_json())
        {
         "version": 1,
         "kind": "shifted",
         "rules": [
          {"rule": "token_mask", "sink": 0, "window": null, "group_size": 4, "group_shift": 0},
          {"rule": "token_mask", "sink": 0, "window": null, "group_size": 4, "group_shift": 2}
         ],
         "layers": [
          [0, 1],
          [0, 1]
         ]
        }
        """
        rules = list(dict.fromkeys(rule for layer in self.layers for rule in layer))
        numbers = {rule: number for number, rule in enumerate(rules)}
        written = [{"rule": _NAMES[type(rule)]} | dataclasses.asdict(rule) for rule in rules]
        layers = [[numbers[rule] for rule in layer] for layer in self.layers]
        fields = f' "version": {_VERSION},\n "kind": {json.dumps(self.kind)}'
        return f'{{\n{fields},\n "rules": {_one_a_line(written)},\n "layers": {_one_a_line(layers)}\n}}'

    @classmethod
    def from_json(cls, text: str) -> "AttentionPattern":
        """What ``to_json`` wrote. Raises ValueError, saying what is wrong, for anything else."""
        try:
            stored = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"an attention pattern must be JSON: {error}") from error
        if not isinstance(stored, dict) or stored.get("version") != _VERSION:
            version = stored.get("version") if isinstance(stored, dict) else None
            raise ValueError(f"an attention pattern must have version {_VERSION}, not {version!r}")
        if stored.keys() != {"version", "kind", "rules", "layers"}:
            raise ValueError(
                f"an attention pattern has version, kind, rules and layers, not {', '.join(stored)}"
            )
        rules = [_read_rule(fields, number) for number, fields in enumerate(_list(stored, "rules"))]
        layers = [_read_layer(layer, number, rules) for number, layer in enumerate(_list(stored, "layers"))]
        return cls(stored["kind"], tuple(layers))


def save_pattern(pattern: AttentionPattern, folder: str | Path) -> None:
    """Write ``attention_pattern.json`` into a folder, beside the model that was trained with it."""
    (Path(folder) / PATTERN_FILE).write_text(pattern.to_json() + "\n", encoding="utf-8")


def load_pattern(folder: str | Path) -> AttentionPattern:
    """The pattern in a model's folder or id. FileNotFoundError where there is none, ValueError if it cannot
    be read.
    """
    path = model_folder(folder) / PATTERN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the model was not trained with an attention pattern that was saved"
        )
    try:
        return AttentionPattern.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: {error}") from error


# --- the kinds ---


def full_pattern(config: LlamaConfig) -> AttentionPattern:
    """Causal attention in every head."""
    return _same_in_every_layer("full", config, (causal(),) * config.num_attention_heads)


def shifted_pattern(config: LlamaConfig, group_size: int) -> AttentionPattern:
    """LongLoRA's S²-Attn in every layer (arXiv 2309.12307, §3.2; see ``shifted_head_masks``)."""
    return _same_in_every_layer("shifted", config, shifted_head_masks(config.num_attention_heads, group_size))


def grouped_pattern(config: LlamaConfig, group_size: int) -> AttentionPattern:
    """Groups of ``group_size`` tokens without the shift: LongLoRA's "short attention" (table 2), a control.

    No information crosses from one group to another. ``group_size`` is even, as for the shifted pattern that
    it is compared with.
    """
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even, as for the shifted pattern, not {group_size}")
    heads = (shifted_groups(group_size, 0),) * config.num_attention_heads
    return _same_in_every_layer("grouped", config, heads)


def longgen_pattern(
    config: LlamaConfig, sparse: HeadRule, full_layers: Sequence[int] | None = None
) -> AttentionPattern:
    """LongGen's hybrid (arXiv 2410.01485, figure 1): full attention in some layers, sparse in the others.

    - sparse: what every head of the other layers sees: ``streaming(sink, window)`` (the paper's attention
      sink) or ``StridedBlocks`` (its block-sparse attention).
    - full_layers: the numbers of the layers with full attention; None: the middle third, as in the paper.

    >>> config = LlamaConfig.tiny(num_hidden_layers=6)
    >>> pattern = longgen_pattern(config, StridedBlocks(block=64, window=2, stride=8))
    >>> [number for number, layer in enumerate(pattern.layers) if layer[0] == causal()]
    [2, 3]
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    chosen = middle_third(layers) if full_layers is None else tuple(full_layers)
    if len(set(chosen)) < len(chosen) or not all(layer in range(layers) for layer in chosen):
        raise ValueError(f"full_layers must be different layers, 0 to {layers - 1}, not {list(chosen)}")
    return AttentionPattern(
        "longgen",
        tuple(((causal() if layer in chosen else sparse),) * heads for layer in range(layers)),
    )


def middle_third(num_layers: int) -> tuple[int, ...]:
    """The numbers of the middle third of the layers, at least one: LongGen's full layers.

    >>> middle_third(32)
    (10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
    """
    count = max(1, round(num_layers / 3))
    first = (num_layers - count) // 2
    return tuple(range(first, first + count))


def streaming_pattern(
    config: LlamaConfig, streaming_heads: Bool[np.ndarray, "layers kv_heads"], *, sink: int, window: int
) -> AttentionPattern:
    """DuoAttention (arXiv 2410.10819): sink and window where ``streaming_heads`` is True, else causal.

    - streaming_heads: one truth value for each layer and KV head, as from ``HeadPattern.threshold``; the
      query heads follow their KV head.

    >>> config = LlamaConfig.tiny(num_hidden_layers=1)
    >>> pattern = streaming_pattern(config, np.array([[False, True]]), sink=4, window=8)
    >>> [mask.window for mask in pattern.layers[0]]
    [None, None, 8, 8]
    """
    table = np.asarray(streaming_heads)
    shape = config.num_hidden_layers, config.num_key_value_heads
    if table.dtype != bool or table.shape != shape:
        raise ValueError(
            f"streaming_heads must be truth values [layers, kv_heads] = {list(shape)} for this model, not "
            f"{table.dtype} {list(table.shape)}"
        )
    streams = streaming(sink, window)
    by_query_head = np.repeat(table, config.num_attention_heads // shape[1], axis=1)
    return AttentionPattern(
        "streaming", tuple(tuple(streams if one else causal() for one in layer) for layer in by_query_head)
    )


def _same_in_every_layer(kind: str, config: LlamaConfig, heads: tuple[HeadRule, ...]) -> AttentionPattern:
    return AttentionPattern(kind, (heads,) * config.num_hidden_layers)


# --- rules to masks ---


def _mask_of_rules(layer: tuple[HeadRule, ...], length: int) -> LayerMask:
    if isinstance(layer[0], StridedBlocks):
        return strided_block_mask(layer[0], length)
    return tuple(rule for rule in layer if isinstance(rule, TokenMask))  # all are, as __post_init__ checked


@functools.lru_cache(maxsize=16)  # the same object for the same rule, so nothing compiles twice
def strided_block_mask(rule: StridedBlocks, length: int) -> BlockMask:
    """The lists of blocks of ``rule`` for ``length`` tokens, the same for all heads.

    Like the lists of token masks they are NumPy arrays, compiled in. All blocks except the query's own are
    wholly visible.

    >>> mask = strided_block_mask(StridedBlocks(block=4, window=1, stride=2), 16)
    >>> [mask.kv_index[start : start + n].tolist() for start, n in zip(mask.kv_start[0], mask.kv_count[0])]
    [[0], [0, 1], [0, 2], [0, 2, 3]]
    """
    query = np.arange(-(-length // rule.block))[:, None]
    window_start = np.maximum(query - rule.window + 1, 0)
    strided = -(-window_start // rule.stride)  # how many multiples of the stride lie before the window
    count = strided + query + 1 - window_start
    place = np.arange(count.max())
    index = np.where(place < strided, place * rule.stride, window_start + place - strided)
    with jax.ensure_compile_time_eval():  # NumPy arrays within a trace too
        mask = BlockMask.from_indices(
            index[None],
            count.T,
            kv_full_count=count.T - 1,  # the last of each list is the query's own
            q_len=length,
            kv_len=length,
            block_q=rule.block,
            block_kv=rule.block,
        )
        return jax.tree.map(np.asarray, mask)


# --- reading ---

_RULES: dict[str, type] = {"token_mask": TokenMask, "strided_blocks": StridedBlocks}
_NAMES = {rule: name for name, rule in _RULES.items()}


def _one_a_line(items: list) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n ]"


def _list(stored: dict[str, Any], field: str) -> list:
    if not isinstance(stored[field], list):
        raise ValueError(f"{field} must be a list, not {stored[field]!r}")
    return stored[field]


def _read_rule(fields: Any, number: int) -> HeadRule:
    name = fields.get("rule") if isinstance(fields, dict) else None
    if name not in _RULES:
        raise ValueError(f"rules[{number}] must have a rule of {', '.join(_RULES)}, not {fields!r}")
    rule = _RULES[name]
    expected = {field.name for field in dataclasses.fields(rule)}
    if fields.keys() != expected | {"rule"}:
        raise ValueError(f"rules[{number}] must have {', '.join(sorted(expected))}, not {fields!r}")
    return rule(**{field: fields[field] for field in expected})


def _read_layer(layer: Any, number: int, rules: list[HeadRule]) -> tuple[HeadRule, ...]:
    if not isinstance(layer, list) or not all(type(one) is int and one in range(len(rules)) for one in layer):
        raise ValueError(
            f"layers[{number}] must be a list of numbers of rules, 0 to {len(rules) - 1}, not {layer!r}"
        )
    return tuple(rules[one] for one in layer)


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
