"""Tensors in files of ``torch.save``, read without unpickling.

Such a file is a zip archive: the bytes of each storage, and a pickle that says which tensors lie where. A
pickle is a program, and Python's own machine for it imports and calls what the program names. The machine
here has only the instructions that a state dict needs. It imports nothing: a name is compared with those in
the tables below and is otherwise refused, and the three functions that may be called are written here.
"""

import contextlib
import dataclasses
import math
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jsparse.models.safetensors_folder import not_weights

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in _STORAGES),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS_AND_TEXT = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_MAX_PICKLE_BYTES = 1 << 24  # a hundred bytes per tensor are usual
_MAX_DIMENSIONS = 8
_MAX_SHARING = 4  # tied weights share a storage; a file of many more would fill the disk
_MARK = object()


class _Global(NamedTuple):
    """A name in the pickle. Nothing is imported."""

    name: str


class _Storage(NamedTuple):
    member: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """Where a tensor lies: from ``offset`` in a storage on, with a stride per dimension, all in elements."""

    file: Path
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    @property
    def extent(self) -> int:
        """How many elements of the storage lie from the first to the last of the tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


def read_torch_header(file: Path) -> dict[str, TorchTensor]:
    """The tensors of a state dict by name.

    Raises ValueError for a file that is not an archive of ``torch.save``, for anything in its pickle that a
    state dict does not need, and for tensors that reach out of their storages.
    """
    members = _members(file)
    folder = _folder_of(file, members)
    order = members.get(f"{folder}/byteorder")
    if order is not None and _read_small(file, order) != b"little":
        raise ValueError(f"{file} is not little-endian; save it again on a usual machine")
    program = _read_small(file, members[f"{folder}/data.pkl"])
    try:
        tensors = _run(program, file, folder)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is refused: {error}") from error
    available = file.stat().st_size
    for name, tensor in tensors.items():
        info = members.get(tensor.storage.member)
        size = tensor.storage.count * tensor.storage.dtype.itemsize
        if info is None or info.file_size != size or size > available or not _is_stored(info):
            raise ValueError(f"{file} is damaged: {name} needs {size} plain bytes in {tensor.storage.member}")
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_SHARING * available:
        raise ValueError(f"{file} is refused: its tensors repeat {available} bytes until they are {total}")
    return tensors


def read_torch_tensor(tensor: TorchTensor) -> np.ndarray:
    """The values, contiguous; only this tensor's part of a shared storage is read."""
    dtype = tensor.storage.dtype
    data = _read(
        tensor.file, tensor.storage.member, tensor.offset * dtype.itemsize, tensor.extent * dtype.itemsize
    )
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    with _damage_named(tensor.file):
        flat = np.frombuffer(data, dtype, tensor.extent)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False).copy(order="C")


def _members(file) -> dict[str, zipfile.ZipInfo]:
    """What the archive lists, by name."""
    with file.open("rb") as stream, _damage_named(file):
        try:
            return {info.filename: info for info in zipfile.ZipFile(stream).infolist()}
        except zipfile.BadZipFile as error:
            raise ValueError(_not_an_archive(file)) from error


def _read(file, member, start=0, size=-1) -> bytes:
    """Bytes of a member, by default all."""
    with file.open("rb") as stream, _damage_named(file), zipfile.ZipFile(stream).open(member) as opened:
        opened.seek(start)
        return opened.read(size)


@contextlib.contextmanager
def _damage_named(file) -> Iterator[None]:
    """ValueError that names the file, for whatever else zipfile and NumPy raise over one that is damaged."""
    try:
        yield
    except (ValueError, OSError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile) as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file} cannot be read: {error or 'it is cut short'}") from error


def _folder_of(file, members) -> str:
    """The folder inside the archive, which torch.save names after the file."""
    folders = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise ValueError(f"{file} is a zip archive, but not one of torch.save: it has no data.pkl")
    return folders[0]


def _is_stored(info) -> bool:
    is_encrypted = info.flag_bits & 1
    return info.compress_type == zipfile.ZIP_STORED and not is_encrypted


def _read_small(file, info) -> bytes:
    if not _is_stored(info) or info.file_size > _MAX_PICKLE_BYTES:
        raise ValueError(
            f"{file} is refused: {info.filename} has {info.file_size} bytes, or is compressed; torch.save "
            f"writes at most {_MAX_PICKLE_BYTES} plain ones for a state dict"
        )
    return _read(file, info.filename)


