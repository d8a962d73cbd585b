"""A folder of safetensors: one file, or shards. Headers are checked before tensors are read."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jsparse.files import parse_json_object, pointer_hint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# NumPy lacks these, so safetensors does not read them as NumPy's arrays.
_FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@contextlib.contextmanager
def written_whole(directory: Path, *, last: str) -> Iterator[Path]:
    """A folder to write files into, which are flushed and moved into ``directory`` when the block ends.

    Weights go first. The file called ``last``, which makes the folder complete, goes last. A crash, or an
    error in the block, leaves what was there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = directory / ".saving"
    shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
    staging.mkdir()
    try:
        yield staging
        new = sorted(staging.iterdir(), key=lambda file: (file.name == last, file.suffix != ".safetensors"))
        for file in new:
            shutil.copymode(staging / last, file)  # safetensors makes its files private
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        for file in new:
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    name: str
    dtype: str  # safetensors' name: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    start: int  # of its bytes in the file


@runtime_checkable
class _InFile(Protocol):
    @property
    def file(self) -> Path: ...


Tensor = TypeVar("Tensor", bound=_InFile)  # StoredTensor, or what another kind of file has


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from the headers alone.

    They are in ``model.safetensors``, in the shards that an index names, or in a complete set of shards
    ``model-00001-of-00002.safetensors`` and so on without one. An index beside ``model.safetensors`` may
    name that file only: nobody can know which of two sets of weights is meant. (transformers takes the
    single file and does not look at the index.)

    Raises FileNotFoundError for no weights, pickled weights (they are never opened), links that lead nowhere
    and missing shards; ValueError for two sets of weights, file names that lead out of the folder, a name
    that is there twice, and an index that disagrees with its shards.
    """
    single, index = directory / SINGLE, directory / INDEX
    if index.exists():
        weight_map = read_index(index)
        if single.exists() and set(weight_map.values()) != {SINGLE}:
            raise ValueError(
                f"{directory} has {SINGLE}, and {INDEX} names other files; remove the one that is out of date"
            )
        return read_indexed(directory, index, weight_map, ".safetensors", read_header)
    if single.exists():
        return read_header(inside(directory, SINGLE))
    lost = sorted(path.name for path in directory.glob("*.safetensors") if not path.exists())
    if lost:
        raise FileNotFoundError(
            f"{directory}: {lost[0]} is a link to a file that does not exist; download it again"
        )
    shards = complete_set(directory, "model", ".safetensors")
    if shards:
        return merged((inside(directory, name) for name in shards), read_header)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise FileNotFoundError(
            f"{directory} has weights only as pickle files ({', '.join(pickles)}), which can run code and "
            f"are not opened here; jsparse convert --model {directory} --output NEW_FOLDER writes safetensors"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"; it has {', '.join(others)}, which are not names of a model's weights" if others else ""
    raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}{found}")


def complete_set(directory: Path, stem: str, suffix: str) -> list[str]:
    """The names ``stem-00001-of-00003suffix`` and so on, if any is there.

    Raises FileNotFoundError unless all are, ValueError if some are of another set.
    """
    pattern = re.compile(rf"{re.escape(stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
    found = sorted(file.name for file in directory.iterdir() if pattern.fullmatch(file.name))
    totals = sorted({name.removesuffix(suffix)[-5:] for name in found})
    names = [f"{stem}-{i:05d}-of-{total}{suffix}" for total in totals[:1] for i in range(1, int(total) + 1)]
    strangers = sorted(set(found) - set(names))
    if strangers:
        raise ValueError(f"{directory} has shards of several sets: {found[0]}, {strangers[0]}; keep one set")
    missing = [name for name in names if name not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{directory} has shards without an index and not all of them: it lacks {shown}; "
            "download it again"
        )
    return names


def merged(files: Iterable[Path], read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files, by name; ValueError for a name in two of them."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        header = read(file)
        twice = next((tensor for tensor in header if tensor in tensors), None)
        if twice is not None:
            raise ValueError(
                f"{twice} is in {tensors[twice].file} and in {file.name}, so they are not shards of one model"
            )
        tensors |= header
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index gives it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    return weight_map


def read_indexed(
    directory: Path,
    index: Path,
    weight_map: Mapping[str, str],
    suffix: str,
    read: Callable[[Path], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors of the files that an index names; ValueError where it disagrees with them."""
    files = {name: inside(directory, name, suffix) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names shards that do not exist: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    problems = []
    for name, path in files.items():
        for tensor, stored in read(path).items():
            if tensor in tensors:
                problems.append(f"{tensor} is in {tensors[tensor].file.name} and in {name}")
            elif weight_map.get(tensor) != name:
                problems.append(f"{tensor} is in {name}, not in {weight_map.get(tensor, 'the index')}")
            tensors[tensor] = stored
    problems += [f"{tensor} is not in {weight_map[tensor]}" for tensor in weight_map if tensor not in tensors]
    if problems:
        raise ValueError(f"{index} disagrees with the shards: {'; '.join(problems)}")
    return tensors


def inside(directory: Path, name: str, suffix: str = ".safetensors") -> Path:
    """The path of a file that the checkpoint names, if it stays in the checkpoint.

    A link may lead to another file of the folder, or to where the Hugging Face cache keeps its files:
    ``<repository>/snapshots/<revision>/<file>``, or a file in a folder there, links to
    ``<repository>/blobs``.
    """
    if name != os.path.basename(name) or "\\" in name or not name.endswith(suffix):
        raise ValueError(f"{name!r} is not the name of a {suffix} file in {directory}; paths are not allowed")
    path = directory / name
    home = directory.resolve()
    snapshots = [folder.parent for folder in (home, home.parent) if folder.parent.name == "snapshots"]
    allowed = [home, *(folder.parent / "blobs" for folder in snapshots)]
    if path.is_symlink() and path.resolve().parent not in allowed:
        raise ValueError(
            f"{path} is a link that leads out of the checkpoint, to {path.resolve()}; that is not allowed"
        )
    return path


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes in a safetensors file. Unlike the library, refuses duplicate names."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(not_weights(file, "safetensors file"))
        header = _parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    begin = 8 + length
    try:
        tensors = {
            name: StoredTensor(
                file,
                name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                begin + int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
        }
        end = begin + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} has a malformed safetensors header: {error!r}") from error
    if end > size:
        raise ValueError(f"{file} is cut short: it has {size} of {end} bytes; download it again")
    return tensors


def not_weights(file: Path, kind: str) -> str:
    """What to say of a file that is no weights: what it seems to be, and what to do."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(200).lstrip()
    if hint := pointer_hint(start):
        return f"{file} has no weights: {hint}"
    if start[:1] == b"<":
        return f"{file} is a web page, not the weights; download the file itself again"
    return f"{file} is not a {kind}, or is cut short at {size} bytes; download it again"


def read_tensor(stored: StoredTensor) -> np.ndarray:
    """The values of a tensor; ValueError if the file turns out to be damaged."""
    try:
        with safetensors.safe_open(stored.file, framework="numpy") as opened:  # which checks the whole header
            if stored.dtype not in _FLOAT8:
                return opened.get_tensor(stored.name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{stored.file} cannot be read: {error}") from error
    count, dtype = math.prod(stored.shape), np.dtype(_FLOAT8[stored.dtype])
    return np.fromfile(stored.file, dtype, count, offset=stored.start).reshape(stored.shape)


def write_tensors(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Write ``model.safetensors``, or an index and shards of at most ``max_shard_bytes``.

    A shard may be larger if it holds a single tensor.

    - sizes: bytes of each tensor, by name.
    - read: the tensor of a name; those of one shard are in memory together.
    """
    shards = _plan_shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {name: read(name) for name in names}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(sizes.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(sizes, max_shard_bytes):
    shards, free = [[]], max_shard_bytes
    for name, size in sizes.items():
        if size > free and shards[-1]:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= size
    return shards


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file as transformers does, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is not one, or has a key twice."""
    return _parse_json(file.read_bytes(), file)


def _parse_json(text, file):
    def refuse_duplicates(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"keys are there twice: {', '.join(twice)}")
        return dict(pairs)

    return parse_json_object(text, file, refuse_duplicates)
