"""Whose run an output folder holds: a new one, this one interrupted, or another."""

import hashlib
from pathlib import Path

from jsparse.train.checkpoint import open_checkpoints
from jsparse.train.config import FinetuneConfig
from jsparse.train.data import Windows

METRICS = "metrics.jsonl"
# What defines a run beside its model, its data and its schedule: other values give other weights.
_FIELDS = (
    "context",
    "attention",
    "lora_rank",
    "lora_alpha",
    "train_embeddings_and_norms",
    "dtype",
    "batch_size",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
)


def checkpoint_folder(config: FinetuneConfig) -> Path:
    return config.output_folder / "checkpoints"


def describe_run(config: FinetuneConfig, windows: Windows) -> dict:
    """What two runs must share to be the same, as JSON: settings, and SHA-256 of the base model and of the
    data.

    Names of files do not count, only what is in them. Nor does the number of steps, as long as no schedule
    depends on it: a run can be made longer.
    """
    described = {field: getattr(config, field) for field in _FIELDS}
    described["group_size"] = config.shifted_group_size
    described["schedule"] = (
        f"cosine to step {config.steps}" if config.schedule == "cosine" else config.schedule
    )
    described["model"] = _digest_model(config.model_folder)
    described["data"] = windows.digest()
    return described


def steps_taken(config: FinetuneConfig, run: dict) -> int:
    """How far the run in ``config.output`` has come: 0 for a new one. Changes nothing on disk.

    Raises ValueError or FileExistsError where ``config.output`` cannot be this run's.
    """
    output, model = config.output_folder.resolve(), config.model_folder.resolve()
    if output == model or model in output.parents:
        raise ValueError(
            f"output={config.output} must not lie in the folder of the model that is read, {config.model}"
        )
    if not output.exists():
        return 0
    if not output.is_dir():
        raise FileExistsError(f"output={config.output} is a file; it must be a folder, or not exist")

    step = _read_step(config, run)
    # A run that stopped before its first checkpoint leaves its metrics only, and starts again.
    others = sorted({file.name for file in output.iterdir()} - {METRICS, checkpoint_folder(config).name})
    if step == 0 and others:
        raise FileExistsError(
            f"output={config.output} has other files ({', '.join(others[:3])}) and no checkpoints of this "
            "run; choose a new folder"
        )
    if step > config.steps:
        raise ValueError(
            f"steps={config.steps}, but {checkpoint_folder(config)} has come to step {step} already"
        )
    return step


def _read_step(config: FinetuneConfig, run: dict) -> int:
    folder = checkpoint_folder(config)
    if not folder.is_dir():
        return 0
    with open_checkpoints(folder, writable=False) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return 0
        theirs = checkpoints.read_run(step)
    different = [_difference(name, run, theirs) for name in run | theirs if run.get(name) != theirs.get(name)]
    if different:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(different)}. "
            "Choose a new output folder, or the settings of that run"
        )
    return step


def _difference(name: str, run: dict, theirs: dict) -> str:
    if name in ("model", "data"):
        return f"its {name} had other content"
    return f"its {name} is {theirs.get(name)!r}, here {run.get(name)!r}"


def _digest_model(folder: Path) -> str:
    sha = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            sha.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()
