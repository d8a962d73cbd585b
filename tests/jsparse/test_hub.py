"""Models by their ids: a cache folder as huggingface_hub lays it out, and a small hub on this machine."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from jsparse.extras import MissingExtra
from jsparse.hub import model_folder, pinned_model, split_id
from jsparse.models import Llama, load_adapter, load_config, load_tokenizer

pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory, save_tiny_model):
    """What a repository holds, with files that must not be fetched."""
    folder = tmp_path_factory.mktemp("repository")
    save_tiny_model(folder)
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    never = ("pytorch_model.bin", "modeling.py", "tokenizer.pkl", "consolidated.safetensors")
    return found | dict.fromkeys((*never, "original/model.safetensors", "README.md"), b"not read")


def refused(model, *parts: str, error: type[Exception] = FileNotFoundError, **options) -> None:
    """model_folder fails with one line that has all the parts."""
    with pytest.raises(error) as caught:
        model_folder(model, **options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (str(model), *parts)), message


def test_an_id_its_branches_and_its_commits(hub_cache, store_snapshot, files):
    first = store_snapshot(hub_cache, "org/name", FIRST, files, dev=FIRST)
    second = store_snapshot(hub_cache, "org/name", SECOND, files, main=SECOND)
    for model, folder in (
        ("org/name", second),
        (Path("org/name"), second),
        ("org/name@main", second),
        ("org/name@dev", first),
        (Path("org/name@dev"), first),
        (f"org/name@{FIRST}", first),
    ):
        assert model_folder(model) == model_folder(model, weights=True) == folder
        assert pinned_model(model) == f"org/name@{folder.name}"
    assert load_config("org/name") == load_config(second)
    assert load_tokenizer("org/name@dev").get_vocab_size() == 257
    assert Llama.from_pretrained("org/name").config == load_config(second)


def test_a_folder_wins_over_an_id(hub_cache, store_snapshot, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store_snapshot(hub_cache, "org/name", FIRST, files, main=FIRST)
    Path("org/name").mkdir(parents=True)
    assert model_folder("org/name") == Path("org/name") and pinned_model(Path("org/name")) == "org/name"
    assert split_id("org/name") is None
    with pytest.raises(FileNotFoundError, match="org/name is not a checkpoint folder"):
        load_config("org/name")


@pytest.mark.parametrize(
    "model",
    """name /org/name ./org/name ../org/name org/../name org/name/../../etc a/b/c org/name/config.json org/
    /name org/name@ org/name@../x org/name@a//b org/name@a/../b org/-name org/name. org/na--me or--g/name
    org/name.git or..g/name org/na?me org/ñ https://huggingface.co/org/name org/name@x@y""".split(),
)
def test_what_is_no_id(model, hub_cache):
    refused(model, "does not exist", "org/name or org/name@revision")
    assert split_id(model) is None


@pytest.mark.parametrize(
    "model", ["o/n", "Org_1/a.b-c_D.2", "org/name@v1.0", "org/name@refs/pr/1", "1/2@0+x"]
)
def test_what_is_an_id(model, hub_cache):
    found = split_id(model)
    assert found is not None and "@".join(filter(None, found)) == model
    refused(model, str(hub_cache), "HF_HUB_OFFLINE")


def test_a_name_of_97_characters_is_no_id(hub_cache):
    assert split_id("o/" + "n" * 96) == ("o/" + "n" * 96, None)
    refused("o/" + "n" * 97, "does not exist")


def test_a_cache_without_the_weights(hub_cache, store_snapshot, files):
    small = {name: content for name, content in files.items() if not name.endswith("safetensors")}
    snapshot = store_snapshot(hub_cache, "org/name", FIRST, small, main=FIRST)
    assert load_config("org/name").max_position_embeddings == 64  # needs no weights
    with pytest.raises(FileNotFoundError, match="no .*safetensors in .*the cache is incomplete"):
        Llama.from_pretrained("org/name")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": names[0], "b": names[1]}})
    )
    (snapshot / names[0]).write_bytes(files["model.safetensors"])
    with pytest.raises(FileNotFoundError, match=f"org/name@{FIRST} has no {names[1]} in {snapshot}"):
        Llama.from_pretrained("org/name")


def test_a_cache_whose_links_lead_nowhere(hub_cache, store_snapshot, files):
    snapshot = store_snapshot(hub_cache, "org/name", FIRST, files, main=FIRST)
    for name in ("model.safetensors", "consolidated.safetensors"):
        (snapshot / name).resolve().unlink()
    with pytest.raises(FileNotFoundError, match="no .*safetensors in .*the cache is incomplete"):
        Llama.from_pretrained("org/name")


