"""What every command makes of its --model: a folder, an id on the Hugging Face Hub, or neither."""

import pytest

from jsparse.__main__ import main
from jsparse.models import LlamaConfig

COMMIT = "a" * 40
# Each command that takes a model, with whatever else it needs; {} is a folder.
COMMANDS = {
    "generate": "--prompt a --max-new-tokens 1",
    "evaluate": "--data {}/text.txt --contexts 16 --max-windows 1",
    "scoreboard": "--tasks needle",
    "bench decode": "--output {}/new",
    "bench prefill": "--output {}/new",
    "plan generate": "--prompt-tokens 8",
    "plan finetune": "--context 64",
    "finetune": "--data {}/text.txt --output {}/new --context 64",
    "heads": "--data {}/text.txt --output {}/new --context 2000",
    "convert": "--output {}/new",
    "demo": "",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: empty but for a text, and with folders around it."""
    folder = tmp_path / "work" / "here"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("def main():\n    return 0\n" * 20)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("jsparse.plan.compile_only.prepare_process", lambda: None)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, save_tiny_model):
    folder = tmp_path_factory.mktemp("repository")
    save_tiny_model(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failure(capfd, here, command: str, model: str) -> str:
    """The one line with which a command refuses a model."""
    options = COMMANDS[command].replace("{}", str(here)).split()
    assert main([*command.split(), "--model", model, *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_written_as_a_folder_is_no_id(
    command, here, hub_cache, store_snapshot, files, capfd, monkeypatch
):
    """Although the cache has a model whose id remains if the path is made simpler."""
    store_snapshot(hub_cache, "org/name", COMMIT, files, main=COMMIT)
    for model in ("./org/name", "org/name/", "../org/name", "org//name", "/org/name", "~/name"):
        assert f"{model} does not exist; a model is a folder" in failure(capfd, here, command, model)


@pytest.mark.parametrize(
    ("command", "make_plan"),
    [
        ("plan generate", "jsparse.serve.plan.plan_generate"),
        ("plan finetune", "jsparse.train.plan.plan_finetune"),
    ],
)
def test_a_plan_of_an_id_needs_only_its_config(
    command, make_plan, here, hub_cache, store_snapshot, files, capfd, monkeypatch
):
    def plan(*arguments, **options):
        raise RuntimeError(next(one for one in arguments if isinstance(one, LlamaConfig)).vocab_size)

    monkeypatch.setattr(make_plan, plan)
    small = {"config.json": files["config.json"]}
    store_snapshot(hub_cache, "org/name", COMMIT, small, main=COMMIT)
    for model in ("org/name", f"org/name@{COMMIT}"):
        expected = f"nothing is estimated: {LlamaConfig.tiny().vocab_size}\n"
        assert failure(capfd, here, command, model).endswith(expected)
    assert "org/other is no folder here" in failure(capfd, here, command, "org/other")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("convert", "demo")])
def test_an_adapter_is_no_model_but_names_its_base(command, here, hub_cache, store_snapshot, capfd):
    config = '{"base_model_name_or_path": "org/name", "revision": "v1"}'
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text(config)
    small = {"adapter_config.json": config.encode()}
    store_snapshot(hub_cache, "org/adapter", COMMIT, small, main=COMMIT)
    for model in ("adapter", f"org/adapter@{COMMIT}"):
        expected = (
            f"{model} is an adapter, and no model; jsparse merge --run {model} --output NEW_FOLDER "
            "makes a model of it and its base, org/name@v1"
        )
        assert expected in failure(capfd, here, command, model)


def test_an_adapter_with_the_config_of_its_model(here, files, capfd):
    (here / "adapter").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (here / "adapter" / name).write_bytes(files[name])
    (here / "adapter" / "adapter_config.json").write_text("{}")
    (here / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    expected = "adapter --output NEW_FOLDER --model BASE makes a model of it and its base, which its"
    assert expected in failure(capfd, here, "generate", "adapter")
