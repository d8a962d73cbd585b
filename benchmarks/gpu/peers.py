"""Who runs in the rows of whole sequences: jsparse, cuDNN through JAX, and torch's SDPA and FlexAttention.

All contenders of a row read the same device memory: JAX's arrays are lent to torch without a copy.
``prefill`` returns a maker for each contender; a maker may raise, and then its contender alone is out. torch
is imported inside makers; everything else works without it.
"""

import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Contender, Work

import jsparse
from gpu.rows import BLOCK, Prefill, block_mask, dense, head_masks, random_lists, work
from jsparse import TokenMask

Maker = Callable[[], Contender]
OURS = "jsparse"


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a run is made.

    - implementation: of jsparse.
    - gpu: False in a miniature run on the CPU, where torch runs uncompiled.
    """

    implementation: str
    gpu: bool

    @property
    def fused(self) -> str:
        """The name of :meth:`fused_attention`."""
        return "cuDNN" if self.gpu else "jax.nn"

    def fused_attention(self, q, k, v, *, is_causal: bool):
        """JAX's dense attention: cuDNN's on a GPU, XLA's elsewhere."""
        implementation = "cudnn" if self.gpu else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation)

    @property
    def last_resort(self) -> tuple[str, str]:
        """(name, implementation) of jsparse to compare with if no other library can do a row's work."""
        return ("jsparse in XLA", "xla") if self.gpu else ("jsparse, dense", "reference")


def prefill(row: Prefill, setup: Setup) -> dict[str, Maker]:
    shape = row.batch, row.length
    # Each set is far larger than L2, and two of them take turns.
    sets = [
        tuple(
            random_normal(10 * i + j, *shape, heads, row.dim)
            for j, heads in enumerate((row.q_heads, row.kv_heads, row.kv_heads, row.q_heads))
        )
        for i in range(2)
    ]
    fused = setup.fused

    def causal(q, k, v, _):
        return setup.fused_attention(q, k, v, is_causal=True)

    def in_jax(name: str, attend: Callable, extra: Any = (), of: Prefill = row) -> Maker:
        return lambda: jax_attention(name, attend, extra, sets, row, work(of), same_work=of is row)

    def in_torch(name: str, make: Callable[[], Callable]) -> Maker:
        return lambda: torch_attention(name, make(), sets, row)

    mask, plain = block_mask(row), row.masks == (jsparse.causal(),) and row.share is None

    def sparse(name: str, implementation: str) -> Maker:
        if row.share is not None:  # lists that a selector chose are data
            return in_jax(name, lambda q, k, v, mask: _sparse(q, k, v, mask, implementation), mask)
        return in_jax(name, lambda q, k, v, _: _sparse(q, k, v, mask, implementation))

    ours, last_resort = sparse(OURS, setup.implementation), setup.last_resort
    last = {last_resort[0]: sparse(*last_resort)}
    if group := row.masks[0].group_size:
        shift, name = row.masks[-1].group_shift, f"roll + {fused}"
        others = {
            name: in_jax(name, rolled(causal, group, shift, jnp.roll, jnp.concatenate)),
            "roll + torch SDPA": in_torch("roll + torch SDPA", lambda: rolled_sdpa(group, shift)),
        }
    elif plain:
        others = {fused: in_jax(fused, causal), "torch SDPA": in_torch("torch SDPA", lambda: sdpa_causal)}
    else:
        others = {f"{fused}, dense": in_jax(f"{fused}, dense", causal, of=dense(row))}
    flex = in_torch("torch Flex", lambda: flex_attention(row, setup))
    return {OURS: ours} | others | {"torch Flex": flex} | last


def _sparse(q, k, v, mask, implementation: str):
    return jsparse.attention(q, k, v, mask, implementation=implementation)


def rolled(attend: Callable, group: int, shift: int, roll: Callable, concatenate: Callable) -> Callable:
    """LongLoRA's S²-Attn on [B, T, H, D]: the second half of the heads rolled by ``shift``, groups made a
    batch.
    """

    def in_groups(x, head_half: int):
        heads = x.shape[2] // 2
        x = x[:, :, head_half * heads : (head_half + 1) * heads]
        x = roll(x, -shift * head_half, 1)
        return x.reshape(-1, group, *x.shape[2:])

    def run(q, k, v, extra=()):
        halves = []
        for half in range(2):
            out = attend(*(in_groups(x, half) for x in (q, k, v)), extra)
            halves.append(roll(out.reshape(q.shape[0], q.shape[1], *out.shape[2:]), shift * half, 1))
        return concatenate(halves, 2)

    return run


def jax_attention(
    name: str, attend: Callable, extra: Any, sets, row: Prefill, work: Work, *, same_work: bool
) -> Contender:
    """attend(q, k, v, extra) -> out, or its gradients alone: the forward pass is made beforehand."""
    if row.backward:

        def keep(q, k, v, extra):
            return jax.vjp(lambda q, k, v: attend(q, k, v, extra), q, k, v)[1]

        step, keep = jax.jit(lambda pullback, d_out: pullback(d_out)), jax.jit(keep)
        arguments, names = [(keep(*qkv, extra), d_out) for *qkv, d_out in sets], ("dq", "dk", "dv")
    else:
        step = jax.jit(lambda *arguments: (attend(*arguments),))
        arguments, names = [(*qkv, extra) for *qkv, _ in sets], ("out",)
    turn = itertools.cycle(arguments)
    return Contender(
        name=name,
        launch=lambda: step(*next(turn)),
        wait=jax.block_until_ready,
        outputs=lambda: _compared(dict(zip(names, step(*arguments[0]), strict=True)), row),
        work=work,
        same_work=same_work,
    )


