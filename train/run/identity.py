"""Which run an output folder holds: a new one, this one interrupted, or another."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jsparse.checks import require_new_folder
from jsparse.hub import pinned_model, split_id
from jsparse.models import LlamaConfig
from jsparse.models.patterns import AttentionPattern
from jsparse.train.config import FinetuneConfig
from jsparse.train.config_checks import OF_LORA
from jsparse.train.run.checkpoint import open_checkpoints

METRICS = "metrics.jsonl"
DATA = "data"
SETTINGS = "run.yaml"
# What a run may find in its folder when it starts over: it wrote these before its first checkpoint.
_STARTED = (METRICS, DATA, SETTINGS, "loggers.json", "tensorboard", "wandb", "mlflow")
# What defines a run besides its model, its data and its schedule: other values give other weights.
_READING = ("fields", "loss_on", "bad_rows", "too_long")
_FIELDS = (
    *_READING,
    "context",
    "lora_rank",
    *OF_LORA,
    "base_bits",
    "dtype",
    "batch_size",
    "micro_batches",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "dpo_beta",
    "seed",
)


def checkpoint_folder(output: Path) -> Path:
    return output / "checkpoints"


def with_commit(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with the commit of a model that is given by its id, and as they are for a folder.

    ``org/name`` means the commit that the run in ``config.output`` began with, whatever the repository's main
    branch is now. Without such a run it means today's, as ``org/name@branch`` always does.
    """
    given = split_id(config.model)
    if given is None:
        return config
    began = split_id(_recorded(config.output_folder).get("config", {}).get("model", ""))
    if began is not None and given == (began[0], None):
        return dataclasses.replace(config, model="@".join(map(str, began)))
    return dataclasses.replace(config, model=pinned_model(config.model))


def has_held_out(output: Path) -> bool:
    """Whether the run in ``output`` has come to a checkpoint with held-out data."""
    return _recorded(output).get("eval_data") is not None


def _recorded(output: Path) -> dict[str, Any]:
    """The description of the run that the last checkpoint in ``output`` has; empty without one."""
    folder = checkpoint_folder(output)
    if not folder.is_dir():
        return {}
    with open_checkpoints(folder, writable=False) as checkpoints:
        step = checkpoints.latest_step()
        return {} if step is None else checkpoints.read_run(step)


def describe_run(
    config: FinetuneConfig,
    data_digest: str,
    model: LlamaConfig,
    pattern: AttentionPattern,
    *,
    eval_digest: str | None = None,
) -> dict[str, Any]:
    """What two runs must share to be the same, as JSON; and under "config", all that was asked for.

    They must share the settings, the RoPE and the attention pattern in full, and the SHA-256 of the base
    model and of the data. Names of files do not count, only their content. Nor does the number of steps, as
    long as no schedule depends on it: a run can be made longer. Nor does the mesh: a run can resume on other
    devices, where sums are rounded differently. Held-out data change no weight, so a run may get them later;
    but not others, whose losses could not be compared. While ``config`` has epochs or a warmup_ratio, which
    ``FinetuneConfig.for_windows`` turns into steps, what depends on the steps is left out.
    """
    described = {field: getattr(config, field) for field in _FIELDS}
    described["schedule"] = (
        config.schedule
        if config.schedule == "constant"
        else f"{config.schedule} to step {config.total_steps}"
    )
    described["warmup_steps"] = config.warmup
    for name in _unknown(config):
        del described[name]
    described["rope"] = model.to_hf()["rope_parameters"]
    described["attention"] = json.loads(pattern.to_json())
    described["model"] = digest_model(config.model_folder)
    described["data"] = data_digest
    described["eval_data"] = eval_digest
    described["config"] = dataclasses.asdict(config)
    return json.loads(json.dumps(described, default=str))  # tuples become lists and paths text, as when read


