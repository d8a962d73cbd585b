"""Files of torch.save become safetensors bit for bit, and no file makes anything run.

The archives are written by Python's own pickler with classes that go by torch's names: no torch is needed.
"""

import collections
import io
import json
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jsparse.__main__ import main
from jsparse.models import Llama, LoRAParam, add_lora, load_adapter, save_adapter
from jsparse.models.convert import ConvertConfig, convert
from jsparse.models.torch_file import read_torch_header, read_torch_tensor

BIN = "pytorch_model.bin"
STORAGES = {
    np.dtype("float64"): "DoubleStorage",
    np.dtype("float32"): "FloatStorage",
    np.dtype("float16"): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype("int64"): "LongStorage",
    np.dtype("int32"): "IntStorage",
    np.dtype("int16"): "ShortStorage",
    np.dtype("int8"): "CharStorage",
    np.dtype("uint8"): "ByteStorage",
    np.dtype("bool"): "BoolStorage",
}


def named(module, name):
    return type(name, (), {"__module__": module, "__qualname__": name})


CLASSES = {dtype: named("torch", name) for dtype, name in STORAGES.items()}
REBUILD = {name: named("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")}


class Storage:
    def __init__(self, array):
        self.array = array


class Tensor:
    """A part of a storage, as torch pickles it."""

    def __init__(self, storage, offset, shape, strides, is_parameter=False, metadata=()):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict(), *metadata)
        self.is_parameter = is_parameter


def whole(array):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(Storage(array.ravel()), 0, array.shape, strides)


class Pickler(pickle.Pickler):
    def __init__(self, stream, protocol):
        super().__init__(stream, protocol)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        if value not in self.storages:
            self.storages.append(value)
        array = value.array
        return "storage", CLASSES[array.dtype], str(self.storages.index(value)), "cpu", array.size

    def reducer_override(self, value):
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.is_parameter:
            tensor = Tensor(*value.arguments[:4])
            return REBUILD["_rebuild_parameter"], (tensor, True, collections.OrderedDict())
        return REBUILD["_rebuild_tensor_v2"], value.arguments