def torch_attention(name: str, attend: Callable, sets, row: Prefill) -> Contender:
    """attend(q, k, v) of torch tensors [B, H, T, D], or its gradient alone."""
    torch, functorch = load("torch"), load("torch._functorch.config")

    functorch.donated_buffer = False  # or a compiled backward pass could run only once
    tensors = [[to_torch(x).transpose(1, 2) for x in each] for each in sets]

    def forward(q, k, v):
        with torch.no_grad():
            return (attend(q, k, v),)

    def backward(out, leaves, d_out):
        return torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    if row.backward:
        step, arguments, names = backward, [], ("dq", "dk", "dv")
        for *qkv, d_out in tensors:
            leaves = [x.detach().requires_grad_() for x in qkv]
            arguments.append((attend(*leaves), leaves, d_out))
    else:
        step, arguments, names = forward, [tuple(qkv) for *qkv, _ in tensors], ("out",)
    turn = itertools.cycle(arguments)

    def outputs():
        computed = (from_torch(x.transpose(1, 2)) for x in step(*arguments[0]))
        return _compared(dict(zip(names, computed, strict=True)), row)

    return Contender(
        name=name, launch=lambda: step(*next(turn)), wait=torch_wait, outputs=outputs, work=work(row)
    )


def _compared(arrays: dict[str, Any], row: Prefill) -> dict[str, Any]:
    return {name: x[:, row.compared_from :] for name, x in arrays.items()}


def sdpa_causal(q, k, v):
    torch = load("torch")

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def rolled_sdpa(group: int, shift: int) -> Callable:
    torch = load("torch")

    def attend(q, k, v, _):
        return sdpa_causal(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    run = rolled(attend, group, shift, torch.roll, torch.cat)
    return lambda q, k, v: run(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flex_attention(row: Prefill, setup: Setup) -> Callable:
    """FlexAttention with the row's mask: its block lists are made of the mask by create_block_mask, once."""
    torch, flex = load("torch"), load("torch.nn.attention.flex_attention")

    torch._dynamo.reset()  # it limits how many versions of one function it compiles
    same_for_all = row.share is None and len(set(row.masks)) == 1
    mask = flex.create_block_mask(
        flex_mask(row, "cuda" if setup.gpu else "cpu"),
        B=None,
        H=None if same_for_all else row.q_heads,
        Q_LEN=row.length,
        KV_LEN=row.length,
        device="cuda" if setup.gpu else "cpu",
        BLOCK_SIZE=BLOCK,
        _compile=setup.gpu,  # otherwise it holds a T x T array for every head
    )
    attend = torch.compile(flex.flex_attention, dynamic=False) if setup.gpu else flex.flex_attention
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)


def flex_mask(row: Prefill, device: str) -> Callable:
    """The row's mask as FlexAttention wants it: a function of (batch, head, query, key)."""
    torch = load("torch")

    if row.share is not None:
        index, count = random_lists(row)
        listed = np.zeros((*count.shape, row.length // BLOCK), bool)
        for head, i in np.ndindex(*count.shape):
            listed[head, i, index[head, i, : count[head, i]]] = True
        table, group = torch.tensor(listed, device=device), row.q_heads // row.kv_heads
        return lambda b, h, q, k: (k <= q) & table[h // group, q // BLOCK, k // BLOCK]

    shares = [flex_token_mask(mask) for mask in row.masks]
    if len(shares) == 1:
        return lambda b, h, q, k: shares[0](q, k)
    first, second = shares
    half = len(head_masks(row)) // 2
    return lambda b, h, q, k: torch.where(h < half, first(q, k), second(q, k))


def flex_token_mask(mask: TokenMask) -> Callable:
    """A TokenMask written out for torch's compiler, with numbers in place of what it does not need."""
    sink, window, size, shift = mask.sink, mask.window, mask.group_size, mask.group_shift

    def visible(q, k):
        seen = k <= q
        if window is not None:
            seen = seen & ((k < sink) | (k > q - window))
        if size is not None:
            seen = seen & ((q + shift) // size == (k + shift) // size)
        return seen

    return visible


def check_device() -> None:
    """Raises if the device no longer computes, as after an illegal access, which all later calls report."""
    jax.block_until_ready(jnp.zeros(8) + 1)
    if "torch" in sys.modules:
        torch_wait(None)


# Arrays ------------------------------------------------------------------------------------------------


def random_normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal, bfloat16; one leading index at a time: random bits then take little memory."""

    def fill(keys):
        return jax.lax.map(lambda key: jax.random.normal(key, shape[1:], jnp.bfloat16), keys)

    return jax.jit(fill)(jax.random.split(jax.random.key(seed), shape[0]))


def load(module: str) -> Any:
    """A module that may not be installed, and that the type checker does not know."""
    return importlib.import_module(module)


def to_torch(x: jax.Array):
    """The same memory as a torch tensor."""
    torch = load("torch")

    return torch.from_dlpack(jax.block_until_ready(x))


def from_torch(x) -> jax.Array:
    """The same memory as a JAX array, after a copy if it is not contiguous."""
    torch_wait(x)
    return jnp.from_dlpack(x.detach().contiguous())


def torch_wait(_) -> None:
    torch = load("torch")

    if torch.cuda.is_available():
        torch.cuda.synchronize()
