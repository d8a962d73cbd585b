"""The peers' side of the CPU benchmark: a worker that runs torch and onnxruntime on the same inputs.

It imports neither jax nor jsparse, which its environment may lack.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cpu import inputs
from cpu.rows import BLOCK, FLEX, ONNX, SDPA, Sizes, sizes
from cpu.workers import Ready, load, repeated, serve

PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "numpy")
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def make(spec: Mapping[str, Any]) -> Ready:
    of, length, name = sizes(spec["small"]), spec["length"], spec["name"]
    if name == ONNX:
        return onnx_attention(length, of)
    torch = load("torch")

    torch.set_num_threads(THREADS)
    torch._dynamo.reset()  # it limits how many versions of one function it compiles
    dtype = getattr(torch, spec["dtype"], None)
    match spec["row"]:
        case "prefill-streaming" | "prefill-half":
            attend = flex(spec["row"], length, of) if name == FLEX else sdpa_causal
            return prefill(attend, length, dtype, of)
        case "forward-backward":
            attend = sdpa_causal if name == SDPA else sdpa_masked(length, of)
            return forward_backward(attend, length, dtype, of)
        case "decode-pages":
            return decode(name, length, dtype, of)
        case "mask-building":
            return build_mask(length, of)
        case "matmul":
            return matmul(length, dtype)
        case "generate" | "finetune-step":
            from cpu import peers_model

            return peers_model.make(spec)
    raise ValueError(f"row={spec['row']!r} has no peer")


def ready(call: Callable[[], tuple], names: tuple[str, ...] = ("out",)) -> Ready:
    """call() returns a tensor [B, H, T, D] for each name."""

    def outputs() -> dict[str, np.ndarray]:
        computed = (x.detach().float().transpose(1, 2).numpy() for x in call())
        return dict(zip(names, computed, strict=True))

    return Ready(repeated(call), outputs)


# Whole sequences ---------------------------------------------------------------------------------------


def tensors(length: int, dtype, of: Sizes) -> list:
    """q, k, v, d_out as [B, H, T, D], which torch prefers."""
    torch = load("torch")

    arrays = inputs.sequences(length, of)
    return [torch.tensor(x).transpose(1, 2).contiguous().to(dtype) for x in arrays]


def prefill(attend: Callable, length: int, dtype, of: Sizes) -> Ready:
    torch = load("torch")

    q, k, v, _ = tensors(length, dtype, of)

    @torch.no_grad()
    def call():
        return (attend(q, k, v),)

    return ready(call)


def forward_backward(attend: Callable, length: int, dtype, of: Sizes) -> Ready:
    torch = load("torch")

    *leaves, d_out = tensors(length, dtype, of)
    for leaf in leaves:
        leaf.requires_grad_()

    def call():
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, d_out)

    return ready(call, ("out", "dq", "dk", "dv"))


def sdpa_causal(q, k, v):
    torch = load("torch")

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_masked(length: int, of: Sizes) -> Callable:
    """Dense attention under the row's mask, written out: the same numbers, with nothing skipped."""
    torch = load("torch")

    q_index, kv_index = torch.arange(length)[:, None], torch.arange(length)
    mask = streaming_mod(of)(None, None, q_index, kv_index)
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def streaming_mod(of: Sizes) -> Callable:
    """Sink and window as FlexAttention wants them: a function of (batch, head, query, key)."""
    sink, window = of.sink, of.window
    return lambda b, h, q, k: (k <= q) & ((k < sink) | (k > q - window))


def half_mod(of: Sizes) -> Callable:
    torch = load("torch")

    sink, window, half = of.sink, of.window, of.heads // 2
    return lambda b, h, q, k: (k <= q) & ((k < sink) | (k > q - torch.where(h < half, 1 << 30, window)))


