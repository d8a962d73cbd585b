"""The recipe in examples/long_chat: its data are right, and every step of it runs."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jsparse.__main__ import main
from jsparse.models import load_config, load_tokenizer, shipped_model
from jsparse.texts.corpus import standard_library_files
from jsparse.texts.tasks import statement

RECIPE = Path(__file__).parent.parent / "examples" / "long_chat"


@pytest.fixture
def recipe(monkeypatch):
    """Imports a script of the recipe, as Python finds it when it runs one."""
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in ("make_data", "measure"):  # other scripts, which other tests ran, have these names too
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ("make_data", "measure"):
        sys.modules.pop(name, None)


def test_conversations_fit_and_ask_for_words_that_the_text_explains_once(recipe):
    make_data = recipe("make_data")
    texts = make_data.Texts(standard_library_files()[1])
    lengths = []
    for row in make_data.chats(texts, 40, 2048, np.random.default_rng(0)):
        messages = row["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        shown = max((message["content"] for message in messages), key=len)
        said = [message["content"] for message in messages[1::2] if message["content"].startswith("The word")]
        assert len(said) == make_data.TURNS
        for sentence in said:
            key, value = sentence.removeprefix("The word ").removesuffix(".").split(" is ")
            assert shown.count(statement(key, value)) == 1
            assert sum(message["content"].endswith(f"What is the word {key}?") for message in messages) == 1
        lengths.append(sum(texts.count(message["content"]) + 20 for message in messages))
    assert max(lengths) < 2048 < 3 * max(lengths) and min(lengths) < 1024


def test_what_is_held_out_is_not_learned_and_a_seed_decides(recipe, tmp_path, monkeypatch):
    make_data = recipe("make_data")
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        words = ["--output", str(tmp_path / name), "--context", "4096", "--chats", "20", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", ["make_data.py", *words])
        make_data.main()
    read = {
        folder.name: {file.name: file.read_text() for file in folder.iterdir()}
        for folder in tmp_path.iterdir()
    }
    assert read["one"] == read["same"]
    assert read["one"]["chats.jsonl"] != read["other"]["chats.jsonl"]
    learned = set(read["one"]["documents.jsonl"].splitlines())
    held_out = set(read["one"]["documents-held-out.jsonl"].splitlines())
    assert learned and held_out and not learned & held_out
    tokenizer = load_tokenizer(shipped_model())
    assert all(len(tokenizer.encode(json.loads(line)["text"]).ids) > 4096 for line in held_out)


@pytest.mark.slow
def test_every_step_runs(recipe, tmp_path, monkeypatch, capsys):
    """In miniature, in a folder like the root of a clone, by the files as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small").symlink_to(shipped_model())
    smaller = "--context 2560 --steps 2 --warmup-steps 1 --batch-size 1 --eval-every 2".split()

    words = "--output long-chat/data --context 2560 --chats 20".split()
    monkeypatch.setattr(sys, "argv", ["make_data.py", *words])
    recipe("make_data").main()
    for name in ("extend", "chat"):
        assert main(["finetune", "--config", str(RECIPE / f"{name}.yaml"), *smaller]) == 0
    assert load_config("long-chat/assistant").max_position_embeddings == 4096
    seen = json.loads(Path("long-chat/assistant/attention_pattern.json").read_text())
    assert seen["kind"] == "full"
    assert (Path("long-chat/assistant") / "chat_template.jinja").is_file()

    words = "--folder long-chat --lengths 1024 --windows 1 --samples 2".split()
    monkeypatch.setattr(sys, "argv", ["measure.py", *words])
    recipe("measure").main()
    results = json.loads(Path("long-chat/results.json").read_text())
    assert all(0 < value < 8 for values in results["loss"].values() for value in values)
    assert results["recall"]["shipped"][0] == 1
    for figure in ("training.png", "answers.png"):
        assert Path("long-chat", figure).stat().st_size > 10_000

    capsys.readouterr()
    chat = "chat --model long-chat/assistant --budget 512 --max-new-tokens 4".split()
    with open("long-chat/data/asked.txt") as asked:
        monkeypatch.setattr(sys, "stdin", asked)
        assert main([*chat, "--messages", "long-chat/data/shown.json"]) == 0
