"""TensorBoard, Weights & Biases and MLflow, with their own packages, offline: they hold what was logged."""

import contextlib
import dataclasses
import importlib
import json
import logging
import math
import os
import signal
import subprocess
import sys

import pytest

from jsparse.extras import MissingExtra
from jsparse.train import FinetuneConfig, finetune, finetuning
from jsparse.train.run import loggers
from jsparse.train.run.loggers import flat_numbers, loggers_open

SETTINGS = {"learning_rate": 2e-5, "data": ["a.txt"], "mesh": {"fsdp": 2}}
HPARAMS = "_hparams_/session_start_info"
SERVICES = ("tensorboard", "wandb", "mlflow")
OF_ENDS = pytest.mark.parametrize("service", ["wandb", "mlflow"], indirect=True)  # TensorBoard knows of none


def of_tensorboard(output):
    """All numbers with their steps. TensorBoard reads its files by name, which for two of one second is not
    the order in which they were written, so by steps; one that is there twice is seen nevertheless.
    """
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    make = importlib.import_module("tensorboard.util.tensor_util").make_ndarray
    events = accumulator.EventAccumulator(str(output / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    return {
        name: sorted((event.step, float(make(event.tensor_proto))) for event in events.Tensors(name))
        for name in events.Tags()["tensors"]
        if name != HPARAMS
    }


def hparams_of_tensorboard(output):
    """What the tab HPARAMS shows of a run, which must have one row there, resumed or not."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    data = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2")
    events = accumulator.EventAccumulator(str(output / "tensorboard")).Reload()
    assert len(events.Tensors(HPARAMS)) == 1
    found = data.HParamsPluginData.FromString(events.SummaryMetadata(HPARAMS).plugin_data.content)
    return {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in found.session_start_info.hparams.items()
    }


def records_of_wandb(output):
    """The records of all files of a run, in the order in which they would be uploaded."""
    for file in sorted(output.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield from map(json.loads, done.stdout.splitlines())


def of_wandb(output):
    found = {}
    for record in records_of_wandb(output):
        if record["type"] == "history":
            item = record["history"]["item"]
            for name in item.keys() - {"_runtime", "_step", "_timestamp"}:
                found.setdefault(name, []).append((item["_step"], item[name]))
    return found


def client_of(output):
    return importlib.import_module("mlflow").MlflowClient(f"sqlite:///{output.absolute()}/mlflow/mlflow.db")


def of_mlflow(output):
    client = client_of(output)
    (experiment,) = client.search_experiments(filter_string="name = 'jsparse'")
    (run,) = client.search_runs([experiment.experiment_id])
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


READ = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}


@pytest.fixture(autouse=True)
def wandb_forgets():
    """It reads the environment once in a process."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(params=SERVICES)
def service(request, monkeypatch):
    """The name of a service whose package is installed, with nothing of the user's in its environment."""
    pytest.importorskip(request.param)
    if request.param == "mlflow":
        pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return request.param


# Of the packages themselves, with the versions that they get along with.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def ends_of(service, output):
    """How each part of a run has ended at a service, or only the last part, for MLflow keeps no other."""
    if service == "mlflow":
        run = json.loads((output / "loggers.json").read_text())["mlflow"]["run"]
        return [client_of(output).get_run(run).info.status]
    return [record["exit"]["exit_code"] for record in records_of_wandb(output) if record["type"] == "exit"]


def written(
    output, lines, start=0, services=(), stop=None, by: type[BaseException] | None = KeyboardInterrupt
):
    """Log lines after ``start`` as a run does; with ``stop``, ``by`` ends it after that step: an error, or
    None for a signal that the run obeys.
    """
    before = [line for line in lines if line["step"] <= start]
    with loggers_open(services, output, SETTINGS, start=start, steps=lines[-1]["step"], quiet=True) as logs:
        with open(output / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in before)
            for line in lines[len(before) :]:
                file.write(json.dumps(line) + "\n")
                file.flush()
                logs.log(line)
                if line["step"] == stop:
                    if by is not None:
                        raise by
                    logs.stopped()
                    return


def short_run(base, text, output, **settings):
    return FinetuneConfig(
        model=base, data=text, output=output, context=32, lora_rank=2, batch_size=2, **settings
    )


def lines_of(steps):
    lines = [
        {"step": step, "loss": None if step == 2 else 1 / step, "eval": {"docs": {"loss": step + 0.5}}}
        for step in range(1, steps + 1)
    ]
    lines[0]["eval_before"] = {"docs": {"loss": 0.5}}
    return lines


def expected(steps):
    """The training in one group, the held-out data in another, from before the first step on."""
    return {
        "train/loss": [(step, 1 / step) for step in range(1, steps + 1) if step != 2],
        "eval/docs/loss": [(step, step + 0.5) for step in range(steps + 1)],
    }


def check(service, output, steps):
    found = READ[service](output)
    assert found.keys() == expected(steps).keys()
    for name, points in expected(steps).items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points])