def _not_an_archive(file) -> str:
    with file.open("rb") as stream:
        if stream.read(1) == b"\x80":
            return (
                f"{file} is a pickle without an archive, as torch before 1.6 wrote it; with a newer torch, "
                "torch.save(torch.load(file, weights_only=True), file) writes an archive"
            )
    return not_weights(file, "file of torch.save")


# The machine. Each value is a constant, a list, a tuple, a dict, or one of the classes above.


def _run(program: bytes, file: Path, folder: str) -> dict[str, TorchTensor]:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NUMBERS_AND_TEXT:
            stack.append(argument)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(_to_mark(stack)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _to_mark(stack)
            _set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else _to_mark(stack)
            _require(stack[-1], list, "a list to append to").extend(items)
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(f"{module} {attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), folder))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, _require(arguments, tuple, "arguments"), file))
        elif name == "BUILD":
            # torch gives a state dict versions of its modules, which say nothing of the tensors.
            state = _require(stack.pop(), dict, "attributes")
            if set(state) != {"_metadata"} or not isinstance(stack[-1], dict):
                raise ValueError("it sets attributes other than _metadata")
        elif name == "STOP":
            return _state_dict(stack)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the instruction {name}, which a state dict does not need")
    raise ValueError("its pickle does not end")


def _to_mark(stack) -> list[Any]:
    """The values above the last mark, taken off with it."""
    at = len(stack) - 1
    while stack[at] is not _MARK:  # an IndexError below the first value
        at -= 1
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _set_items(target, items):
    target = _require(target, dict, "a dict to set items of")
    if len(items) % 2:
        raise ValueError("a dict has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if _require(key, str, "a key") in target:
            raise ValueError(f"{key[:100]!r} is there twice")
        target[key] = value


def _global(name) -> _Global:
    if name not in _GLOBALS:
        raise ValueError(
            f"it asks for {name[:100]!r}, which a state dict does not need and which could run code"
        )
    return _Global(name)


def _storage(reference, folder) -> _Storage:
    kind, storage, key, _, count = _require(reference, tuple, "a storage")
    storage = _require(storage, _Global, "a storage's class").name.removeprefix("torch ")
    if kind != "storage" or storage not in _STORAGES:
        raise ValueError("it refers to something outside that is no storage")
    member = f"{folder}/data/{_require(key, str, 'the name of a storage')}"
    return _Storage(member, np.dtype(_STORAGES[storage]), _size(count))


def _call(function, arguments, file):
    name = _require(function, _Global, "a function").name
    if name == "collections OrderedDict" and not arguments:
        return {}
    if name == "torch._utils _rebuild_parameter" and len(arguments) == 3:
        return _require(arguments[0], TorchTensor, "a parameter")
    if name == "torch._utils _rebuild_tensor_v2" and len(arguments) in (6, 7):
        if len(arguments) == 7 and arguments[6]:
            raise ValueError(
                "a tensor is stored negated or conjugated; save it with .resolve_neg().resolve_conj()"
            )
        return _tensor(file, *arguments[:4])
    raise ValueError(f"it calls {name!r} with {len(arguments)} arguments")


def _tensor(file, storage, offset, shape, strides) -> TorchTensor:
    storage = _require(storage, _Storage, "a storage")
    shape = tuple(_size(n) for n in _require(shape, tuple, "a shape"))
    strides = tuple(_size(n) for n in _require(strides, tuple, "strides"))
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    tensor = TorchTensor(file, storage, _size(offset), shape, strides)
    # An expanded tensor repeats its elements, and could ask for any amount of memory.
    if tensor.offset + tensor.extent <= storage.count < math.prod(shape):
        raise ValueError(
            f"a tensor of shape {list(shape)} repeats the {storage.count} elements of its storage; save "
            "it with .contiguous()"
        )
    if max(tensor.offset + tensor.extent, math.prod(shape)) > storage.count:
        raise ValueError(
            f"a tensor of shape {list(shape)}, strides {list(strides)} and offset {tensor.offset} reaches "
            f"out of its storage of {storage.count}"
        )
    return tensor


def _size(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError("a size is not an integer from 0 to 2**62")
    return value


def _require(value, kind, what):
    if not isinstance(value, kind):
        raise ValueError(f"{what} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def _state_dict(stack) -> dict[str, TorchTensor]:
    if len(stack) != 1:
        raise ValueError("its pickle leaves values over")
    tensors = _require(stack[0], dict, "what it holds")
    for name, tensor in tensors.items():
        if not isinstance(tensor, TorchTensor):
            raise ValueError(
                f"{name[:100]!r} is of type {type(tensor).__name__}, not a tensor; save the state dict alone"
            )
    return tensors
