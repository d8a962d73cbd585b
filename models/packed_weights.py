"""How quantized checkpoints store a matrix: the tensors of each format, and the weights that they stand for.

Weights are computed in float32 and rounded once, to the dtype that the model gets.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jsparse.models.safetensors_folder import StoredTensor, read_tensor

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, int]  # [out, in], as torch has it

FLOATS = ("F32", "F16", "BF16")
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is nibble i of a word
_MAX_STATE_BYTES = 1 << 16  # bitsandbytes writes some two hundred


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the tensors of a packed weight: the dtypes and shapes that it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in several tensors.

    - parts: by what follows the name of the module.
    - decode: from the arrays of those that are there to the weight in float32; ValueError for values that
      cannot be.
    """

    parts: Mapping[str, Part]
    decode: Callable[[Arrays], np.ndarray]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned codes in int32 words along the last axis, the lowest bits first.

    >>> unpack(np.array([[0x76543210]], np.int32), 4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    codes = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(codes, axis=-1).reshape(*words.shape[:-1], -1)


def awq(shape: Shape, group_size: int) -> PackedWeight:
    """AutoAWQ's "gemm" of 4 bits: (code - zero) * scale, packed along the outputs in an order of their own.

    Source: AWQ (Lin et al., 2024), arXiv:2306.00978; AutoAWQ's WQLinear_GEMM.
    """
    outputs, inputs = shape
    _require_multiple("out_features", outputs, 8)
    group, groups = _groups(inputs, group_size)

    def codes(words):
        in_order = unpack(words, 4).reshape(len(words), -1, 8)[..., np.argsort(_AWQ_OUTPUTS)]
        return in_order.reshape(len(words), outputs).T

    def decode(arrays):
        zeros = codes(arrays["qzeros"])
        of_input = np.arange(inputs) // group
        return _scaled(codes(arrays["qweight"]), arrays["scales"].T, zeros, of_input, np.arange(outputs))

    return PackedWeight(
        {
            "qweight": Part(("I32",), ((inputs, outputs // 8),)),
            "qzeros": Part(("I32",), ((groups, outputs // 8),)),
            "scales": Part(FLOATS, ((groups, outputs),)),
        },
        decode,
    )


def gptq(shape: Shape, bits: int, group_size: int, *, symmetric: bool, zeros_less_one: bool) -> PackedWeight:
    """GPTQ: (code - zero) * scale, with codes packed along the inputs and zeros along the outputs.

    Files of version 1 store each zero less one. Some say so and do not, or the reverse, so where zeros are
    symmetric their values decide: zero must be half of the codes.

    A bias that the model does not have may be there if it is 0: AutoGPTQ writes one.

    Source: GPTQ (Frantar et al., 2023), arXiv:2210.17323; AutoGPTQ's and GPTQModel's QuantLinear.
    """
    outputs, inputs = shape
    per_word = 32 // bits
    _require_multiple("in_features", inputs, per_word)
    _require_multiple("out_features", outputs, per_word)
    group, groups = _groups(inputs, group_size)

    def zeros(words):
        stored = unpack(words, bits)
        half = 2 ** (bits - 1)
        if symmetric:
            values = np.unique(stored).tolist()
            if values not in ([half - 1], [half]):
                raise ValueError(
                    f"quantization_config says sym, but zeros in qzeros are {values[:5]}; all must be "
                    f"{half - 1} (version 1) or {half} (version 2)"
                )
            return np.full_like(stored, half)
        return (stored + zeros_less_one) & (2**bits - 1)  # 0 less one is stored as the largest code

    def decode(arrays):
        if np.any(arrays.get("bias", 0)):
            raise ValueError("bias is not 0, and the config says that there is none")
        order = arrays.get("g_idx")
        # all 0 is what it is filled with while there is no order
        of_input = order if order is not None and order.any() else np.arange(inputs) // group
        codes = unpack(arrays["qweight"].T, bits)
        return _scaled(codes, arrays["scales"].T, zeros(arrays["qzeros"]).T, of_input, np.arange(outputs))

    return PackedWeight(
        {
            "qweight": Part(("I32",), ((inputs // per_word, outputs),)),
            "qzeros": Part(("I32",), ((groups, outputs // per_word),)),
            "scales": Part(FLOATS, ((groups, outputs),)),
            "g_idx": Part(("I32", "I64"), ((inputs,),), optional=True),
            "bias": Part(FLOATS, ((outputs,),), optional=True),
        },
        decode,
    )


def compressed(
    tensors: Mapping[str, StoredTensor],
    shape: Shape,
    *,
    packed_bits: int | None,
    dtype: str,
    scales: tuple[tuple[int, ...], ...],
    block: Shape,
    symmetric: bool,
    packed_zeros: bool,
) -> PackedWeight:
    """compressed-tensors: (code - zero) * scale, one scale for each block of the matrix.

    Packed codes and zeros are stored with half of the codes added to them.

    - tensors: those of the module; ``weight_shape`` is read.
    - packed_bits: bits of each code where ``weight_packed`` holds them, None for ``weight`` as it stands.
    - dtype: that of ``weight``.
    - scales: the shapes that ``weight_scale`` may have.
    - block: outputs and inputs that share a scale.
    - symmetric: whether there may be no ``weight_zero_point``.
    - packed_zeros: whether it is packed, along the outputs.
    """
    outputs, inputs = shape
    grid = _grid(shape, block)
    if packed_bits is None:
        parts = {"weight": Part((dtype,), (shape,))}
    else:
        parts = {
            "weight_packed": Part(("I32",), ((outputs, math.ceil(inputs * packed_bits / 32)),)),
            "weight_shape": Part(("I64", "I32"), ((2,),)),
        }
        _check_weight_shape(tensors.get("weight_shape"), parts["weight_shape"], shape)
    parts["weight_scale"] = Part(FLOATS, scales)
    if packed_zeros:
        assert packed_bits is not None
        words = math.ceil(outputs * packed_bits / 32)
        parts["weight_zero_point"] = Part(("I32",), ((words, grid[1]),))
    else:
        parts["weight_zero_point"] = Part(("I8", dtype), scales, optional=symmetric)
    parts["weight_g_idx"] = Part(("I32", "I64"), ((inputs,),), optional=True)

    def decode(arrays):
        if packed_bits is None:
            codes = arrays["weight"]
        else:
            codes = _signed(unpack(arrays["weight_packed"], packed_bits)[:, :inputs], packed_bits)
        zeros = arrays.get("weight_zero_point")
        if packed_zeros:
            assert packed_bits is not None
            zeros = _signed(unpack(arrays["weight_zero_point"].T, packed_bits)[:, :outputs].T, packed_bits)
        elif zeros is not None:
            zeros = zeros.reshape(grid)
        order = arrays.get("weight_g_idx")
        # -1 is what it is filled with while there is no order
        in_order = order is None or (order == -1).any()
        of_input = np.arange(inputs) // block[1] if in_order else order
        of_output = np.arange(outputs) // block[0]
        return _scaled(codes, arrays["weight_scale"].reshape(grid), zeros, of_input, of_output)

    return PackedWeight(parts, decode)


def scaled_float8(shape: Shape, name: str, scales: tuple[tuple[int, ...], ...], block: Shape) -> PackedWeight:
    """float8 times a scale for each block of the matrix.

    - name: what follows the module's name in that of the scales, ``weight_scale`` or ``weight_scale_inv``.
    - scales: the shapes that they may have.
    - block: outputs and inputs that share one.
    """
    outputs, inputs = shape

    def decode(arrays):
        table = arrays[name].reshape(_grid(shape, block))
        return _scaled(
            arrays["weight"], table, None, np.arange(inputs) // block[1], np.arange(outputs) // block[0]
        )

    parts = {"weight": Part(("F8_E4M3",), (shape,)), name: Part((*FLOATS, "F8_E8M0"), scales)}
    return PackedWeight(parts, decode)


def bitsandbytes_4bit(tensors: Mapping[str, StoredTensor], shape: Shape) -> PackedWeight:
    """QLoRA's NF4, or FP4: a table's entries times the largest magnitude of each block of values.

    Two codes per byte, the first in the high half, in the order of the flattened matrix. The magnitudes may
    be quantized themselves, less their mean, to entries of a second table.

    Source: QLoRA (Dettmers et al., 2023), arXiv:2305.14314; bitsandbytes' QuantState.
    """
    name = next(name for name in tensors if name.startswith("weight.quant_state."))
    state = _quant_state(tensors[name])
    size = shape[0] * shape[1]
    if state.get("shape") != list(shape):
        raise ValueError(f"{name} has shape {state.get('shape')}, the config says {list(shape)}")
    blocks = math.ceil(size / _block_size(state, name, "blocksize"))
    parts = {
        name: Part(("U8",), (tensors[name].shape,)),
        "weight": Part(("U8",), ((math.ceil(size / 2), 1),)),
        "weight.quant_map": Part(("F32",), ((16,),)),
        "weight.absmax": Part(("F32",), ((blocks,),)),
    }
    offset = state.get("nested_offset")
    is_nested = offset is not None
    if is_nested and not isinstance(offset, int | float):
        raise ValueError(f"{name} has nested_offset {offset!r}, which must be a number")
    if is_nested:
        nested_blocks = math.ceil(blocks / _block_size(state, name, "nested_blocksize"))
        parts["weight.absmax"] = Part(("U8",), ((blocks,),))
        parts["weight.nested_absmax"] = Part(("F32",), ((nested_blocks,),))
        parts["weight.nested_quant_map"] = Part(("F32",), ((256,),))

    def decode(arrays):
        largest = arrays["weight.absmax"]
        if is_nested:
            nested = arrays["weight.nested_absmax"][np.arange(blocks) // state["nested_blocksize"]]
            largest = arrays["weight.nested_quant_map"][largest] * nested + np.float32(offset)
        data = arrays["weight"].ravel()
        codes = np.stack([data >> 4, data & 15], axis=-1).ravel()[:size]
        values = arrays["weight.quant_map"][codes] * largest[np.arange(size) // state["blocksize"]]
        return values.reshape(shape)

    return PackedWeight(parts, decode)


def bitsandbytes_8bit(tensors: Mapping[str, StoredTensor], shape: Shape) -> PackedWeight:
    """LLM.int8(): integers times the largest magnitude of each output, over 127.

    Source: LLM.int8() (Dettmers et al., 2022), arXiv:2208.07339.
    """
    layout = tensors.get("weight_format")
    if layout is not None and (
        layout.dtype != "U8" or layout.shape not in ((), (1,)) or read_tensor(layout).any()
    ):
        raise ValueError("weight_format is not 0 (rows in order), which alone is supported")
    return PackedWeight(
        {
            "weight": Part(("I8",), (shape,)),
            "SCB": Part(("F32",), ((shape[0],),)),
            "weight_format": Part(("U8",), ((), (1,)), optional=True),
        },
        lambda arrays: arrays["weight"].astype(np.float32) * (arrays["SCB"] / np.float32(127))[:, None],
    )


def _scaled(codes, scales, zeros, of_input, of_output):
    """(codes - zeros) * scales in float32; scales and zeros have a row and a column for each block."""
    if of_input.min() < 0 or of_input.max() >= scales.shape[1]:
        raise ValueError(
            f"inputs are in groups {of_input.min()} to {of_input.max()}, but scales are of {scales.shape[1]}"
        )

    def spread(table):
        return table.astype(np.float32)[of_output][:, of_input]

    values = codes.astype(np.float32)
    return (values if zeros is None else values - spread(zeros)) * spread(scales)


def _signed(codes, bits):
    return codes.astype(np.int16) - 2 ** (bits - 1)


def _groups(inputs, group_size):
    group = inputs if group_size == -1 else group_size
    return group, math.ceil(inputs / group)


def _grid(shape, block):
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def _require_multiple(name, size, of):
    if size % of:
        raise ValueError(f"{name}={size} does not fill words of {of} codes")


def _check_weight_shape(stored, part, shape):
    if stored is None or stored.dtype not in part.dtypes or stored.shape not in part.shapes:
        return  # missing or misshapen, as the check of all parts says
    given = read_tensor(stored).tolist()
    if given != list(shape):
        raise ValueError(f"weight_shape is {given}, the config says {list(shape)}")


def _quant_state(stored) -> dict[str, Any]:
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.shape[0] > _MAX_STATE_BYTES:
        raise ValueError(f"{stored.name} is {stored.dtype} {list(stored.shape)}, not JSON in bytes")
    try:
        state = json.loads(read_tensor(stored).tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{stored.name} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{stored.name} must hold a JSON object, not {type(state).__name__}")
    return state


def _block_size(state, name, field):
    size = state.get(field)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} has {field} {size!r}, which must be a positive integer")
    return size
