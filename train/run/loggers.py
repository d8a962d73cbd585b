"""TensorBoard, Weights & Biases and MLflow: the numbers of metrics.jsonl, through their own packages."""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from jsparse.extras import require_extra
from jsparse.train.run.evaluations import BEFORE, EVAL
from jsparse.train.run.identity import METRICS, metrics_until
from jsparse.train.run.processes import is_first_process

# By service: the id of the run there, how it has ended and, if lines are missing, the last before them.
_RUNS = "loggers.json"
End: TypeAlias = Literal["finished", "interrupted", "failed"]


class _Service(NamedTuple):
    """A service that takes numbers: its run's id, ``send(step, numbers)`` and ``close(how)``."""

    run: str
    send: Callable[[int, Mapping[str, float | int]], None]
    close: Callable[[End], None]


class Loggers(NamedTuple):
    """``log(line)`` sends a line of metrics.jsonl to all services, and ``log(line, late=True)`` what is new
    of a step that they have. ``stopped()`` says that a signal has ended the run.
    """

    log: Callable[..., None]
    stopped: Callable[[], None]


def require_loggers(services: Sequence[str]) -> None:
    """Raise MissingExtra, which says what to install, for a service whose package is not there."""
    for service in services:
        require_extra(service, service, f"log_to={service} needs the package {service}")


@contextlib.contextmanager
def loggers_open(
    services: Sequence[str],
    output: Path,
    settings: Mapping[str, Any],
    *,
    start: int,
    steps: int,
    quiet: bool,
) -> Iterator[Loggers]:
    """Within this context, services take the lines of metrics.jsonl. They then know how the run has ended.

    A run is interrupted by a signal, or by Ctrl-C as an error, and failed by any other error. What went to a
    service before ``start`` is gone on with: the same run there, and no step twice. Lines that it does not
    have yet come first. Only the first of several processes logs.

    - services: any of "tensorboard", "wandb" and "mlflow".
    - output: the folder of the run. Its metrics.jsonl must still have the lines after ``start``.
    - settings: of the run, which the services show beside it.
    - start: how many steps were taken earlier; at 0 the services begin anew.
    - steps: of the whole run. Once it has finished, a service that has every line is not opened.
    - quiet: print nothing.

    Raises ValueError, saying what to do, for a service that does not start. One that fails later gets no more
    lines in this call, with a note: training goes on.
    """
    if not is_first_process() or not (services or (output / _RUNS).exists()):
        yield Loggers(lambda line, late=False: None, lambda: None)
        return
    earlier, reached = metrics_until(output, start), _last_step(output)
    runs = json.loads((output / _RUNS).read_text()) if start and (output / _RUNS).is_file() else {}
    for run in runs.values():
        run.setdefault("until", reached)
    after = {service: runs[service]["until"] if service in runs else -1 for service in services}
    taking: dict[str, _Service] = {}

    def log(line: Mapping[str, Any], late: bool = False) -> None:
        for step, numbers in points(line):
            for name, service in list(taking.items()):
                if step <= after[name] and not late:
                    continue
                try:
                    service.send(step, numbers)
                except Exception as error:  # whatever its package raises: a run outlives its log
                    _note(f"{name} takes no lines from step {step} on, {METRICS} does: {_one_line(error)}")
                    runs[name]["until"] = step - 1
                    _write(output, runs)
                    _close(name, taking.pop(name), "failed")

    end: End = "failed"
    was_stopped = False

    def stopped() -> None:
        nonlocal was_stopped
        was_stopped = True

    try:
        for name in services:
            has_finished = runs.get(name, {}).get("ended") == "finished"
            if start >= steps and after[name] >= start and has_finished:
                continue
            try:
                taking[name] = _OPEN[name](output, settings, runs.get(name, {}).get("run"), quiet)
            except Exception as error:
                why = f"log_to={name} does not start: {_one_line(error)}; {_ADVICE[name]}"
                raise ValueError(why) from error
        runs |= {name: {"run": service.run} for name, service in taking.items()}
        for line in earlier:
            log(line)
        _write(output, runs)
        yield Loggers(log, stopped)
        end = "interrupted" if was_stopped else "finished"
    except KeyboardInterrupt:
        end = "interrupted"
        raise
    finally:
        for name, service in taking.items():
            if _close(name, service, end) and name in runs:
                runs[name]["ended"] = end
                _write(output, runs)


def _write(output: Path, runs: Mapping[str, Any]) -> None:
    (output / _RUNS).write_text(json.dumps(runs) + "\n", encoding="utf-8")


def _note(text: str) -> None:
    logging.getLogger("jsparse").warning("note: %s", text)


def _close(name: str, service: _Service, end: End) -> bool:
    """Whether the service knows now how the run has ended."""
    try:
        service.close(end)
    except Exception as error:
        _note(f"{name} was not closed: {_one_line(error)}")
        return False
    return True


