"""Layouts, dtypes and encodings against those who write them: torch, transformers, compressed-tensors."""

import json
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig
from jsparse.models.convert import ConvertConfig, convert
from jsparse.models.quantization import read_quantization
from jsparse.models.safetensors_folder import read_header, read_tensor
from jsparse.models.torch_file import read_torch_header, read_torch_tensor

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers, from the extra `parity`"
)
from safetensors.torch import load_file, save_file  # noqa: E402, it needs torch

transformers.utils.logging.disable_progress_bar()


def as_torch(array):
    """A NumPy array as a tensor, through bytes: torch does not know NumPy's bfloat16."""
    dtype = getattr(torch, array.dtype.name)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape)


def their_parameters(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.named_parameters())


def assert_same_parameters(folder):
    """Ours have the values and the dtype of theirs."""
    theirs = their_parameters(folder)
    ours = dict(nnx.to_flat_state(nnx.state(Llama.from_pretrained(folder))))
    assert len(ours) == len(theirs)
    for path, variable in ours.items():
        *modules, kind = map(str, path)
        prefix = "" if modules[0] == "lm_head" else "model."
        name = prefix + ".".join([*modules, {"bias": "bias"}.get(kind, "weight")])
        array = np.asarray(variable[...])
        array = array.T if kind == "kernel" else array
        assert torch.equal(as_torch(np.ascontiguousarray(array)), theirs[name].detach()), name


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig.tiny(intermediate_size=48, tie_word_embeddings=True, initializer_range=0.2)
    Llama(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("layout", ["head", "bare", "index"])
def test_layouts_of_transformers(layout, folder):
    changes = {
        "head": lambda t: {
            name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in t.items()
        },
        "bare": lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()},
        "index": lambda t: t,
    }
    edit(folder, changes[layout])
    if layout == "index":
        names = load_file(folder / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_parameters(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16"},
        {"dtype": None, "torch_dtype": "float16"},
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        {"dtype": None},
    ],
)
def test_dtypes_of_transformers(fields, folder):
    edit_config(folder, **fields)
    assert_same_parameters(folder)


def test_mixed_dtypes_of_transformers(folder):
    edit(folder, lambda t: {name: x if "norm" in name else x.bfloat16() for name, x in t.items()})
    edit_config(folder, dtype="bfloat16")
    assert_same_parameters(folder)


# Files of torch.save


def test_what_torch_saves(tmp_path):
    base = torch.arange(24.0).bfloat16()
    tensors = {
        "view": base[3:9].reshape(2, 3).T,
        "same storage": base,
        "parameter": torch.nn.Parameter(base[::2]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2),
        "bool": torch.tensor([True, False]),
    }
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
    tensors |= {name: torch.arange(6).to(getattr(torch, name)) for name in names}
    for protocol in (2, 4):
        torch.save(tensors, tmp_path / "x.pth", pickle_protocol=protocol)
        ours = {name: read_torch_tensor(x) for name, x in read_torch_header(tmp_path / "x.pth").items()}
        assert list(ours) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(as_torch(ours[name]) if tensor.numel() else torch.zeros(0, 3), tensor), name
            assert ours[name].shape == tuple(tensor.shape)


def test_a_model_of_transformers_in_a_pickle(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(folder / "config.json", source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")  # the tied head too, and versions of modules
    assert zipfile.is_zipfile(source / "pytorch_model.bin")
    convert(ConvertConfig(model=source, output=tmp_path / "new", max_shard_bytes=30_000))
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert_same_parameters(tmp_path / "new")


def test_what_torch_saves_that_is_refused(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch before 1.6.*weights_only=True"):
        read_torch_header(file)
    torch.save(torch.load(file, weights_only=True), file)  # as the error says
    assert read_torch_tensor(read_torch_header(file)["w"]).tolist() == [1, 1]
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match="torch.nn.modules.linear Linear"):
        read_torch_header(file)


# Encodings


def decode(tmp_path, settings, tensors, shape):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    weight = read_quantization(settings)("model.layers.0.mlp.up_proj", stored, shape)
    for name, part in weight.parts.items():
        assert (part.optional and name not in stored) or stored[name].shape in part.shapes
        assert name not in stored or stored[name].dtype in part.dtypes
    assert set(stored) <= set(weight.parts)
    return weight.decode({name: read_tensor(tensor) for name, tensor in stored.items()})


def test_float8_in_blocks_as_transformers_decodes_it(tmp_path):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = (torch.randn(256, 384) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    ours = decode(tmp_path, settings, {"weight": weight, "weight_scale_inv": scales}, (256, 384))
    assert torch.equal(as_torch(ours.astype(jnp.bfloat16)), theirs)


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 2, "strategy": "group", "group_size": 16, "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
        ),
    ],
)
@pytest.mark.parametrize("shape", [(48, 64), (45, 48)])
def test_compressed_tensors(layout, weights, shape, tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=layout)
    outputs, inputs = shape
    grids = {
        "tensor": (1,),
        "channel": (outputs, 1),
        "group": (outputs, inputs // 16),
        "block": (-(-outputs // 16), -(-inputs // 32)),
    }
    grid = grids[weights["strategy"]]
    torch.manual_seed(0)
    state = {
        "weight": torch.randn(shape).bfloat16(),
        "weight_scale": (torch.rand(grid) / 4 + 0.01).bfloat16(),
    }
    if not weights.get("symmetric", True):
        half = 2 ** (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-half, half, grid, dtype=torch.int8)
    library = compressors.BaseCompressor.get_value_from_registry(layout)
    compressed = library.compress(state, scheme)
    theirs = library.decompress(compressed, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int"} | weights}},
    }
    ours = decode(tmp_path, settings, compressed, shape)
    assert torch.equal(as_torch(ours.astype(jnp.bfloat16)), theirs.bfloat16())