def save_torch(file, content, protocol=2):
    """What torch.save writes."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for stand_in in (*CLASSES.values(), *REBUILD.values()):
        setattr(modules[stand_in.__module__], stand_in.__qualname__, stand_in)
    stream = io.BytesIO()
    pickler = Pickler(stream, protocol)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        pickler.dump(content)
    write_archive(file, stream.getvalue(), [storage.array.tobytes() for storage in pickler.storages])


def write_archive(file, program, storages=(), compression=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("model/data.pkl", program)
        archive.writestr("model/byteorder", order)
        for key, data in enumerate(storages):
            archive.writestr(f"model/data/{key}", data)
        archive.writestr("model/version", b"3\n")


def read(file):
    return {name: read_torch_tensor(tensor) for name, tensor in read_torch_header(file).items()}


def assert_arrays(ours, theirs):
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape, name
        assert ours[name].tobytes() == array.tobytes(), name


# Reading


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype(protocol, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {str(dtype): rng.integers(0, 2, (3, 4)).astype(dtype) for dtype in STORAGES}
    content = collections.OrderedDict((name, whole(array)) for name, array in arrays.items())
    vars(content)["_metadata"] = collections.OrderedDict({"": {"version": 1}})
    save_torch(tmp_path / "x", content, protocol)
    assert_arrays(read(tmp_path / "x"), arrays)
    save_torch(tmp_path / "x", dict(content), protocol)
    assert_arrays(read(tmp_path / "x"), arrays)


def test_views_of_one_storage(tmp_path):
    data = np.arange(24, dtype=np.float32)
    storage = Storage(data)
    grid = data.reshape(4, 6)
    tensors = {
        "all": (Tensor(storage, 0, (4, 6), (6, 1)), grid),
        "transposed": (Tensor(storage, 0, (6, 4), (1, 6)), grid.T),
        "part": (Tensor(storage, 8, (2, 2), (6, 2)), grid[1:3, 2:6:2]),
        "scalar": (Tensor(storage, 23, (), ()), data[23]),
        "empty": (Tensor(storage, 0, (0, 3), (3, 1)), np.zeros((0, 3), np.float32)),
        "parameter": (Tensor(storage, 3, (5,), (1,), is_parameter=True), data[3:8]),
    }
    save_torch(tmp_path / "x", {name: tensor for name, (tensor, _) in tensors.items()})
    assert_arrays(read(tmp_path / "x"), {name: np.asarray(array) for name, (_, array) in tensors.items()})


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5, 5), (5, 1)),
        (1, (24,), (1,)),
        (0, (2,), (24,)),
        (0, (2**40,), (0,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (2**70,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (True,), (1,)),
        (0, (1,) * 9, (1,) * 9),
    ],
)
def test_tensors_stay_in_their_storage(offset, shape, strides, tmp_path):
    storage = Storage(np.arange(24, dtype=np.float32))
    save_torch(tmp_path / "x", {"w": Tensor(storage, offset, shape, strides)})
    with pytest.raises(ValueError, match="x is refused: a (tensor|size)"):
        read_torch_header(tmp_path / "x")


def test_a_small_file_cannot_fill_the_disk(tmp_path):
    storage = Storage(np.zeros(100_000, np.float32))
    save_torch(tmp_path / "x", {str(i): Tensor(storage, 0, (100_000,), (1,)) for i in range(5)})
    with pytest.raises(ValueError, match="x is refused: its tensors repeat .* until they are 2000000"):
        read_torch_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "'state_dict' is of type dict, not a tensor; save the state dict alone"),
        ({"step": 3}, "'step' is of type int"),
        ({3: "x"}, "a key is of type int, not str"),
        ([1], "what it holds is of type list, not dict"),
    ],
)
def test_what_is_no_state_dict(content, message, tmp_path):
    save_torch(tmp_path / "x", content)
    with pytest.raises(ValueError, match=message):
        read_torch_header(tmp_path / "x")


def test_damaged_archives(tmp_path):
    file = tmp_path / "x"
    save_torch(file, {"w": whole(np.arange(6, dtype=np.float32))})
    raw = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        program = archive.read("model/data.pkl")
    damaged = [
        (lambda: write_archive(file, program), "w needs 24 plain bytes in model/data/0"),
        (lambda: write_archive(file, program, [bytes(20)]), "w needs 24 plain bytes"),
        (lambda: write_archive(file, program, [bytes(24)], zipfile.ZIP_DEFLATED), "or is compressed"),
        (lambda: write_archive(file, program, [bytes(24)], order=b"big"), "not little-endian"),
        (lambda: write_archive(file, program[:-1], [bytes(24)]), "is refused"),
        (lambda: write_archive(file, bytes(2**24 + 1)), "16777217 bytes"),
        (lambda: file.write_bytes(raw[:-30]), "cut short.*download it again"),
        (lambda: file.write_bytes(b""), "cut short at 0 bytes"),
        (lambda: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda: file.write_bytes(pickle.dumps({"w": 1}, 2)), "before 1.6.*weights_only=True"),
    ]
    for damage, message in damaged:
        damage()
        with pytest.raises(ValueError, match=message) as caught:
            read_torch_header(file)
        assert str(file) in str(caught.value)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match="has no data.pkl"):
        read_torch_header(file)


@pytest.mark.parametrize("change", [0xFF, 0x80, 0x20, 0x01])
def test_a_damaged_byte_is_an_error_that_names_the_file_or_changes_nothing(change, tmp_path):
    file, values = tmp_path / "x", np.arange(6, dtype=np.float32)
    save_torch(file, {"w": whole(values)})
    raw = file.read_bytes()
    for at in range(len(raw)):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :])
        try:
            tensors = {name: read_torch_tensor(tensor) for name, tensor in read_torch_header(file).items()}
        except ValueError as error:
            assert str(file) in str(error), at
        else:
            assert list(tensors) == ["w"] and np.array_equal(tensors["w"], values), at


@pytest.mark.parametrize(
    ("shape", "strides"), [((1, 2), (2**61, 1)), ((0, 2**61), (1, 1))], ids=["stride", "shape"]
)
def test_sizes_that_no_array_can_have(shape, strides, tmp_path):
    file = tmp_path / "x"
    save_torch(file, {"w": Tensor(Storage(np.ones(2, np.float32)), 0, shape, strides)})
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_torch_tensor(read_torch_header(file)["w"])
    assert str(file) in str(caught.value)


def test_tensors_that_are_not_what_their_bytes_say(tmp_path):
    ones = np.ones(2, np.float32)
    negated = Tensor(Storage(ones), 0, (2,), (1,), metadata=({"neg": True},))
    repeated = Tensor(Storage(ones), 0, (4,), (0,))
    for tensor, message in ((negated, "stored negated"), (repeated, r"shape \[4\] repeats the 2 elements")):
        save_torch(tmp_path / "x", {"w": tensor})
        with pytest.raises(ValueError, match=message):
            read_torch_header(tmp_path / "x")


def test_one_of_two_sets_of_weights_is_out_of_date(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="has both pytorch_model.bin and pytorch_model.bin.index.json"):
        convert(ConvertConfig(model=tmp_path, output=tmp_path / "out"))


# Files that want to run something


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(folder):
    """Programs that would run a command, or exhaust the machine, if they were unpickled."""
    command = f"touch {folder}/ran"
    system = pickle.dumps(Bomb(eval, f"__import__('os').system({command!r})"), 2)
    text = b"X" + len(command).to_bytes(4, "little") + command.encode()
    call = b"\x80\x02c%s\n" + text + b"\x85R."
    ordered = b"\x80\x02ccollections\nOrderedDict\n)R"
    programs = {
        "reduce": system,
        "inside": pickle.dumps({"w": Bomb(eval, "1")}, 2),
        "stack global": pickle.dumps(Bomb(eval, "1"), 4),
        "os.system": call % b"posix\nsystem",
        "eval": call % b"__builtin__\neval",
        "an allowed module": call % b"torch._utils\n_rebuild_device_tensor_from_numpy",
        "torch.load": call % b"torch\nload",
        "attribute of an allowed name": call % b"collections\nOrderedDict.__init__",
        "calling a storage": call % b"torch\nFloatStorage",
        "calling OrderedDict": call % b"collections\nOrderedDict",
        "inst": b"\x80\x02(" + text + b"iposix\nsystem\n.",
        "obj": b"\x80\x02(cposix\nsystem\n" + text + b"o.",
        "newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id as text": b"\x80\x02Pstorage\n.",
        "persistent id": b"\x80\x02(X\x07\x00\x00\x00storagecposix\nsystem\nX\x01\x00\x00\x000h\x00K\x01tQ.",
        "setstate": ordered + b"}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsb.",
        "class": ordered + b"}X\x09\x00\x00\x00__class__]sb.",
        "attributes of a list": b"\x80\x02]}X\x09\x00\x00\x00_metadata]sb.",
        "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "deep in a dict": b"\x80\x02}X\x01\x00\x00\x00w)" + b"\x85" * 100_000 + b"s.",
        "marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "long text": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.",
        "long number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",
        "an empty stack": b"\x80\x020R.",
        "an unknown memo": b"\x80\x02h\x07.",
        "nothing": b"",
        "no end": b"\x80\x02}",
        "no instruction": b"\x80\x02\xff.",
        "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s.",
    }
    return {folder / name: program for name, program in programs.items()}


WATCH = """
import json, sys
from pathlib import Path
from jsparse.models.torch_file import read_torch_header, read_torch_tensor