def points(line: Mapping[str, Any]) -> list[tuple[int, dict[str, float | int]]]:
    """What a line of metrics.jsonl is to the services: numbers by their names, each group at its step.

    They are named so that the pages of the services draw one section of curves for the training and one for
    the held-out data, and that a held-out curve begins where the run does, at step 0.

    >>> points({"step": 1, "loss": 3.0, "eval_before": {"loss": 2.5}})
    [(0, {'eval/loss': 2.5}), (1, {'train/loss': 3.0})]
    """
    rest = dict(line)
    step, before, held_out = int(rest.pop("step")), rest.pop(BEFORE, {}), rest.pop(EVAL, {})
    named = [(0, {EVAL: before}), (step, {"train": rest, EVAL: held_out})]
    return [(at, numbers) for at, groups in named if (numbers := flat_numbers(groups))]


def flat_numbers(line: Mapping[str, Any], above: str = "") -> dict[str, float | int]:
    """The numbers of a line by their names, with slashes between those of nested ones; null is left out.

    >>> flat_numbers({"step": 3, "loss": None, "eval": {"documents": {"loss": 2.5}}})
    {'step': 3, 'eval/documents/loss': 2.5}
    """
    found = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            found[f"{above}{name}"] = value
    return found


def _last_step(output: Path) -> int:
    """The last step that metrics.jsonl has a whole line of, and so the last that was logged."""
    path = output / METRICS
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        with contextlib.suppress(json.JSONDecodeError):  # torn, as a crash leaves it
            return json.loads(line)["step"]
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- the services: each opens the run with the id that it gave earlier, or a new one ---


def _open_tensorboard(output: Path, settings: Mapping[str, Any], run: str | None, quiet: bool) -> _Service:
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore  # as the others, only with an extra
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # type: ignore
    from tensorboard.summary import Writer  # type: ignore
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore

    folder = output / "tensorboard"
    if run is None and folder.exists():
        shutil.rmtree(folder)  # of a run that starts over
    if run is None:
        page = EventFileWriter(str(folder))  # the tab HPARAMS, which Writer knows nothing of
        page.add_event(Event(wall_time=time.time(), summary=hparams_pb(_plain(settings))))
        page.close()
    writer = Writer(str(folder))

    def send(step: int, numbers: Mapping[str, float | int]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # after a crash it has every line that metrics.jsonl has

    return _Service("tensorboard", send, lambda end: writer.close())


def _open_wandb(output: Path, settings: Mapping[str, Any], run: str | None, quiet: bool) -> _Service:
    import wandb  # type: ignore

    ours = wandb.Settings(console="off")  # leaves the progress bar alone
    if quiet:
        ours.silent = True
    opened = wandb.init(
        dir=output,
        id=run,
        resume="allow",
        reinit="create_new",  # beside a run that the caller may have open
        project=os.environ.get("WANDB_PROJECT", "jsparse"),
        name=os.environ.get("WANDB_NAME", output.absolute().name),
        config=dict(settings),
        settings=ours,
    )
    return _Service(
        opened.id,
        lambda step, numbers: opened.log(dict(numbers), step=step),
        lambda end: opened.finish(exit_code=_EXIT_CODES[end]),
    )


def _open_mlflow(output: Path, settings: Mapping[str, Any], run: str | None, quiet: bool) -> _Service:
    import mlflow  # type: ignore
    from mlflow.entities import Metric, Param  # type: ignore
    from mlflow.tracking.context.registry import resolve_tags  # type: ignore

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # tells of each table it makes
    local = output.absolute() / "mlflow"
    uri, artifacts = f"sqlite:///{local / 'mlflow.db'}", local.as_uri()
    if mlflow.is_tracking_uri_set():
        uri, artifacts = mlflow.get_tracking_uri(), None
    else:
        local.mkdir(exist_ok=True)
    with _few_retries():
        client = mlflow.MlflowClient(uri)
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jsparse")
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name, artifacts)
            tags = resolve_tags()  # who started it and how, as mlflow.start_run sets them
            run = client.create_run(experiment, run_name=output.absolute().name, tags=tags).info.run_id
            texts = {name: str(value) for name, value in _plain(settings).items()}
            client.log_batch(run, params=[Param(*pair) for pair in texts.items()])
        else:
            client.update_run(run, status="RUNNING")

    def send(step: int, numbers: Mapping[str, float | int]) -> None:
        now = round(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    return _Service(run, send, lambda end: client.set_terminated(run, _STATUSES[end]))


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """A server that does not answer is known in seconds before the first step, not in minutes."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    given = name in os.environ
    os.environ.setdefault(name, "2")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def _plain(settings: Mapping[str, Any], above: str = "") -> dict[str, bool | int | float | str]:
    """The settings by their names, with slashes between nested ones: numbers, and all else as text."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _plain(value, f"{above}{name}/")
        else:
            found[f"{above}{name}"] = value if isinstance(value, int | float) else str(value)
    return found


_EXIT_CODES: dict[End, int] = {"finished": 0, "interrupted": 255, "failed": 1}  # 255 is W&B's own for Ctrl-C
_STATUSES: dict[End, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_OPEN = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "mlflow": _open_mlflow}
_ADVICE = {
    "tensorboard": "it writes to a folder in the output",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline and upload with `wandb sync` later",
    "mlflow": "check MLFLOW_TRACKING_URI; where it is not set, a file in the output is used",
}