def test_a_service_holds_what_was_logged(service, tmp_path):
    written(tmp_path, lines_of(3), services=(service,))
    check(service, tmp_path, 3)
    if service == "tensorboard":
        settings = {"learning_rate": 2e-5, "data": "['a.txt']", "mesh/fsdp": 2}
        assert hparams_of_tensorboard(tmp_path) == settings
    if service == "wandb":
        (run,) = [record["run"] for record in records_of_wandb(tmp_path) if record["type"] == "run"]
        config = run["config"]["update"]
        assert {name: config[name] for name in SETTINGS} == SETTINGS
        assert run["project"] == "jsparse" and run["display_name"] == tmp_path.name
    if service == "mlflow":
        client = client_of(tmp_path)
        run = client.get_run(json.loads((tmp_path / "loggers.json").read_text())["mlflow"]["run"])
        assert run.data.params == {"learning_rate": "2e-05", "data": "['a.txt']", "mesh/fsdp": "2"}
        assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
        assert run.data.tags["mlflow.user"] and run.data.tags["mlflow.source.name"]


def test_a_resumed_run_goes_on_without_a_step_twice(service, tmp_path):
    """It crashes after step 4, and has a checkpoint of step 2."""
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, lines_of(6), services=(service,), stop=4)
    first = json.loads((tmp_path / "loggers.json").read_text())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # torn
    written(tmp_path, lines_of(6), start=2, services=(service,))
    check(service, tmp_path, 6)
    again = json.loads((tmp_path / "loggers.json").read_text())
    assert again[service]["run"] == first[service]["run"]
    if service == "tensorboard":
        assert hparams_of_tensorboard(tmp_path)
    if service == "wandb":
        runs = [record["run"] for record in records_of_wandb(tmp_path) if record["type"] == "run"]
        assert [run["run_id"] for run in runs] == [first["wandb"]["run"]] * 2


def test_a_service_that_comes_later_or_pauses_gets_the_lines_between(service, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, lines_of(6), stop=2)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, lines_of(6), start=2, services=(service,), stop=3)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, lines_of(6), start=3, stop=5)
    written(tmp_path, lines_of(6), start=4, services=(service,))
    check(service, tmp_path, 6)


def test_a_finished_run_sends_nothing_again(service, tmp_path):
    written(tmp_path, lines_of(3), services=(service,))
    files = sorted(tmp_path.rglob("*"))
    written(tmp_path, lines_of(3), start=3, services=(service,))
    assert sorted(tmp_path.rglob("*")) == files
    written(tmp_path, lines_of(4), start=3, services=(service,))
    check(service, tmp_path, 4)


@pytest.mark.parametrize(
    ("by", "mlflow", "wandb"),
    [(None, "KILLED", 255), (KeyboardInterrupt, "KILLED", 255), (OSError, "FAILED", 1)],
    ids=["signal", "second Ctrl-C", "failure"],
)
@OF_ENDS
def test_a_service_knows_how_a_run_ended_and_that_it_went_on(service, tmp_path, by, mlflow, wandb):
    with contextlib.nullcontext() if by is None else pytest.raises(by):
        written(tmp_path, lines_of(4), services=(service,), stop=2, by=by)
    assert ends_of(service, tmp_path) == [{"mlflow": mlflow, "wandb": wandb}[service]]
    written(tmp_path, lines_of(4), start=2, services=(service,))
    assert ends_of(service, tmp_path) == {"mlflow": ["FINISHED"], "wandb": [wandb, 0]}[service]
    check(service, tmp_path, 4)


