"""A kernel in 4 or 8 bits: codes and scales, and the product with what they stand for.

qwix (the extra ``qlora``) encodes. Decoding is here and does not need it: qwix flattens a kernel to look its
codes up, which on a mesh gathers a kernel that is split along both axes. Here the codes stay where they lie.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, UInt4

from jsparse.extras import require_extra

Codes = Int8[Array, "in out"] | UInt4[Array, "in out"]
Scales = Float32[Array, "tiles out"]

BITS = (4, 8)
TILE = 64  # inputs that share a scale in 4 bits, the block size of QLoRA

# NormalFloat's values (arXiv 2305.14314, appendix E): quantiles of a normal, with an exact zero.
_NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def encode_kernel(kernel: Float[Array, "in out"], bits: int) -> tuple[Codes, Scales]:
    """The codes of a kernel and their scales, float32.

    8 bits: int8, one scale for each output. 4 bits: NormalFloat (arXiv 2305.14314, §3), one scale for 64
    inputs of an output, so 4.5 bits per weight; the paper's quantised scales are not used. By its scale, the
    largest value gets the largest code.

    Raises MissingExtra without qwix, ValueError for other bits and, in 4 bits, for a number of inputs that is
    not a multiple of 64.

    >>> codes, scales = encode_kernel(jnp.ones((64, 2)), 4)
    >>> codes.dtype.name, scales.shape
    ('uint4', (1, 2))
    """
    check_bits(bits)
    require_qwix()
    import qwix

    if bits == 8:
        coded = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=[1])
    else:
        if kernel.shape[0] % TILE:
            raise ValueError(f"4 bits need a multiple of {TILE} inputs, not {kernel.shape[0]}")
        coded = qwix.quantize(kernel.astype(jnp.float32), "nf4", channelwise_axes=[1], tiled_axes={0: TILE})
    return coded.qvalue, coded.scale


def decode_kernel(codes: Codes, scales: Scales, dtype) -> Float[Array, "in out"]:
    """The kernel that the codes stand for: value times scale in float32, then in ``dtype``.

    >>> decode_kernel(*encode_kernel(jnp.array([[1.0], [-0.5]]), 8), jnp.float32).round(2).tolist()
    [[1.0], [-0.5]]
    """
    values = jnp.asarray(_NF4)[codes] if codes.dtype == jnp.uint4 else codes.astype(jnp.float32)
    tiled = values.reshape(scales.shape[0], -1, codes.shape[1]) * scales[:, None]
    return tiled.reshape(codes.shape).astype(dtype)


@jax.checkpoint
def coded_matmul(x: Float[Array, "... in"], codes: Codes, scales: Scales) -> Float[Array, "... out"]:
    """``x @ decode_kernel(codes, scales, x.dtype)``, which keeps no decoded kernel for the backward pass.

    That would cost the memory that the codes save; the backward pass decodes again.

    >>> codes, scales = encode_kernel(jnp.eye(2), 8)
    >>> coded_matmul(jnp.array([[3.0, 4.0]]), codes, scales).round(1).tolist()
    [[3.0, 4.0]]
    """
    return x @ decode_kernel(codes, scales, x.dtype)


def check_bits(bits: int) -> None:
    """Raise ValueError unless a kernel can have this many bits."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, not {bits!r}")


def require_qwix() -> None:
    """MissingExtra unless kernels can be encoded."""
    require_extra("qwix", "qlora", "a base in 4 or 8 bits needs qwix, which is not installed")