def test_a_damaged_index_is_named(hub_cache, store_snapshot, files):
    damaged = files | {"model.safetensors.index.json": b"\xff"}
    snapshot = store_snapshot(hub_cache, "org/name", FIRST, damaged, main=FIRST)
    with pytest.raises(ValueError, match=f"{snapshot}/model.safetensors.index.json cannot be read"):
        Llama.from_pretrained("org/name")


def test_the_extra_is_missing(hub_cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("org/name", r"pip install -e '.[hub]'", error=MissingExtra)


def test_an_adapter_and_its_base(hub_cache, store_snapshot, files, small, tmp_path):
    from flax import nnx

    from jsparse.models import LoRAParam, add_lora, save_adapter

    store_snapshot(hub_cache, "org/name", FIRST, files, main=FIRST)
    tuned, again = Llama.from_pretrained("org/name"), Llama.from_pretrained("org/name")
    add_lora(tuned, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("q_proj",))
    save_adapter(tuned, tmp_path / "adapter", base=pinned_model("org/name"), trained=LoRAParam)
    written = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    settings = json.loads(written["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", FIRST)
    store_snapshot(hub_cache, "org/adapter", SECOND, written, main=SECOND)
    load_adapter(again, "org/adapter")
    assert again.layers[0].self_attn.q_proj.lora_scale == 2.0
    save_adapter(tuned, tmp_path / "other", base=tmp_path, trained=LoRAParam)
    assert "revision" not in json.loads((tmp_path / "other" / "adapter_config.json").read_text())


def test_generate_without_a_network(store_snapshot, tmp_path, files):
    store_snapshot(tmp_path / "hub", "org/name", FIRST, files, main=FIRST)
    done = run(
        tmp_path,
        [*"-m jsparse generate --model org/name --max-new-tokens 3 --prompt hi".split()],
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0 and "3 tokens" in done.stderr
    done = run(
        tmp_path, [*"-m jsparse generate --model org/other --prompt hi".split()], TRANSFORMERS_OFFLINE="1"
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "org/other" in done.stderr and str(tmp_path / "hub") in done.stderr


def run(home: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, which reads HF_HOME and the rest as users set them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=home,
        env=clean | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment,
    )


# --- a hub that answers ---


class Hub(http.server.BaseHTTPRequestHandler):
    """The four answers of huggingface.co that a download asks for."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/(?:models|datasets)/org/(\w+)/revision/(.+)", path):
            self._info(*found.groups())
        elif found := re.fullmatch(r"/api/(?:models|datasets)/org/name/tree/(\w+)", path):
            files = self.commits[found[1]]
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ]
            self._answer(200, json.dumps(rows).encode())
        elif found := re.fullmatch(r"(?:/datasets)?/org/name/resolve/(\w+)/(.+)", path):
            content = self.commits[found[1]][urllib.parse.unquote(found[2])]
            self._answer(200, content, ETag=f'"{hash(content) % 10**9}"', **{"X-Repo-Commit": found[1]})
        else:
            self._answer(404, b"", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _info(self, name: str, revision: str) -> None:
        if name == "gated":
            self._answer(403, b"", **{"X-Error-Code": "GatedRepo"})
        elif name != "name":
            self._answer(401, b"", **{"X-Error-Code": "RepoNotFound"})
        elif revision not in self.refs:
            self._answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        else:
            self._answer(200, json.dumps({"id": "org/name", "sha": self.refs[revision]}).encode())

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(files):
    """A server whose main is at FIRST."""

    class ThisHub(Hub):
        commits = {FIRST: files, SECOND: files | {"generation_config.json": b"{}"}}
        refs = {"main": FIRST}
        asked = []
        address = ""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    ThisHub.address = f"http://127.0.0.1:{server.server_port}"
    yield ThisHub
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import sys
from jsparse.hub import model_folder, pinned_model
for model in sys.argv[1:]:
    try:
        print(sorted(file.name for file in model_folder(model).iterdir()))
        print(sorted(file.name for file in model_folder(model, weights=True).iterdir()))
        print(pinned_model(model))
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_what_is_fetched(hub, tmp_path):
    small = ["config.json", "generation_config.json", "tokenizer.json"]
    expected = [str(small), str([*small[:2], "model.safetensors", small[2]]), f"org/name@{FIRST}"]
    done = run(tmp_path, ["-c", SCRIPT, "org/name"], HF_ENDPOINT=hub.address)
    assert done.stdout.splitlines() == expected, done.stderr
    assert sum("/revision/" in path for path in hub.asked) == 1
    assert sum("/tree/" in path for path in hub.asked) == 1

    hub.asked.clear()  # the cache is full: one question, where main is
    again = run(tmp_path, ["-c", SCRIPT, "org/name"], HF_ENDPOINT=hub.address)
    assert again.stdout.splitlines()[1:] == expected[1:] and again.stderr == ""
    assert [path for path in hub.asked if "/org/" in path] == ["/api/models/org/name/revision/main"]

    hub.refs["main"] = SECOND
    hub.asked.clear()
    for model, commit in (("org/name", SECOND), (f"org/name@{FIRST}", FIRST)):
        moved = run(tmp_path, ["-c", SCRIPT, model], HF_ENDPOINT=hub.address)
        assert moved.stdout.splitlines()[2] == f"org/name@{commit}"
    # Nothing listens there: what the cache has is used.
    down = run(tmp_path, ["-c", SCRIPT, "org/name", "org/other"], HF_ENDPOINT="http://127.0.0.1:9")
    lines = down.stdout.splitlines()
    assert lines[2] == f"org/name@{SECOND}"
    assert "org/other is no folder here" in lines[3] and "http://127.0.0.1:9 cannot be reached" in lines[3]


def test_every_file_that_an_export_keeps_is_fetched(hub, files, tmp_path):
    kept = """added_tokens.json chat_template.json chat_template.jinja merges.txt spiece.model tekken.json
    special_tokens_map.json tokenizer.model tokenizer.model.v3 tokenizer_config.json vocab.json vocab.txt
    additional_chat_templates/rag.jinja LICENSE LICENSE.txt USE_POLICY.md""".split()
    hub.commits[FIRST] = files | dict.fromkeys(kept, b"{}") | {"original/tokenizer.model": b"not read"}
    code = """
import sys
from jsparse.hub import model_folder
from jsparse.models.companions import companions
folder = model_folder("org/name")
print(sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()))
print(sorted(companions(folder)))
"""
    done = run(tmp_path, ["-c", code], HF_ENDPOINT=hub.address)
    beside = [*kept, "generation_config.json", "tokenizer.json"]
    assert done.stdout.splitlines() == [str(sorted([*beside, "config.json"])), str(sorted(beside))], (
        done.stderr
    )


def test_what_an_interrupted_download_left(hub, tmp_path):
    small = "import sys, jsparse.hub; jsparse.hub.model_folder(sys.argv[1])"
    assert run(tmp_path, ["-c", small, "org/name"], HF_ENDPOINT=hub.address).returncode == 0
    found, error = run(tmp_path, ["-c", SCRIPT, "org/name"], HF_HUB_OFFLINE="1").stdout.splitlines()
    assert "config.json" in found and f"org/name@{FIRST}" in error
    assert "not wholly, in the cache" in error and str(tmp_path) in error


def test_what_the_hub_refuses(hub, tmp_path):
    done = run(tmp_path, ["-c", SCRIPT, "org/gated", "org/secret", "org/name@v2"], HF_ENDPOINT=hub.address)
    gated, secret, revision = done.stdout.splitlines()
    assert f"org/gated is gated: accept its license on {hub.address}/org/gated" in gated
    assert "org/secret is neither a folder here nor a model" in secret and "HF_TOKEN" in secret
    assert "org/name@v2" in revision and "no such branch, tag or commit" in revision


DATA_SCRIPT = """
import sys
from jsparse.texts.files.data_files import find_data
for source in sys.argv[1:]:
    try:
        print([file.name for file in find_data([source]).files])
    except OSError as error:
        print(error)
"""


def test_of_a_dataset_only_what_is_read_is_fetched(hub, tmp_path):
    row = b'{"text": "a"}'
    names = (
        "en/train [1].jsonl",
        "en/train 1.jsonl",
        "en/test.jsonl",
        "README.md",
        ".gitattributes",
        "name.py",
    )
    hub.commits = {FIRST: dict.fromkeys(names, row)}
    expected = "['org/name/en/train 1.jsonl', 'org/name/en/train [1].jsonl']"
    done = run(tmp_path, ["-c", DATA_SCRIPT, "org/name", f"org/name@{FIRST}"], HF_ENDPOINT=hub.address)
    assert done.stdout.splitlines() == [expected] * 2, done.stderr
    resolved = {urllib.parse.unquote(path.split(f"{FIRST}/")[1]) for path in hub.asked if "/resolve/" in path}
    assert resolved == {*names} - {"en/test.jsonl", "name.py"}

    command = ["-c", DATA_SCRIPT, "org/name", "org/name:*test*"]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        found, missing = run(tmp_path, command, **environment).stdout.splitlines()
        assert found == expected
        assert (
            f"data: org/name@{FIRST} is no folder here" in missing and "not wholly, in the cache" in missing
        )


def test_what_the_hub_refuses_of_datasets(hub, tmp_path):
    command = ["-c", DATA_SCRIPT, "org/gated", "org/secret", "org/name@v2"]
    gated, secret, revision = run(tmp_path, command, HF_ENDPOINT=hub.address).stdout.splitlines()
    assert f"data: org/gated is gated: accept its license on {hub.address}/datasets/org/gated" in gated
    assert "data: org/secret is neither a folder here nor a dataset at" in secret
    assert "data: org/name@v2" in revision and "no such branch, tag or commit" in revision