def steps_taken(config: FinetuneConfig, run: dict) -> int:
    """How many steps the run in ``config.output`` has taken: 0 for a new one. Changes nothing on disk.

    Raises ValueError or FileExistsError if ``config.output`` cannot be this run's.
    """
    output, model = config.output_folder.resolve(), config.model_folder.resolve()
    if output == model or model in output.parents:
        raise ValueError(
            f"output={config.output} must not lie in the folder of the model that is read, {config.model}"
        )
    steps = config.total_steps if config.epochs is None else None
    return steps_in(config.output_folder, steps, run, unknown=_unknown(config))


def steps_in(output: Path, steps: int | None, run: dict, *, unknown: tuple[str, ...] = ()) -> int:
    """As :func:`steps_taken`, for any run of ``steps`` steps in ``output``; None if they are not known yet.

    - unknown: what ``run`` does not say yet.
    """
    folder = checkpoint_folder(output)
    step = _read_step(folder, run, unknown)
    if step == 0:
        # A run that stopped before its first checkpoint starts over.
        require_new_folder(output, allowed=(*_STARTED, folder.name))
    if steps is not None and step > steps:
        raise ValueError(f"steps={steps}, but {folder} has come to step {step} already")
    return step


def metrics_until(output: Path, step: int) -> list[dict]:
    """The lines of an interrupted run's metrics.jsonl up to a step; those after it will be written again."""
    path = output / METRICS
    lines = path.read_text(encoding="utf-8").splitlines()[:step] if path.is_file() else []
    return [line for line in map(json.loads, lines) if line["step"] <= step]


def _unknown(config: FinetuneConfig) -> tuple[str, ...]:
    """What depends on a number of steps that follows from the windows."""
    if config.epochs is not None:
        return ("schedule",) if config.warmup_ratio is None else ("schedule", "warmup_steps")
    return () if config.warmup_ratio is None else ("warmup_steps",)


def _read_step(folder: Path, run: dict, unknown: tuple[str, ...]) -> int:
    if not folder.is_dir():
        return 0
    with open_checkpoints(folder, writable=False) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return 0
        theirs = checkpoints.read_run(step)
    theirs = {name: value for name, value in _defaults().items() if name in run} | theirs
    not_compared = ["config", "position", "form", *unknown]
    if theirs.get("eval_data") is None:  # none so far
        not_compared.append("eval_data")
    shared = [name for name in run | theirs if name not in not_compared]
    names = [name for name in shared if run.get(name) != theirs.get(name)]
    if set(names) & {"context", *_READING}:  # the digest of the data covers how they become windows
        names = [name for name in names if name not in ("data", "eval_data")]
    different = [_difference(name, run, theirs) for name in names]
    if different:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(different)}. "
            "Choose a new output folder, or the settings of that run"
        )
    return step


def _defaults() -> dict[str, Any]:
    """The settings that a run was started with, if it did not know them yet, as JSON."""
    fields = [field for field in dataclasses.fields(FinetuneConfig) if field.name in _FIELDS]
    factories = {f.name: f.default_factory() for f in fields if callable(f.default_factory)}
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return json.loads(json.dumps(plain | factories))


def _difference(name: str, run: dict, theirs: dict) -> str:
    if name in ("model", "data"):
        before, now = (one["config"].get("model") for one in (theirs, run))
        names = f" ({before}, here {now})" if name == "model" and before != now else ""
        return f"its {name} had other content{names}"
    if name == "eval_data":
        return "its eval_data had other content" if run.get(name) else "it had eval_data, here there are none"
    if name == "attention":
        return f"its attention was {_kind(theirs)}, here {_kind(run)}"
    return f"its {name} is {theirs.get(name)!r}, here {run.get(name)!r}"


def _kind(run: dict) -> str:
    """The pattern in short: its kind, and the rules that its heads follow."""
    pattern = run.get("attention") or {}
    return f"{pattern.get('kind')} with rules {json.dumps(pattern.get('rules'))}"


def digest_model(folder: Path) -> str:
    """SHA-256 of a model's config and weights."""
    sha = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            sha.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()
