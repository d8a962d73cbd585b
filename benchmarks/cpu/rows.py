"""What the CPU benchmark measures: its rows, who runs in them, which times are divided, and the goals.

Plain data: the worker of either side reads it, whatever else its environment lacks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

OURS = "jsparse"
FLOOR = "floor of visited blocks"
FLEX, SDPA, ONNX = "torch Flex", "torch SDPA, dense", "onnxruntime GQA, dense"
TORCH_MODEL, TORCH_STEP = "transformers", "transformers + peft"
KINDS = ("dense", "streaming", "top-k")  # of the row growth
# Of generate: half of the KV heads stream unless dense; the last also reads only blocks of the prompt.
POLICIES = ("dense", "sparse", "sparse prompt")
NOBODY = "none"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of all rows. ``lengths`` are those of each row, ``dense_up_to`` the longest one for dense
    peers and for dense attention of our own.
    """

    lengths: dict[str, tuple[int, ...]]
    dense_up_to: int = 65536
    # Attention to whole sequences: as many KV heads as query heads.
    heads: int = 4
    dim: int = 64
    sink: int = 64
    window: int = 256
    listed: int = 16  # key blocks in a list of top-k
    # One query to a cache.
    q_heads: int = 32
    kv_heads: int = 8
    cache_dim: int = 128
    page: int = 64
    logical_page: int = 16
    pages: int = 64
    # The Llama.
    vocabulary: int = 8192
    hidden: int = 512
    layers: int = 8
    model_heads: int = 8
    model_kv_heads: int = 2
    ffn: int = 1536
    new_tokens: int = 33
    budget: int = 2048
    prompt_budget: int = 4096  # tokens that a block of queries of a sparse prompt reads
    matmul: int = 2048


BLOCK = 128
USES_OF_A_CHOICE = 4  # tokens that one choice of pages serves (LServe)
_WHOLE = (4096, 8192, 16384, 32768, 65536)
DEFAULT = Sizes(
    lengths={
        "prefill-streaming": _WHOLE,
        "prefill-half": _WHOLE,
        "forward-backward": (4096, 8192),
        "decode-pages": (32768, 131072),
        "selection": (32768, 131072),
        "mask-building": (8192, 32768),
        "growth": _WHOLE,
        "generate": (2048, 8192, 32768),
        "finetune-step": (2048, 4096, 8192),
    }
)
SMALL = Sizes(
    lengths={
        "prefill-streaming": (512, 1024),
        "prefill-half": (512,),
        "forward-backward": (512,),
        "decode-pages": (1024,),
        "selection": (1024,),
        "mask-building": (1024,),
        "growth": (1024, 2048),
        "generate": (256, 512),
        "finetune-step": (256,),
    },
    heads=2,
    dim=32,
    q_heads=4,
    kv_heads=2,
    cache_dim=32,
    page=16,
    logical_page=4,
    pages=8,
    vocabulary=128,
    hidden=64,
    layers=2,
    model_heads=4,
    ffn=128,
    new_tokens=5,
    budget=128,
    prompt_budget=256,
    matmul=256,
)
ROWS = tuple(DEFAULT.lengths)
ABOUT = {
    "prefill-streaming": "attention, sink 64 and window 256, all 4 heads of 64",
    "prefill-half": "the same, half of the heads causal",
    "forward-backward": "attention and its gradient, sink 64 and window 256",
    "decode-pages": "one query of 32 heads of 128 to 64 listed pages of 64, 8 KV heads",
    "selection": "choosing 64 pages by bounds of 16 keys",
    "selection, a token": "the same, the part of a choice that falls to a token",
    "mask-building": "block lists of sink 64 and window 256",
    "generate-prefill": "Llama of 32.5M: seconds to the first token",
    "generate-token": "Llama of 32.5M: seconds a token after it",
    "finetune-step": "Llama of 32.5M: a step with LoRA, embeddings and norms",
    "growth": "our attention alone, by kind of block lists",
    "matmul": "a matrix product, for the floor",
}


@dataclasses.dataclass(frozen=True)
class Who:
    """A contender.

    - side: whose worker makes it.
    - compared: whether its outputs are compared with those of our first contender that is compared.
    - timed: False if it takes part in the comparison alone.
    """

    name: str
    side: Literal["ours", "peers"]
    compared: bool = True
    timed: bool = True