def flex(row: str, length: int, of: Sizes) -> Callable:
    """Compiled FlexAttention. Its lists are those of ``create_block_mask``, but made in closed form and not
    timed: at 65536 tokens that function would look at 4 billion elements.
    """
    torch, flex_attention = load("torch"), load("torch.nn.attention.flex_attention")

    streams = inputs.visible_blocks(length, of.sink, of.window)
    if row == "prefill-streaming":
        heads, mod = [streams], streaming_mod(of)
    else:
        causal, half = inputs.visible_blocks(length, 0, None), of.heads // 2
        heads, mod = [causal] * half + [streams] * (of.heads - half), half_mod(of)
    partial = np.stack([some & ~whole for some, whole in heads])
    whole = np.stack([whole for _, whole in heads])
    mask = flex_attention.BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(length, length)
    )
    attend = torch.compile(flex_attention.flex_attention, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def ordered(listed: np.ndarray) -> tuple:
    """bool [H, nq, nk] as counts [1, H, nq] and block numbers [1, H, nq, nk], those listed first."""
    torch = load("torch")

    order = np.argsort(~listed, axis=-1, kind="stable").astype(np.int32)
    return torch.tensor(listed.sum(-1, dtype=np.int32))[None], torch.tensor(order)[None]


def build_mask(length: int, of: Sizes) -> Ready:
    create_block_mask = load("torch.nn.attention.flex_attention").create_block_mask

    mod = streaming_mod(of)

    def call():
        return create_block_mask(mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)

    def outputs() -> dict[str, np.ndarray]:
        mask = call()
        shown = np.zeros((length // BLOCK, length // BLOCK), np.float32)
        for value, count, index in (
            (1, mask.kv_num_blocks, mask.kv_indices),
            (2, mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            for i in range(len(shown)):
                shown[i, index[0, 0, i, : count[0, 0, i]].numpy()] = value
        return {"lists": shown[None, :, None]}

    return Ready(repeated(call), outputs)


def matmul(side: int, dtype) -> Ready:
    torch = load("torch")

    a, b = (torch.tensor(inputs.normal(seed, side, side)).to(dtype) for seed in (1, 2))
    return Ready(repeated(lambda: a @ b), lambda: {})


def onnx_attention(length: int, of: Sizes) -> Ready:
    """onnxruntime's GroupQueryAttention, dense and causal, float32."""
    onnx, onnxruntime = load("onnx"), load("onnxruntime")
    TensorProto, helper = onnx.TensorProto, onnx.helper

    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"]
    width = of.heads * of.dim

    def info(name: str, kind: int, *shape: Any):
        return helper.make_tensor_value_info(name, kind, list(shape))

    kinds = [info(name, TensorProto.FLOAT, 1, "t", width) for name in names[:3]]
    kinds += [info(name, TensorProto.FLOAT, 1, of.heads, "p", of.dim) for name in names[3:5]]
    kinds += [info("seqlens_k", TensorProto.INT32, 1), info("total", TensorProto.INT32)]
    results = [info("out", TensorProto.FLOAT, 1, "t", width)]
    results += [info(name, TensorProto.FLOAT, 1, of.heads, "s", of.dim) for name in ("k", "v")]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        [each.name for each in results],
        domain="com.microsoft",
        num_heads=of.heads,
        kv_num_heads=of.heads,
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", kinds, results)
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    q, k, v, _ = (x.reshape(1, length, width) for x in inputs.sequences(length, of))
    nothing = np.zeros((1, of.heads, 0, of.dim), np.float32)
    last, total = np.array([length - 1], np.int32), np.array(length, np.int32)
    feed = dict(zip(names, (q, k, v, nothing, nothing, last, total), strict=True))

    def call() -> np.ndarray:
        return session.run(["out"], feed)[0]

    return Ready(repeated(call), lambda: {"out": np.asarray(call()).reshape(1, length, of.heads, of.dim)})


# One query to a cache ----------------------------------------------------------------------------------


def decode(name: str, length: int, dtype, of: Sizes) -> Ready:
    torch = load("torch")

    q = torch.tensor(inputs.token_of(of)).to(dtype)
    k, v = (torch.from_numpy(x).to(dtype) for x in inputs.cache(length, of))
    lists = inputs.page_lists(length, of)
    how = {FLEX: flex_decode, "torch gather + SDPA": gathered, SDPA: whole}[name]
    step, each = how(q, k, v, lists, of)
    turn = itertools.cycle(each)

    @torch.no_grad()
    def call():
        return step(next(turn))

    @torch.no_grad()
    def outputs() -> dict[str, np.ndarray]:
        outs = [step(item).float().reshape(1, of.q_heads, of.cache_dim).numpy() for item in each]
        return {"out": np.stack(outs, axis=1)}

    return Ready(repeated(call), outputs)


def seen(b, h, q, k):
    """Every key of a listed page: FlexAttention asks for a mask, though all listed blocks are whole."""
    return k >= 0


def flex_decode(q, k, v, lists: np.ndarray, of: Sizes) -> tuple[Callable, list]:
    torch, flex_attention = load("torch"), load("torch.nn.attention.flex_attention")

    total, group = k.shape[1] // of.page, of.q_heads // of.kv_heads

    def block_list(chosen: np.ndarray):
        listed = np.zeros((of.q_heads, 1, total), bool)
        listed[np.arange(of.q_heads)[:, None], 0, np.repeat(chosen, group, axis=0)] = True
        count, index = ordered(listed)
        return flex_attention.BlockMask.from_kv_blocks(
            torch.zeros_like(count),
            torch.zeros_like(index),
            count,
            index,
            BLOCK_SIZE=(BLOCK, of.page),
            mask_mod=seen,
            seq_lengths=(1, k.shape[1]),
        )

    attend = torch.compile(flex_attention.flex_attention, dynamic=False)
    q = q[:, :, None]
    return (lambda mask: attend(q, k[None], v[None], block_mask=mask, enable_gqa=True)), [
        block_list(chosen) for chosen in lists
    ]


def gathered(q, k, v, lists: np.ndarray, of: Sizes) -> tuple[Callable, list]:
    """The listed pages copied together, then dense attention to them."""
    torch = load("torch")

    k, v = (x.reshape(of.kv_heads, -1, of.page, of.cache_dim) for x in (k, v))
    head, q = torch.arange(of.kv_heads)[:, None], q[:, :, None]

    def step(pages):
        keys, values = (x[head, pages].reshape(1, of.kv_heads, -1, of.cache_dim) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return step, [torch.tensor(pages, dtype=torch.int64) for pages in lists]


def whole(q, k, v, lists: np.ndarray, of: Sizes) -> tuple[Callable, list]:
    """Attention to all keys."""
    torch = load("torch")

    q, k, v = q[:, :, None], k[None], v[None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return (lambda _: attend(q, k, v, enable_gqa=True)), [None]


if __name__ == "__main__":
    serve(make, PACKAGES)
