"""The rows of the GPU benchmark: what each computes, how much work that is, and what it is judged by.

Work is counted in whole blocks of 128 x 128 tokens, which is what a block-sparse kernel can visit: floors
follow from it and from what the device can do (measure.Ceilings).
"""

import dataclasses
from typing import TypeVar

import numpy as np
from measure import Work

from jsparse import BlockMask, TokenMask, causal, shifted_groups, streaming

BLOCK = 128  # of the masks, in queries and in keys
HALF = 2  # bytes of a bfloat16

EXPS = 16 * 132 * 1.85e9  # exponentials per second: 16 per clock on each multiprocessor


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Attention of a whole sequence to itself, bfloat16."""

    name: str
    about: str
    goal: str
    masks: tuple[TokenMask, ...] = (causal(),)  # equal shares of the query heads, in order
    share: float | None = None  # of the causal blocks: random lists, one per KV head
    backward: bool = False  # the gradients of q, k and v, without the forward pass
    compared_from: int = 0  # the first token whose outputs are compared
    length: int = 32768
    batch: int = 1
    q_heads: int = 64
    kv_heads: int = 8
    dim: int = 128
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Decode:
    """One query per sequence on ``selected`` of its ``length`` tokens, in pages that each KV head chose."""

    name: str
    about: str
    goal: str
    batch: int
    dtype: str = "bfloat16"  # of the pages: or int8, int4
    length: int = 131072
    selected: int = 4096
    page: int = 64
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128


@dataclasses.dataclass(frozen=True)
class Select:
    """The best ``selected / page`` pages of a sequence for each KV head, by the bounds of their keys."""

    name: str
    about: str
    goal: str
    batch: int
    dtype: str = "bfloat16"
    length: int = 131072
    selected: int = 4096
    page: int = 64
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128


Row = Prefill | Decode | Select
Attention = TypeVar("Attention", Prefill, Decode)

SINK_AND_WINDOW = streaming(sink=128, window=256)
GROUPS = (shifted_groups(8192, 0), shifted_groups(8192, 4096))

# The most telling rows come first, so a run that is cut short has them.
ROWS: tuple[Row, ...] = (
    Prefill("G1", "dense lists", "≤ 1.15 × cuDNN"),
    Prefill("G4", "random lists, 10% of causal", "≥ 500 TFLOP/s", share=0.1),
    Decode("G6", "decode, 4096 tokens in pages, batch 16", "≤ 83 µs (75% of copy bandwidth)", batch=16),
    Prefill("G3", "half of the heads stream", "≤ 0.53 × dense", masks=(causal(), SINK_AND_WINDOW)),
    Prefill("G5", "G4 backward", "≤ 0.14 × dense", share=0.1, backward=True),
    Prefill("G2", "sink 128, window 256, all heads", "< 1.5 ms", masks=(SINK_AND_WINDOW,)),
    Decode("G9-int8", "G6 with int8 pages", "≤ 1 / 1.7 of bfloat16 pages", batch=16, dtype="int8"),
    Decode("G9-int4", "G6 with int4 pages", "≤ 1 / 2.5 of bfloat16 pages", batch=16, dtype="int4"),
    Decode("G7", "decode, 4096 tokens in pages, batch 1", "≤ 15 µs", batch=1),
    Prefill("G1-backward", "dense lists, backward", "≤ 1.15 × cuDNN", backward=True),
    # When rolled, the last group of a shifted head begins with the last tokens and ends with the first ones,
    # which then see them; causal groups show no later token. So the first half group is not compared.
    Prefill(
        "G10",
        "shifted groups of 8192",
        "< 3.4 ms",
        masks=GROUPS,
        q_heads=32,
        compared_from=GROUPS[1].group_shift,
    ),
    Select("G8", "selection of 64 among 2048 pages, batch 16", "≤ 60 µs", batch=16),
)


def chosen_rows(names: list[str] | None, lengths: list[int] | None) -> list[Row]:
    """The rows of these names, at these lengths; None: all of them, each at its own. "G9" means G9-int8 and
    G9-int4.

    >>> [(row.name, row.length) for row in chosen_rows(["G1"], [8192])]
    [('G1', 8192), ('G1-backward', 8192)]
    """
    for name in names or []:
        if not any(name in (row.name, row.name.split("-")[0]) for row in ROWS):
            raise ValueError(f"--rows: {name!r} is none of {', '.join(row.name for row in ROWS)}")
    rows = [row for row in ROWS if names is None or {row.name, row.name.split("-")[0]} & set(names)]
    sized = [dataclasses.replace(row, length=length) for row in rows for length in lengths or [row.length]]
    for row in sized:
        _check_length(row)
    return sized


def _check_length(row: Row) -> None:
    unit, least = (BLOCK, BLOCK) if isinstance(row, Prefill) else (row.page, 2 * row.selected)
    if isinstance(row, Prefill) and row.masks[0].group_size:
        unit = least = row.masks[0].group_size
    if row.length < least or row.length % unit:
        raise ValueError(
            f"--lengths: {row.name} needs a multiple of {unit}, at least {least}, not {row.length}"
        )


def shrunk(row: Row) -> Row:
    """The row in miniature, for trying the benchmark itself out on a CPU: what it measures means nothing."""
    if isinstance(row, Prefill):
        masks = tuple(
            shifted_groups(256, mask.group_shift // 32) if mask.group_size else mask for mask in row.masks
        )
        small = {"masks": masks, "compared_from": row.compared_from // 32}
        return dataclasses.replace(row, length=512, q_heads=4, kv_heads=2, dim=64, **small)
    return dataclasses.replace(
        row, length=512, selected=128, batch=min(row.batch, 2), q_heads=4, kv_heads=2, dim=64
    )


# Masks -------------------------------------------------------------------------------------------------


def head_masks(row: Prefill) -> tuple[TokenMask, ...]:
    """The token mask of each query head."""
    return tuple(mask for mask in row.masks for _ in range(row.q_heads // len(row.masks)))


def random_lists(row: Prefill) -> tuple[np.ndarray, np.ndarray]:
    """(index [Hk, nq, M], count [Hk, nq]): of the n causal blocks of a query block, its own and others at
    random, ``share * n`` in all (one at least); ascending, -1 at the end.
    """
    if row.share is None:
        raise ValueError(f"{row.name} has no random lists")
    rng, blocks = np.random.default_rng(0), row.length // BLOCK
    counts = np.maximum(np.round(row.share * (np.arange(blocks) + 1)), 1).astype(np.int32)
    index = np.full((row.kv_heads, blocks, counts.max()), -1, np.int32)
    for head in range(row.kv_heads):
        for i, count in enumerate(counts):
            others = rng.choice(i, count - 1, replace=False) if count > 1 else []
            index[head, i, :count] = np.sort(np.append(others, i))
    return index, np.tile(counts, (row.kv_heads, 1))


def block_mask(row: Prefill) -> BlockMask:
    if row.share is None:
        return BlockMask.from_token_masks(
            head_masks(row), row.length, row.length, block_q=BLOCK, block_kv=BLOCK
        )
    index, count = random_lists(row)
    return BlockMask.from_indices(
        index, count, q_len=row.length, kv_len=row.length, block_q=BLOCK, block_kv=BLOCK
    )


def visited_blocks(row: Prefill) -> int:
    """Blocks that all query heads of one sequence visit."""
    mask = block_mask(row)
    a_row = np.asarray(mask.kv_count).sum(axis=-1)
    return int(sum(a_row[list(mask.row_of_head(row.q_heads))]))


def page_lists(row: Decode, most: int = 32) -> np.ndarray:
    """[lists, B, Hk, selected / page]: ascending lists that share no page. Cycling through them reads all of
    the cache and finds none of it in L2.
    """
    pages, a_list = row.length // row.page, row.selected // row.page
    order = np.random.default_rng(0).permuted(
        np.broadcast_to(np.arange(pages, dtype=np.int32), (row.batch, row.kv_heads, pages)), axis=-1
    )
    lists = min(pages // a_list, most)
    order = order[..., : lists * a_list].reshape(row.batch, row.kv_heads, lists, a_list)
    return np.ascontiguousarray(np.sort(order, axis=-1).transpose(2, 0, 1, 3))


# Work --------------------------------------------------------------------------------------------------


def work(row: Row) -> Work:
    """The least that the row takes.

    - forward: 4 D operations and an exponential per visited score; q, k, v are read and out is written once.
    - backward: 10 D operations for each (five products: one pass that adds into dq; two passes would take 14
      D).
    - decode: the selected keys and values; int8 and int4 pages with a scale and an offset for each token and
      KV head.
    - selection: both bounds of every page.
    """
    if isinstance(row, Prefill):
        scores = row.batch * visited_blocks(row) * BLOCK**2
        if row.backward:
            return Work(flops=10.0 * row.dim * scores)
        moved = 2 * HALF * row.batch * row.length * row.dim * (row.q_heads + row.kv_heads)
        return Work(flops=4.0 * row.dim * scores, bytes=float(moved), exps=float(scores))
    tokens = row.batch * row.kv_heads * (row.length // row.page if isinstance(row, Select) else row.selected)
    value = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5}[row.dtype]
    scale_and_offset = 0 if row.dtype == "bfloat16" else SCALE_BYTES
    return Work(bytes=2 * tokens * (row.dim * value + scale_and_offset))


SCALE_BYTES = 8  # a token's scale and offset in one KV head, float32


def dense(row: Attention) -> Attention:
    """The same without sparsity: every earlier token."""
    if isinstance(row, Prefill):
        return dataclasses.replace(row, masks=(causal(),), share=None)
    return dataclasses.replace(row, selected=row.length)
