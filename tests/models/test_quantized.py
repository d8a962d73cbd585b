"""Quantized checkpoints decode to what their formats say, bit for bit; what does not fit is refused by name.

The encoders write one value at a time from the definition of each format. Each draws a random weight of a
shape [out, in] and returns its tensors, by what follows the module's name, and the weight in float32.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jsparse.models import Llama, LlamaConfig
from jsparse.models.quantization import read_quantization
from jsparse.models.safetensors_folder import StoredTensor, read_header, read_tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is the code of this output


def put(words, place, bits, code):
    """Write code number ``place`` into a row of 32-bit words, the lowest bits first."""
    words[place * bits // 32] |= np.uint32(int(code) << (place * bits % 32))


def pack(codes, bits):
    """Rows of codes as rows of int32 words; the last may be part empty."""
    words = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint32)
    for row, line in enumerate(codes):
        for place, code in enumerate(line):
            put(words[row], place, bits, code)
    return words.view(np.int32)


def dequantized(codes, zeros, scales, group_of):
    """(code - zero) * scale in float64, rounded once; ``group_of(o, i)`` is the place of zero and scale."""
    weight = np.empty(codes.shape)
    for o in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            at = group_of(o, i)
            zero = 0.0 if zeros is None else float(zeros[at])
            weight[o, i] = (float(codes[o, i]) - zero) * float(scales[at])
    return weight.astype(np.float32)


def random_scales(rng, shape, dtype: Any = np.float16):
    return (rng.uniform(0.01, 0.1, shape)).astype(dtype)


def awq(rng, shape, group=16):
    outputs, inputs = shape
    groups = -(-inputs // group)
    codes, zeros = rng.integers(0, 16, shape), rng.integers(0, 16, (outputs, groups))
    scales = random_scales(rng, (groups, outputs))

    def packed(table):  # [out, n] -> [n, out / 8]
        words = np.zeros((table.shape[1], outputs // 8), np.uint32)
        for n in range(table.shape[1]):
            for word in range(outputs // 8):
                for nibble, output in enumerate(AWQ_ORDER):
                    words[n, word] |= np.uint32(int(table[8 * word + output, n]) << (4 * nibble))
        return words.view(np.int32)

    weight = dequantized(codes, zeros, scales.T, lambda o, i: (o, i // group))
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, weight


def gptq(rng, shape, group=16, bits=4, symmetric=False, version=1, ordered=True):
    outputs, inputs = shape
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    codes = rng.integers(0, 2**bits, shape)
    half = 2 ** (bits - 1)
    zeros = np.full((groups, outputs), half) if symmetric else rng.integers(0, 2**bits, (groups, outputs))
    scales = random_scales(rng, (groups, outputs))
    g_idx = np.arange(inputs) // size
    if not ordered:
        g_idx = rng.permutation(g_idx)
    stored = zeros if version == 2 else (zeros - 1) % 2**bits
    weight = dequantized(codes, zeros.T, scales.T, lambda o, i: (o, g_idx[i]))
    tensors = {"qweight": np.ascontiguousarray(pack(codes, bits).T), "qzeros": pack(stored, bits)}
    return tensors | {"scales": scales, "g_idx": g_idx.astype(np.int32)}, weight


def compressed_pack(rng, shape, bits=4, group=16, symmetric=True, ordered=True, dtype=ml_dtypes.bfloat16):
    """``group`` None: one scale for all, -1: one per output."""
    outputs, inputs = shape
    groups = 1 if group in (None, -1) else -(-inputs // group)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, shape)
    rows = 1 if group is None else outputs
    scales = random_scales(rng, (rows, groups), dtype)
    zeros = None if symmetric else rng.integers(-half, half, (rows, groups))
    g_idx = np.arange(inputs) // (inputs if group in (None, -1) else group)
    if not ordered:
        g_idx = rng.permutation(g_idx)
    weight = dequantized(codes, zeros, scales, lambda o, i: (0 if group is None else o, g_idx[i]))
    tensors = {
        "weight_packed": pack(codes + half, bits),
        "weight_scale": scales if group is not None else scales.reshape(1),
        "weight_shape": np.array(shape, np.int64),
    }
    if zeros is not None and group is None:
        tensors["weight_zero_point"] = zeros.reshape(1).astype(np.int8)
    elif zeros is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack((zeros + half).T, bits).T)
    if not ordered:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    return tensors, weight


def compressed_int(rng, shape, symmetric=True):
    codes = rng.integers(-128, 128, shape)
    scales = random_scales(rng, (shape[0], 1), ml_dtypes.bfloat16)
    zeros = None if symmetric else rng.integers(-128, 128, (shape[0], 1))
    weight = dequantized(codes, zeros, scales, lambda o, i: (o, 0))
    tensors = {"weight": codes.astype(np.int8), "weight_scale": scales}
    if zeros is not None:
        tensors["weight_zero_point"] = zeros.astype(np.int8)
    return tensors, weight


def e4m3(byte):
    """float8 e4m3fn: a sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def float8(rng, shape, name="weight_scale", block=None, scale_shape=None, dtype=np.float32):
    """``block`` None: one scale for all."""
    block = shape if block is None else block
    grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    data = rng.integers(0, 256, shape)
    data[(data & 127) == 127] = 0  # not a number
    values = np.array([[e4m3(int(byte)) for byte in row] for row in data])
    scales = random_scales(rng, grid, dtype)
    if dtype == ml_dtypes.float8_e8m0fnu:
        scales = rng.integers(118, 128, grid).astype(np.uint8).view(dtype)  # 2 ** (byte - 127)
    weight = dequantized(values, None, scales, lambda o, i: (o // block[0], i // block[1]))
    tensors = {"weight": data.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)}
    return tensors | {name: scales.reshape(grid if scale_shape is None else scale_shape)}, weight


def bitsandbytes_4bit(rng, shape, kind="nf4", block=64, nested=False):
    outputs, inputs = shape
    size = outputs * inputs
    blocks = -(-size // block)
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    codes = rng.integers(0, 16, size)
    data = np.zeros((-(-size // 2), 1), np.uint8)
    for place, code in enumerate(codes):
        data[place // 2, 0] |= int(code) << (4 if place % 2 == 0 else 0)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [outputs, inputs]}
    tensors = {"weight": data, "weight.quant_map": table}
    if nested:
        offset = 0.0437
        second = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        tensors["weight.absmax"] = rng.integers(0, 256, blocks).astype(np.uint8)
        tensors["weight.nested_absmax"] = rng.uniform(0.1, 1, -(-blocks // 256)).astype(np.float32)
        tensors["weight.nested_quant_map"] = second
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        largest = [
            second[code] * tensors["weight.nested_absmax"][place // 256] + np.float32(offset)
            for place, code in enumerate(tensors["weight.absmax"])
        ]
    else:
        largest = tensors["weight.absmax"] = rng.uniform(0.01, 0.2, blocks).astype(np.float32)
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    values = [float(table[code]) * float(largest[place // block]) for place, code in enumerate(codes)]
    return tensors, np.array(values).astype(np.float32).reshape(shape)


def bitsandbytes_8bit(rng, shape):
    codes = rng.integers(-127, 128, shape)
    largest = rng.uniform(0.1, 1, shape[0]).astype(np.float32)
    steps = [[largest[o] / np.float32(127)] for o in range(shape[0])]
    weight = dequantized(codes, None, np.array(steps, np.float32), lambda o, i: (o, 0))
    tensors = {"weight": codes.astype(np.int8), "SCB": largest, "weight_format": np.zeros((), np.uint8)}
    return tensors, weight


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
MODELOPT = {"quant_algo": "FP8", "producer": {"name": "modelopt"}, "kv_cache_scheme": "FP8"}


def compressed(layout, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


PACKED = compressed("pack-quantized", strategy="group", group_size=16)
FORMATS = {
    "awq": (AWQ, awq, {}),
    "awq, one group": (AWQ | {"group_size": -1}, awq, {"group": 1000}),
    "gptq": (GPTQ, gptq, {}),
    "gptq, symmetric": (GPTQ | {"sym": True}, gptq, {"symmetric": True}),
    "gptq, version 2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq, {"version": 2}),
    "gptq, version 2 that says 1": (GPTQ | {"sym": True}, gptq, {"symmetric": True, "version": 2}),
    "gptq, version 1 that says 2": (
        GPTQ | {"sym": True, "checkpoint_format": "gptq_v2"},
        gptq,
        {"symmetric": True, "version": 1},
    ),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, gptq, {"bits": 8}),
    "gptq, 2 bits": (GPTQ | {"bits": 2}, gptq, {"bits": 2}),
    "gptq, in the order of activations": (GPTQ | {"desc_act": True}, gptq, {"ordered": False}),
    "gptq, one group": (GPTQ | {"group_size": -1}, gptq, {"group": -1}),
    "packed": (PACKED, compressed_pack, {}),
    "packed, zeros": (
        compressed("pack-quantized", strategy="group", group_size=16, symmetric=False),
        compressed_pack,
        {"symmetric": False},
    ),
    "packed, 8 bits": (
        compressed("pack-quantized", strategy="channel", num_bits=8, symmetric=False),
        compressed_pack,
        {"bits": 8, "group": -1, "symmetric": False},
    ),
    "packed, channels by group size": (
        compressed("pack-quantized", group_size=-1),
        compressed_pack,
        {"group": -1},
    ),
    "packed, one scale and zero": (
        compressed("pack-quantized", symmetric=False),
        compressed_pack,
        {"group": None, "symmetric": False},
    ),
    "packed, in the order of activations": (
        compressed("pack-quantized", strategy="group", group_size=16, actorder="group"),
        compressed_pack,
        {"ordered": False},
    ),
    "int8": (compressed("int-quantized", num_bits=8, strategy="channel"), compressed_int, {}),
    "int8, zeros": (
        compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        compressed_int,
        {"symmetric": False},
    ),
    "float8 by tensor": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        float8,
        {"scale_shape": (1,), "dtype": ml_dtypes.bfloat16},
    ),
    "float8 by channel": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        float8,
        {"block": (1, 10000)},
    ),
    "float8 by block": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[8, 16]),
        float8,
        {"block": (8, 16)},
    ),
    "fp8": (FP8, float8, {"name": "weight_scale_inv", "block": (8, 16)}),
    "fp8, powers of two": (
        FP8,
        float8,
        {"name": "weight_scale_inv", "block": (8, 16), "dtype": ml_dtypes.float8_e8m0fnu},
    ),
    "fp8, blocks by default": (
        {"quant_method": "fp8"},
        float8,
        {"name": "weight_scale_inv", "block": (128, 128)},
    ),
    "fp8 of vLLM": ({"quant_method": "fp8", "activation_scheme": "static"}, float8, {"scale_shape": (1,)}),
    "fp8, one scale": (FP8 | {"weight_block_size": None}, float8, {"scale_shape": ()}),
    "modelopt": (MODELOPT, float8, {"scale_shape": ()}),
    "modelopt, channels": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        float8,
        {"block": (1, 10000), "scale_shape": (-1,)},
    ),
    "nf4": (NF4, bitsandbytes_4bit, {}),
    "nf4, twice": (NF4, bitsandbytes_4bit, {"nested": True}),
    "fp4": (NF4 | {"bnb_4bit_quant_type": "fp4"}, bitsandbytes_4bit, {"kind": "fp4", "block": 128}),
    "int8 of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_8bit, {}),
}
# Sizes that fill no group, block or word, where the format allows that.
ODD = {
    "awq": (8, 21),
    "gptq": (32, 48),
    "compressed_pack": (13, 21),
    "compressed_int": (5, 7),
    "float8": (13, 21),
}
ODD |= {"bitsandbytes_4bit": (67, 15), "bitsandbytes_8bit": (3, 5)}


def decode(folder, settings, tensors, shape, module="model.layers.0.mlp.up_proj"):
    """The weight that a file with these tensors of one module holds."""
    file = folder / "weights.safetensors"
    safetensors.numpy.save_file(tensors, file)
    stored = read_header(file)
    weight = read_quantization(settings)(module, stored, shape)
    for name, part in weight.parts.items():
        assert (part.optional and name not in stored) or stored[name].shape in part.shapes
        assert name not in stored or stored[name].dtype in part.dtypes
    return weight.decode({name: read_tensor(tensor) for name, tensor in stored.items()})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_every_value(name, odd, tmp_path):
    settings, encode, options = FORMATS[name]
    shape = ODD[encode.__name__] if odd else (32, 48)
    tensors, weight = encode(np.random.default_rng(len(name)), shape, **options)
    decoded = decode(tmp_path, settings, tensors, shape)
    assert decoded.dtype == np.float32 and decoded.shape == shape
    np.testing.assert_array_equal(decoded, weight)


# Whole folders


@pytest.fixture
def plain(tmp_path):
    config = LlamaConfig.tiny(vocab_size=61, intermediate_size=48, eos_token_ids=(2,), initializer_range=0.2)
    Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def quantize(plain, settings, encode, **options):
    """Beside ``plain``, a copy with encoded layers; then ``plain`` gets the weights that they stand for."""
    rng = np.random.default_rng(0)
    tensors = safetensors.numpy.load_file(plain / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        parts, weight = encode(rng, tensors[name].shape, **options)
        del packed[name]
        packed |= {f"{name.removesuffix('weight')}{end}": array for end, array in parts.items()}
        tensors[name] = weight.astype(ml_dtypes.bfloat16)
    folder = plain.with_name("quantized")
    folder.mkdir()
    fields = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    safetensors.numpy.save_file(packed, folder / "model.safetensors")
    safetensors.numpy.save_file(tensors, plain / "model.safetensors")
    return folder


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = {name: read_tensor(stored) for name, stored in read_header(file).items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def assert_same(folder, plain, dtype=None):
    ours = nnx.to_flat_state(nnx.state(Llama.from_pretrained(folder, dtype=dtype)))
    theirs = dict(nnx.to_flat_state(nnx.state(Llama.from_pretrained(plain, dtype=dtype))))
    for path, variable in ours:
        assert variable.dtype == theirs[path].dtype == (dtype or jnp.bfloat16)
        assert np.array_equal(variable[...], theirs[path][...]), path


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_folder_is_the_model_of_its_weights(name, plain):
    settings, encode, options = FORMATS[name]
    assert_same(quantize(plain, settings, encode, **options), plain)


def test_dtypes(plain):
    folder = quantize(plain, GPTQ, gptq)
    edit_config(folder, dtype="float16")
    model = Llama.from_pretrained(folder)
    assert {x.dtype for _, x in nnx.to_flat_state(nnx.state(model))} == {jnp.dtype("float16")}
    edit_config(folder, dtype=None)  # then that of what is not quantized
    assert Llama.from_pretrained(folder).norm.scale.dtype == jnp.bfloat16


def test_what_does_not_change_a_weight_is_passed_over(plain):
    folder = quantize(plain, FP8 | {"weight_block_size": None}, float8)
    scale = np.ones((), np.float32)
    names = ("mlp.up_proj.input_scale", "self_attn.k_proj.k_scale", "self_attn.v_scale", "self_attn.kv_scale")
    edit(folder, lambda t: t.update({f"model.layers.0.{name}": scale.copy() for name in names}))
    assert_same(folder, plain)
    edit(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.pre_quant_scale": scale.copy()}))
    with pytest.raises(ValueError, match="unexpected model.layers.0.mlp.up_proj.pre_quant_scale"):
        Llama.from_pretrained(folder)


def test_nvidia_puts_the_settings_beside(plain):
    folder = quantize(plain, None, float8)
    beside = folder / "hf_quant_config.json"
    with pytest.raises(ValueError, match="unexpected .*weight_scale"):
        Llama.from_pretrained(folder)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))
    assert_same(folder, plain)
    beside.write_text(json.dumps({"quantization": quantization | {"kv_cache_quant_algo": "FP8"}}))
    assert_same(folder, plain)  # the cache keeps the model's dtype


def test_a_bias_of_zeros_as_autogptq_writes_it(plain):
    folder = quantize(plain, GPTQ, gptq)
    name = "model.layers.1.self_attn.q_proj.bias"
    edit(folder, lambda t: t.update({name: np.zeros(t[name.replace("bias", "scales")].shape[1], np.float16)}))
    assert_same(folder, plain)
    edit(folder, lambda t: t[name].__setitem__(3, 0.5))
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj: bias is not 0"):
        Llama.from_pretrained(folder)


def test_an_order_of_zeros_is_none(plain):
    """As in files of GPTQ-for-LLaMa, which never filled it in unless it followed the activations."""
    folder = quantize(plain, GPTQ, gptq)
    edit(folder, lambda t: [array.fill(0) for name, array in t.items() if name.endswith("g_idx")])
    assert_same(folder, plain)


def test_groups_of_layers(plain):
    """The name of a layer wins over a pattern, and a pattern over the class; ignored layers are plain."""
    settings = compressed("pack-quantized", strategy="group", group_size=16)
    groups = settings["config_groups"]
    groups["by class"] = groups.pop("group_0")
    groups["by pattern"] = {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "format": "int-quantized",
    }
    groups["by name"] = {
        "targets": ["model.layers.0.mlp.down_proj"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "format": "float-quantized",
    }
    find = read_quantization(settings | {"ignore": ["lm_head", "re:.*k_proj$"]})

    def parts(module, **tensors):
        return find(f"model.layers.{module}", tensors, (8, 16)).parts

    assert "weight_packed" in parts("0.mlp.up_proj")
    assert parts("1.mlp.down_proj")["weight"].dtypes == ("I8",)
    assert parts("0.mlp.down_proj")["weight"].dtypes == ("F8_E4M3",)
    stored = StoredTensor(Path("x"), "x", "I32", (8, 2), 0)
    with pytest.raises(ValueError, match="ignore names model.layers.0.self_attn.k_proj, yet.*weight_packed"):
        parts("0.self_attn.k_proj", weight_packed=stored)


# Refusals: before anything is decoded, in one message, by name


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "mxfp4"}, "quant_method='mxfp4'.*awq, gptq.*bfloat16"),
        ({"bits": 4}, "quant_method=None"),
        ({"quant_method": ["awq"]}, "quant_method=\\['awq'\\]"),
        ("awq", "quantization_config must be an object or null, not 'awq'"),
        (PACKED | {"ignore": "lm_head"}, "ignore must be a list of strings, not 'lm_head'"),
        (PACKED | {"ignore": ["re:("]}, "ignore has 're:\\('"),
        (AWQ | {"bits": 8}, "bits=8 is not supported for awq; allowed is 4"),
        (AWQ | {"version": "gemv"}, "version='gemv'.*'gemm'"),
        (AWQ | {"group_size": 0}, "group_size of awq.*0"),
        (GPTQ | {"bits": 3}, "bits=3 is not supported for gptq; allowed is 4 or 8 or 2"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'.*'gptq' and 'gptq_v2'"),
        (GPTQ | {"sym": 1}, "sym=1"),
        (GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 8}}}, "dynamic=.*up_proj"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": [float("inf"), 128]}, "weight_block_size"),
        (MODELOPT | {"quant_algo": "NVFP4"}, "quant_algo='NVFP4' is not supported for modelopt"),
        (compressed("marlin-24"), "format='marlin-24' of config_groups.group_0.*pack-quantized"),
        (compressed("pack-quantized", symmetric=None), "symmetric=None"),
        (compressed("pack-quantized", num_bits=3), "num_bits 3.*int4, int8"),
        (compressed("float-quantized", num_bits=4, type="float"), "num_bits 4.*float8"),
        (compressed("pack-quantized", strategy="tensor_group"), "strategy 'tensor_group'"),
        (compressed("pack-quantized", strategy="group"), "group_size.*None"),
        (PACKED | {"config_groups": {"W4A16": ["Linear"]}}, "config_groups must be an object of objects"),
        (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config=.*sparse-24"),
        (PACKED | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)
def test_settings_that_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):  # by the config, before there are weights
        LlamaConfig.from_hf(LlamaConfig.tiny().to_hf() | {"quantization_config": settings})


MODULE = "model.layers.0.mlp.up_proj."  # [48, 32]


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gptq", lambda t: t.pop("qweight"), "missing {}qweight"),
        ("gptq", lambda t: t.pop("scales"), "missing {}scales"),
        ("gptq", lambda t: t.update(qweight=t["qweight"][:-1]), r"{}qweight has shape \[3, 48\].*\[4, 48\]"),
        ("gptq", lambda t: t.update(qweight=t["qweight"].astype(np.int64)), "{}qweight has dtype I64.*I32"),
        ("gptq", lambda t: t.update(perm=t["g_idx"]), "unexpected {}perm"),
        ("gptq", lambda t: t["g_idx"].__setitem__(3, 9), "inputs are in groups 0 to 9, but scales are of 2"),
        ("gptq, symmetric", lambda t: t["qzeros"].__setitem__((0, 0), 5), "says sym.*all must be 7 .*or 8"),
        ("awq", lambda t: t.update(qzeros=t["qzeros"][:1]), r"{}qzeros has shape \[1, 6\].*\[2, 6\]"),
        ("packed", lambda t: t["weight_shape"].__setitem__(0, 40), r"weight_shape is \[40, 32\].*\[48, 32\]"),
        ("packed", lambda t: t.pop("weight_shape"), "missing {}weight_shape"),
        ("packed, zeros", lambda t: t.pop("weight_zero_point"), "missing {}weight_zero_point"),
        ("int8", lambda t: t.pop("weight_scale"), "missing {}weight_scale"),
        ("int8, zeros", lambda t: t.pop("weight_zero_point"), "missing {}weight_zero_point"),
        (
            "fp8",
            lambda t: t.update(weight_scale_inv=np.ones((6, 3), np.float32)),
            r"{}weight_scale_inv.*\[6, 2\]",
        ),
        ("fp8", lambda t: t.update(weight=t["weight"].view(np.int8)), "{}weight has dtype I8.*F8_E4M3"),
        ("nf4", lambda t: t.pop("weight.absmax"), "missing {}weight.absmax"),
        ("nf4", lambda t: t.pop("weight.quant_state.bitsandbytes__nf4"), "neither.*quant_state"),
        (
            "nf4",
            lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}),
            "quant_state.bitsandbytes__nf4 cannot be read",
        ),
        (
            "nf4",
            lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{}", np.uint8)}),
            r"quant_state.bitsandbytes__nf4 has shape None.*\[48, 32\]",
        ),
        ("int8 of bitsandbytes", lambda t: t.update(weight_format=np.ones((), np.uint8)), "weight_format"),
    ],
)
def test_tensors_that_are_refused(name, change, named, plain):
    settings, encode, options = FORMATS[name]
    folder = quantize(plain, settings, encode, **options)

    def change_module(tensors):
        parts = {
            key.removeprefix(MODULE): tensors.pop(key) for key in list(tensors) if key.startswith(MODULE)
        }
        change(parts)
        tensors |= {MODULE + key: np.ascontiguousarray(array) for key, array in parts.items()}

    edit(folder, change_module)
    with pytest.raises(ValueError, match=named.replace("{}", MODULE.replace(".", r"\."))) as caught:
        Llama.from_pretrained(folder)
    assert str(folder) in str(caught.value)