@OF_ENDS
def test_a_run_that_failed_after_its_last_line_may_finish(service, tmp_path):
    with pytest.raises(OSError):
        written(tmp_path, lines_of(3), services=(service,), stop=3, by=OSError)
    assert ends_of(service, tmp_path) == {"mlflow": ["FAILED"], "wandb": [1]}[service]
    written(tmp_path, lines_of(3), start=3, services=(service,))
    assert ends_of(service, tmp_path) == {"mlflow": ["FINISHED"], "wandb": [1, 0]}[service]
    check(service, tmp_path, 3)


def test_a_run_that_starts_over_is_another(service, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, [{"step": step, "loss": 9.0} for step in (1, 2, 3)], services=(service,), stop=2)
    first = json.loads((tmp_path / "loggers.json").read_text())[service]
    written(tmp_path, lines_of(3), services=(service,))
    again = json.loads((tmp_path / "loggers.json").read_text())[service]
    if service == "tensorboard":
        check(service, tmp_path, 3)
    else:
        assert again["run"] != first["run"]


def test_mlflow_keeps_to_the_store_that_the_environment_names(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "long")
    client = mlflow.MlflowClient(uri)
    client.create_experiment("long", (tmp_path / "artifacts").as_uri())
    (tmp_path / "output").mkdir()
    written(tmp_path / "output", lines_of(3), services=("mlflow",))
    assert not (tmp_path / "output" / "mlflow").exists()
    (run,) = client.search_runs([client.get_experiment_by_name("long").experiment_id])
    assert run.data.metrics["train/loss"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "No API key.*run `wandb login`, or set WANDB_MODE=offline"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "check MLFLOW_TRACKING_URI"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "ftp://here"}, "check MLFLOW_TRACKING_URI"),
    ],
    ids=["not logged in", "no server", "no such scheme"],
)
def test_a_service_that_does_not_start_says_what_to_do(name, environment, message, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"^log_to={name} does not start: .*{message}") as error:
        written(tmp_path, lines_of(3), services=(name,))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_was_measured_before_a_failure_is_not_sent_twice(tmp_path, monkeypatch):
    sent, failing = [], [1]

    def send(step, numbers):
        if step in failing:
            raise ConnectionError("gone")
        sent.append(step)

    def opened(output, settings, run, quiet):
        return loggers._Service(run or "1", send, lambda failed: None)

    monkeypatch.setitem(loggers._OPEN, "wandb", opened)
    written(tmp_path, lines_of(2), services=("wandb",))
    assert sent == [0]  # of the first line, whose own step failed
    failing.clear()
    written(tmp_path, lines_of(3), start=2, services=("wandb",))
    assert sent == [0, 1, 2, 3]