@dataclasses.dataclass(frozen=True)
class Pair:
    """A ratio to report: ``share`` times our time / the peer's time, both named ``metric``."""

    row: str
    ours: str
    peer: str
    metric: str = "call"
    share: float = 1.0
    goal: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One row at one length and dtype: who runs, in turns, and what is reported of them."""

    row: str
    length: int
    dtype: str
    contenders: tuple[Who, ...]
    pairs: tuple[Pair, ...]
    note: str = ""

    def spec(self, name: str, *, small: bool, folder: str) -> dict[str, Any]:
        """What a worker needs to know to make a contender."""
        return {
            "row": self.row,
            "length": self.length,
            "dtype": self.dtype,
            "name": name,
            "small": small,
            "folder": folder,
        }


def sizes(small: bool) -> Sizes:
    return SMALL if small else DEFAULT


def chosen_cases(
    rows: Sequence[str] | None = None, lengths: Sequence[int] | None = None, *, small: bool = False
) -> list[Case]:
    """The cases of the rows at the lengths, all by default, in the order in which they run: the matrix
    products first if a floor is wanted.

    Raises ValueError for a row or a length that does not exist.
    """
    of = sizes(small)
    for row in rows or ():
        if row not in ROWS:
            raise ValueError(f"--rows has {row!r}; allowed are {', '.join(ROWS)}")
    picked = [row for row in ROWS if rows is None or row in rows]
    known = sorted({length for row in picked for length in of.lengths[row]})
    for length in lengths or ():
        if length not in known:
            raise ValueError(f"--lengths has {length}; allowed for these rows are {known}")
    cases = []
    for row in picked:
        for length in of.lengths[row]:
            if lengths is None or length in lengths:
                cases += _cases(row, length, of)
    floors = {case.dtype for case in cases if any(pair.peer == FLOOR for pair in case.pairs)}
    return [_matmul(dtype, of) for dtype in ("float32", "bfloat16") if dtype in floors] + cases


def _cases(row: str, length: int, of: Sizes) -> list[Case]:
    match row:
        case "prefill-streaming" | "prefill-half":
            return [_prefill(row, length, dtype, of) for dtype in ("float32", "bfloat16")]
        case "decode-pages":
            return [_decode(length, dtype) for dtype in ("float32", "bfloat16")]
        case "generate":
            return [_generate(length)]
        case "forward-backward":
            peers = (
                Who("torch SDPA, mask", "peers"),
                Who(SDPA, "peers", compared=False),
            )
            goals = {SDPA: 0.3 if length == 8192 else None}
            note = "FlexAttention has no backward pass on a CPU"
            return [_against(row, length, "float32", (Who(OURS, "ours"),), peers, goals, note)]
        case "mask-building":
            peers = (Who("create_block_mask", "peers"),)
            goals = {"create_block_mask": 0.01}
            return [_against(row, length, "none", (Who(OURS, "ours"),), peers, goals)]
        case "finetune-step":
            ours = (Who("jsparse, full", "ours"), Who("jsparse, shifted", "ours", compared=False))
            return [_against(row, length, "float32", ours, (Who(TORCH_STEP, "peers"),), {})]
        case "selection":
            read = "the attention it serves"
            pairs = (
                Pair("selection", OURS, read, goal=0.25),
                Pair("selection, a token", OURS, read, share=1 / USES_OF_A_CHOICE, goal=0.25),
            )
            both = (Who(OURS, "ours", compared=False), Who(read, "ours", compared=False))
            return [Case(row, length, "float32", both, pairs)]
        case "growth":
            kinds = [kind for kind in KINDS if kind != "dense" or length <= of.dense_up_to // 2]
            contenders = tuple(Who(kind, "ours", compared=False) for kind in kinds)
            return [Case(row, length, "float32", contenders, tuple(Pair(row, k, NOBODY) for k in kinds))]
    raise ValueError(f"row={row!r} is none of {ROWS}")


def _against(row, length, dtype, ours, peers, goals, note="") -> Case:
    """Each of ours against each of the peers."""
    pairs = tuple(Pair(row, a.name, b.name, goal=goals.get(b.name)) for a in ours for b in peers)
    return Case(row, length, dtype, (*ours, *peers), pairs, note)


def _prefill(row: str, length: int, dtype: str, of: Sizes) -> Case:
    """Dense peers do not depend on the row: if they are slow, only the first row has them."""
    goals: dict[str, float] = {}
    if row == "prefill-streaming":
        goals = {FLOOR: 2.5} | ({FLEX: 0.8} if length in (8192, 16384, 32768) else {})
    peers = [Who(FLEX, "peers")]
    if row == "prefill-streaming" or length <= of.dense_up_to // 4:
        peers.append(Who(SDPA, "peers", compared=False))
        if dtype == "float32":
            peers.append(Who(ONNX, "peers", compared=False))
    case = _against(row, length, dtype, (Who(OURS, "ours"),), tuple(peers), goals)
    floor = Pair(row, OURS, FLOOR, goal=goals.get(FLOOR))
    return dataclasses.replace(case, pairs=(*case.pairs, floor))


def _decode(length: int, dtype: str) -> Case:
    peers = (
        Who(FLEX, "peers"),
        Who("torch gather + SDPA", "peers"),
        Who(SDPA, "peers", compared=False),
    )
    return _against("decode-pages", length, dtype, (Who(OURS, "ours"),), peers, {FLEX: 0.5})


def _generate(length: int) -> Case:
    dense, sparse, estimated = (f"jsparse, {policy}" for policy in POLICIES)
    goals = {
        ("token", dense, 32768): 0.5,
        ("token", sparse, 32768): 0.12,
        ("token", dense, 2048): 0.6,
        ("token", sparse, 2048): 0.6,
        ("prefill", dense, 32768): 0.6,
        ("prefill", sparse, 32768): 0.6,
        ("prefill", estimated, 32768): 0.6,
    }
    ours = (
        Who(dense, "ours"),
        Who(sparse, "ours", compared=False),
        Who(estimated, "ours", compared=False),
    )
    pairs = tuple(
        Pair(f"generate-{metric}", name, TORCH_MODEL, metric, goal=goals.get((metric, name, length)))
        for metric, names in (("prefill", (dense, sparse, estimated)), ("token", (dense, sparse)))
        for name in names
    )
    return Case("generate", length, "float32", (*ours, Who(TORCH_MODEL, "peers")), pairs)


def _matmul(dtype: str, of: Sizes) -> Case:
    both = (Who("jax", "ours", compared=False), Who("torch", "peers", compared=False))
    return Case("matmul", of.matmul, dtype, both, (Pair("matmul", "jax", "torch"),))