benign, *files = map(Path, json.loads(sys.argv[1]))
for tensor in read_torch_header(benign).values():  # whatever is imported late is imported now
    read_torch_tensor(tensor)
try:
    read_torch_header(Path(__file__))
except ValueError:
    pass
events, messages = [], {}
sys.addaudithook(lambda event, arguments: events.append([event, str(arguments[:1])]))
for file in files:
    try:
        read_torch_header(file)
        messages[file.name] = None
    except ValueError as error:
        messages[file.name] = str(error)
seen = [event for event in events if event[0] != "open" or not any(str(file) in event[1] for file in files)]
print(json.dumps([messages, seen]))
"""


def test_nothing_in_a_file_can_run(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    programs = hostile(folder)
    for file, program in programs.items():
        write_archive(file, program)
    save_torch(tmp_path / "benign", {"w": whole(np.arange(6, dtype=np.float32))})
    script = tmp_path / "watch.py"
    script.write_text(WATCH)
    files = json.dumps([str(tmp_path / "benign"), *map(str, programs)])
    run = subprocess.run([sys.executable, script, files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    messages, seen = json.loads(run.stdout)
    assert seen == []  # no import, no compile, no call of the system: the files were opened, and that is all
    assert not (folder / "ran").exists()
    assert set(messages) == {file.name for file in programs}
    assert {name for name, message in messages.items() if message is None} == set()
    for name, message in messages.items():
        assert f"{folder / name} is refused: " in message and len(message) < 500
    assert "'posix system'" in messages["os.system"] and "could run code" in messages["os.system"]
    assert "instruction INST" in messages["inst"] and "instruction NEWOBJ" in messages["newobj"]


def test_the_watch_sees_what_pickle_would_do(tmp_path):
    """The same programs do run when unpickled, so the test above would notice."""
    programs = hostile(tmp_path)
    for name in ("reduce", "inst", "os.system"):
        pickle.loads(programs[tmp_path / name])
        (tmp_path / "ran").unlink()


# Folders


@pytest.fixture
def source(tiny_model, tmp_path):
    """A folder as transformers wrote it before safetensors."""
    tiny_model.save_pretrained(tmp_path / "plain")
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("words")
    save_torch(folder / BIN, tensors_of(tmp_path / "plain"))
    return folder


def tensors_of(folder):
    return {
        name: whole(array)
        for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items()
    }


def split(source, tmp_path, with_index=True):
    tensors = list(tensors_of(tmp_path / "plain").items())
    (source / BIN).unlink()
    names = [f"pytorch_model-{i:05d}-of-00003.bin" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_torch(source / name, dict(tensors[i::3]))
    weight_map = {tensor: names[i % 3] for i, (tensor, _) in enumerate(tensors)}
    if with_index:
        (source / f"{BIN}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def assert_converted(output, tiny_model):
    ours = dict(nnx.to_flat_state(nnx.state(Llama.from_pretrained(output))))
    for path, variable in nnx.to_flat_state(nnx.state(tiny_model)):
        assert jnp.array_equal(ours[path][...], variable[...]), path


def test_the_command(source, tiny_model, tmp_path, capsys):
    (source / "original").mkdir()
    (source / "tf_model.h5").write_bytes(b"other weights")
    assert main(["convert", "--model", str(source), "--output", str(tmp_path / "new")]) == 0
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'new'}: the model in safetensors, without original, tf_model.h5\n"
    )
    names = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == names
    assert (tmp_path / "new" / "vocab.txt").read_text() == "words"
    assert_converted(tmp_path / "new", tiny_model)
    assert main(["convert", "--model", str(source), "--output", str(tmp_path / "new")]) == 2
    assert "choose a new folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=f"jsparse convert --model {source}"):
        Llama.from_pretrained(source)


def test_additional_chat_templates_are_copied_too(source, hub_cache, store_snapshot, tmp_path):
    folder = source / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("a template")
    (folder / "run.py").write_text("not copied")
    name = "additional_chat_templates/rag.jinja"
    left = convert(ConvertConfig(model=source, output=tmp_path / "new"))
    assert left == ["additional_chat_templates/run.py"]
    assert [file.name for file in (tmp_path / "new" / "additional_chat_templates").iterdir()] == ["rag.jinja"]
    assert (tmp_path / "new" / name).read_text() == "a template"

    files = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    snapshot = store_snapshot(hub_cache, "org/name", "a" * 40, files)
    (snapshot / name).parent.mkdir()
    (snapshot.parent.parent / "blobs" / "template").write_text("a template")
    (snapshot / name).symlink_to("../../../blobs/template")
    convert(ConvertConfig(model=snapshot, output=tmp_path / "of a cache"))
    assert (tmp_path / "of a cache" / name).read_text() == "a template"

    (folder / "other.jinja").symlink_to(tmp_path / "plain" / "config.json")
    with pytest.raises(ValueError, match="other.jinja is a link that leads out of the checkpoint"):
        convert(ConvertConfig(model=source, output=tmp_path / "newer"))
    assert not (tmp_path / "newer" / "config.json").exists()


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_in_shards_out(with_index, source, tiny_model, tmp_path):
    split(source, tmp_path, with_index)
    assert convert(ConvertConfig(model=source, output=tmp_path / "new", max_shard_bytes=20_000)) == []
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    assert not list((tmp_path / "new").glob("*.bin*"))
    assert_converted(tmp_path / "new", tiny_model)


def test_a_single_pth(source, tiny_model, tmp_path):
    (source / BIN).rename(source / "model.pth")
    convert(ConvertConfig(model=source, output=tmp_path / "new"))
    assert_converted(tmp_path / "new", tiny_model)
    shutil.copy(source / "model.pth", source / "other.pt")
    with pytest.raises(FileNotFoundError, match="which of model.pth, other.pt is meant"):
        convert(ConvertConfig(model=source, output=tmp_path / "newer"))


def test_an_id_is_downloaded_first(source, hub_cache, store_snapshot, tiny_model, tmp_path, capsys):
    """Pickles are never fetched, but a cache may have them from another library."""
    commit = "a" * 40
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    snapshot = store_snapshot(hub_cache, "org/name", commit, files, main=commit)
    for model, at in (("org/name", ""), ("org/name@v2", " --revision v2")):
        assert main(["convert", "--model", model, "--output", str(tmp_path / "new")]) == 2
        err = capsys.readouterr().err
        assert f"model={model} is an id" in err and err.count("\n") == 1
        assert f"`hf download org/name{at} --local-dir FOLDER` does it, and then --model is FOLDER" in err
    with pytest.raises(
        FileNotFoundError, match=f"hf download org/name --revision {commit} .*jsparse convert"
    ):
        Llama.from_pretrained("org/name")
    convert(ConvertConfig(model=snapshot, output=tmp_path / "new"))
    assert_converted(tmp_path / "new", tiny_model)


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """A LongLoRA folder, as PEFT wrote its adapter before safetensors; and the same model in memory."""
    tuned = nnx.clone(tiny_model)
    add_lora(tuned, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj",))
    for _, parameter in nnx.to_flat_state(nnx.state(tuned, LoRAParam)):
        parameter[...] = parameter[...] + 0.1
    tuned.norm.scale[...] += 1
    save_adapter(tuned, tmp_path / "plain", base="base", trained=LoRAParam)
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(tmp_path / "plain" / "adapter_config.json", folder)
    arrays = safetensors.numpy.load_file(tmp_path / "plain" / "adapter_model.safetensors")
    save_torch(folder / "adapter_model.bin", {name: whole(array) for name, array in arrays.items()})
    beside = {"model.norm.weight": whole(np.asarray(tuned.norm.scale[...]))}
    save_torch(folder / "trainable_params.bin", beside)
    return folder, tuned


def test_an_adapter(adapter, tiny_model, tmp_path, capsys):
    folder, tuned = adapter
    (folder / "tokenizer.json").write_text("{}")
    base = nnx.clone(tiny_model)
    with pytest.raises(FileNotFoundError, match=f"jsparse convert --model {folder} --output NEW_FOLDER"):
        load_adapter(base, folder)
    assert main(["convert", "--model", str(folder), "--output", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}: the adapter in safetensors\n"
    names = [
        "adapter_config.json",
        *(f"{name}.safetensors" for name in ("adapter_model", "trainable_params")),
    ]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        *names[:2],
        "tokenizer.json",
        names[2],
    ]
    load_adapter(base, tmp_path / "new")
    theirs = dict(nnx.to_flat_state(nnx.state(tuned)))
    for path, variable in nnx.to_flat_state(nnx.state(base)):
        assert jnp.array_equal(theirs[path][...], variable[...]), path
    assert main(["convert", "--model", str(tmp_path / "new"), "--output", str(tmp_path / "newer")]) == 2
    assert "adapter_model.safetensors already; it loads as it is" in capsys.readouterr().err


def test_an_adapter_that_is_in_safetensors_in_part(adapter, tmp_path):
    folder, _ = adapter
    shutil.copy(tmp_path / "plain" / "adapter_model.safetensors", folder)
    (folder / "config.json").write_text("{}")
    assert convert(ConvertConfig(model=folder, output=tmp_path / "new")) == ["adapter_model.bin"]
    files = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert "trainable_params.safetensors" in files and files["config.json"] == b"{}"
    for file in folder.glob("*.*"):
        if file.suffix in (".bin", ".safetensors") or file.name == "config.json":
            file.unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.bin"):
        convert(ConvertConfig(model=folder, output=tmp_path / "newer"))


def test_refused_folders(source, tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message):
            convert(ConvertConfig(model=source, output=tmp_path / "new"))
        assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())

    with pytest.raises(ValueError, match="max_shard_bytes must be >= 1, not 0"):
        ConvertConfig(model=source, output=tmp_path / "new", max_shard_bytes=0)
    names = split(source, tmp_path)
    shutil.copy(source / names[0], source / names[1])
    refused(ValueError, f"{names[0]} and in {names[1]}")
    (source / names[1]).unlink()
    refused(FileNotFoundError, f"names shards that do not exist: {names[1]}")
    (source / f"{BIN}.index.json").unlink()
    refused(FileNotFoundError, f"lacks {names[1]}")
    for name in (names[0], names[2]):
        (source / name).unlink()
    refused(FileNotFoundError, f"neither {BIN}, nor its shards, nor one .pth or .pt")
    (source / BIN).symlink_to(tmp_path / "plain" / "model.safetensors")
    refused(ValueError, "a link that leads out")
    (source / BIN).unlink()
    save_torch(source / BIN, tensors_of(tmp_path / "plain"))
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").symlink_to("/etc/hostname")
    refused(ValueError, "vocab.txt is a link that leads out")
    (source / "model.safetensors").write_bytes(b"")
    refused(ValueError, "model.safetensors already; it loads as it is")
    (source / "config.json").unlink()
    refused(FileNotFoundError, "has no config.json")