def test_a_service_that_is_not_installed(base, text, tmp_path, monkeypatch):
    for name in SERVICES:
        monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
        config = FinetuneConfig(model=base, data=text, output=tmp_path / "out", context=32, log_to=(name,))
        with pytest.raises(MissingExtra, match=rf"log_to={name} needs .* pip install -e '\.\[{name}\]'"):
            finetune(config, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_run_outlives_a_service_that_fails(tmp_path, monkeypatch, caplog):
    sent, failures = [], [ConnectionError("the server\nhas gone")]

    def send(step, numbers):
        if step == 2 and failures:
            raise failures.pop()
        sent.append(step)

    def opened(output, settings, run, quiet):
        return loggers._Service(run or "1", send, lambda how: None)

    monkeypatch.setitem(loggers._OPEN, "wandb", opened)
    with caplog.at_level(logging.WARNING, "jsparse"):
        written(tmp_path, lines_of(3), services=("wandb",))
    assert sent == [0, 1]
    assert "wandb takes no lines from step 2 on, metrics.jsonl does: the server has gone" in caplog.text
    written(tmp_path, lines_of(4), start=3, services=("wandb",))
    assert sent == [0, 1, 2, 3, 4]  # what it has missed comes first


def test_numbers_are_named_with_slashes():
    line = {"step": 1, "loss": None, "text": {"nll": 2.0, "right": None}, "name": "a", "n": math.inf}
    assert flat_numbers(line) == {"step": 1, "text/nll": 2.0, "n": math.inf}


@pytest.mark.parametrize("given", [("tensorbord",), ("wandb", "wandb")])
def test_services_that_there_are(given):
    with pytest.raises(ValueError, match="log_to must"):
        FinetuneConfig(model="a", data="b", output="c", context=32, log_to=given)


@pytest.mark.parametrize("at", [2, 3], ids=["at a measurement", "between two"])
def test_a_measurement_that_a_signal_put_off_is_logged_when_it_is_made(at, base, text, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "held.txt").write_text("A bird sang.")
    config = short_run(
        base,
        text,
        tmp_path / "out",
        steps=4,
        eval_data=(tmp_path / "held.txt",),
        eval_every=2,
        log_to=("tensorboard",),
    )
    batch_at = finetuning.batch_at

    def stopping(windows, step, **options):
        if step == at - 1:
            signal.raise_signal(signal.SIGTERM)
        return batch_at(windows, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "batch_at", stopping)
        assert finetune(config, progress=False).stopped_by == signal.SIGTERM
    finetune(config, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["eval"]["loss"]) for line in lines if "eval" in line]
    losses = [(0, lines[0]["eval_before"]["loss"]), *losses]
    found = of_tensorboard(tmp_path / "out")
    assert [step for step, _ in losses] == [0, 2, 4] == [step for step, _ in found["eval/loss"]]
    assert [loss for _, loss in found["eval/loss"]] == pytest.approx([loss for _, loss in losses])
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]


def test_a_run_logs_its_lines_and_resumes_from_what_it_wrote(base, text, tmp_path, monkeypatch):
    from jsparse.__main__ import main

    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    config = short_run(base, text, "out", steps=4, checkpoint_every=2, log_to=("tensorboard",))
    batch_at = finetuning.batch_at

    def crash_in_step_4(windows, step, **options):
        if step == 3:
            raise KeyboardInterrupt
        return batch_at(windows, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "batch_at", crash_in_step_4)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, progress=False)
    settings = (tmp_path / "out" / "run.yaml").read_text()
    assert main(["finetune", "--config", "out/run.yaml"]) == 0
    assert (tmp_path / "out" / "run.yaml").read_text() == settings
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = of_tensorboard(tmp_path / "out")
    assert found.keys() == {f"train/{name}" for name in lines[0].keys() - {"step"}}
    for name in ("loss", "grad_norm", "learning_rate", "skipped"):
        assert [step for step, _ in found[f"train/{name}"]] == [1, 2, 3, 4]
        assert [value for _, value in found[f"train/{name}"]] == pytest.approx([line[name] for line in lines])

    unbroken = finetune(dataclasses.replace(config, output="unbroken", log_to=()), progress=False)
    assert [line["loss"] for line in lines] == list(unbroken.losses)


def test_a_run_is_interrupted_or_failed_until_its_model_is_written(base, text, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = short_run(base, text, tmp_path / "out", steps=2, log_to=("mlflow",))
    batch_at = finetuning.batch_at

    def terminate(windows, step, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(windows, step, **options)

    def full_disk(*arguments, **options):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "batch_at", terminate)
        assert not finetune(config, progress=False).finished
    assert ends_of("mlflow", config.output) == ["KILLED"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(finetuning, "export_model", full_disk)
        finetune(config, progress=False)
    assert ends_of("mlflow", config.output) == ["FAILED"]
    assert finetune(config, progress=False).finished
    assert ends_of("mlflow", config.output) == ["FINISHED"]
    assert [step for step, _ in of_mlflow(config.output)["train/loss"]] == [1, 2]
