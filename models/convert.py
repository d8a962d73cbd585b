"""A checkpoint or an adapter that torch.save wrote, in safetensors; nothing of it is unpickled."""

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path

import safetensors.numpy

from jsparse.checks import require_new_folder
from jsparse.hub import advise_download, model_folder, split_id
from jsparse.models.adapter_config import CONFIG, LONGLORA_WEIGHTS, WEIGHTS, pickled
from jsparse.models.companions import TEMPLATES_FOLDER, companions, copy_files
from jsparse.models.safetensors_folder import (
    INDEX,
    PICKLES,
    SINGLE,
    complete_set,
    inside,
    merged,
    read_index,
    read_indexed,
    write_tensors,
    written_whole,
)
from jsparse.models.torch_file import TorchTensor, read_torch_header, read_torch_tensor

_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ADAPTER = (WEIGHTS, LONGLORA_WEIGHTS)
_OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".msgpack", ".h5", ".ot", ".onnx", ".gguf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write in safetensors what torch.save wrote: a model's pytorch_model.bin or an adapter_model.bin.

    No code in the files can run: they are not unpickled.

    >>> ConvertConfig(model="old", output="new").max_shard_bytes
    5000000000
    """

    model: str | Path
    """A folder with config.json and pytorch_model.bin, its shards, or one .pth or .pt; or an adapter's, with
    adapter_config.json and adapter_model.bin, and LongLoRA's trainable_params.bin."""
    output: str | Path
    """A new folder."""
    max_shard_bytes: int = 5_000_000_000
    """The most that one file of the output holds, unless a single tensor is larger; adapters are one file."""

    def __post_init__(self):
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be >= 1, not {self.max_shard_bytes}")


def convert(config: ConvertConfig) -> list[str]:
    """Write the folder. Tensors keep names and dtypes; the other files are copied, and last the config.json,
    or the adapter_config.json of an adapter.

    - config: from where, and to where.

    Returns the names of what was not copied: other weights, hidden files, and folders other than
    additional_chat_templates.

    Raises FileNotFoundError for a folder without either, or without such weights; FileExistsError for an
    output that is not empty; ValueError for an id on the Hugging Face Hub, for weights that are safetensors
    already, and for files that hold anything but a state dict.
    """
    output = Path(config.output)
    require_new_folder(output)
    source = _local_folder(config.model)
    if is_adapter(source):
        return _convert_adapter(source, output)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is not a checkpoint folder: it has no config.json")
    tensors = _find(source)
    with written_whole(output, last="config.json") as staging:
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_tensors(staging, sizes, lambda name: read_torch_tensor(tensors[name]), config.max_shard_bytes)
        left = _copy_others(source, staging, {tensor.file.name for tensor in tensors.values()})
        return left + _copy_templates(source, output)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model, to convert."""
    folder = Path(folder)
    has_pickle = any((folder / pickled(name)).is_file() for name in _ADAPTER)
    return (folder / CONFIG).is_file() and (has_pickle or not (folder / "config.json").is_file())


def _convert_adapter(source: Path, output: Path) -> list[str]:
    names = [name for name in _ADAPTER if (source / pickled(name)).is_file() and not (source / name).exists()]
    if not names and (source / WEIGHTS).exists():
        raise ValueError(f"{source} has {WEIGHTS} already; it loads as it is")
    if not names:
        raise FileNotFoundError(f"{source} has no {pickled(WEIGHTS)}")
    headers = {name: read_torch_header(inside(source, pickled(name), ".bin")) for name in names}
    kept = {name for name in _ADAPTER if (source / name).is_file()}
    with written_whole(output, last=CONFIG) as staging:
        for name, tensors in headers.items():
            arrays = {tensor: read_torch_tensor(stored) for tensor, stored in tensors.items()}
            safetensors.numpy.save_file(arrays, staging / name, metadata={"format": "pt"})
        left = _copy_others(source, staging, {pickled(name) for name in names}, kept)
        return left + _copy_templates(source, output)


def _local_folder(model: str | Path) -> Path:
    given = split_id(model)
    if given is None:
        return model_folder(model)
    raise ValueError(
        f"model={model} is an id on the Hugging Face Hub, and pickled weights are never fetched from there; "
        f"{advise_download(*given)} does it, and then --model is FOLDER. A model that has safetensors loads "
        "by its id as it is"
    )


def _find(source: Path) -> dict[str, TorchTensor]:
    existing = [name for name in (SINGLE, INDEX) if (source / name).exists()]
    if existing:
        raise ValueError(f"{source} has {existing[0]} already; it loads as it is")
    if (source / _INDEX).is_file() and (source / _SINGLE).is_file():
        raise ValueError(f"{source} has both {_SINGLE} and {_INDEX}; remove the one that is out of date")
    if (source / _INDEX).is_file():
        index = source / _INDEX
        return read_indexed(source, index, read_index(index), ".bin", read_torch_header)
    if (source / _SINGLE).is_file():
        return read_torch_header(inside(source, _SINGLE, ".bin"))
    shards = complete_set(source, "pytorch_model", ".bin")
    if shards:
        return merged((inside(source, name, ".bin") for name in shards), read_torch_header)
    others = sorted(file.name for file in source.iterdir() if file.suffix in PICKLES)
    if len(others) == 1:
        return read_torch_header(inside(source, others[0], Path(others[0]).suffix))
    found = f"; which of {', '.join(others)} is meant is not clear" if others else ""
    raise FileNotFoundError(f"{source} has neither {_SINGLE}, nor its shards, nor one .pth or .pt{found}")


def _copy_others(source: Path, staging: Path, converted: set[str], kept: Collection[str] = ()) -> list[str]:
    """Copy all files but those converted, and weights only if ``kept``; returns the names of what is left.

    Folders are left, but of additional_chat_templates nothing is said here.
    """
    left = []
    for file in sorted(source.iterdir()):
        if file.name in (_INDEX, TEMPLATES_FOLDER, *converted):
            continue
        is_other = file.suffix in _OTHER_WEIGHTS and file.name not in kept
        if not file.is_file() or is_other or file.name.startswith("."):
            left.append(file.name)
        else:
            shutil.copyfile(inside(source, file.name, ""), staging / file.name)
    return left


def _copy_templates(source: Path, output: Path) -> list[str]:
    """Copy additional_chat_templates; returns the names of what in it is left."""
    folder = source / TEMPLATES_FOLDER
    files = companions(source, (f"{TEMPLATES_FOLDER}/*",))
    copy_files({name: inside(folder, file.name, "") for name, file in files.items()}, output)
    found = [file.relative_to(source).as_posix() for file in folder.rglob("*") if not file.is_dir()]
    return sorted(set(found).difference(files))
