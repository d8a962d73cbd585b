"""``jsparse generate``: where prompts come from, and how tokens are chosen."""

import io
import json

import pytest
from flax import nnx

from jsparse.__main__ import main
from jsparse.models import Llama, LlamaConfig, byte_tokenizer, load_chat_template
from jsparse.serve import SamplingParams, generate

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    config = LlamaConfig.tiny(vocab_size=260, max_position_embeddings=128, eos_token_ids=(259,))
    Llama(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def run(model, capfd):
    def run(*options, code=0):
        assert main(["generate", "--model", str(model), "--max-new-tokens", "6", *options]) == code
        return capfd.readouterr()

    return run


def test_a_conversation_is_rendered_by_the_models_template(run, model, tmp_path):
    ids = load_chat_template(model).encode(HELLO)
    expected = generate(Llama.from_pretrained(model), [ids], 6, tokenizer=byte_tokenizer()).texts
    for content in (HELLO, {"messages": HELLO}):
        (tmp_path / "talk.json").write_text(json.dumps(content))
        out, err = run("--messages", str(tmp_path / "talk.json"))
        assert out == expected[0] + "\n" and f"prompt of {len(ids)} tokens" in err


def test_a_file_of_prompts(run, model, tmp_path):
    lines = [{"prompt": "to be", "id": "a"}, {"messages": HELLO}, {"prompt": "or not to be", "id": 7}]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n\n")
    out, _ = run(
        "--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "2", "--n", "2", "--temperature", "1"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(i, j) for i in range(3) for j in range(2)]
    assert [row.get("id") for row in rows[::2]] == ["a", None, 7]
    ids = [list(b"to be"), load_chat_template(model).encode(HELLO), list(b"or not to be")]
    expected = generate(
        Llama.from_pretrained(model), ids, 6, SamplingParams(temperature=1, n=2), tokenizer=byte_tokenizer()
    )
    assert [row["text"] for row in rows] == expected.texts
    assert [row["prompt_tokens"] for row in rows[::2]] == [len(one) for one in ids]


def test_lines_end_at_line_feeds_alone(run, tmp_path):
    """JSON may hold other separators of lines as they are."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\u2028b\u0085c"}\r\n', encoding="utf-8")
    (line,) = run("--prompts", str(tmp_path / "prompts.jsonl")).out.splitlines()
    assert json.loads(line)["prompt_tokens"] == len("a\u2028b\u0085c".encode())


@pytest.mark.parametrize("options", [["--prompt-file", "-"], []])
def test_standard_input(run, monkeypatch, tmp_path, options):
    expected, _ = run("--prompt", "to be")
    (tmp_path / "text").write_text("to be")
    with (tmp_path / "text").open("rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        assert run(*options).out == expected


def test_what_generation_config_says_is_taken_and_shown(run, model):
    file = model / "generation_config.json"
    stored = file.read_text()
    plain, err = run("--prompt", "hi")
    assert "generation_config" not in err
    try:
        file.write_text(json.dumps({"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_beams": 4}))
        drawn, err = run("--prompt", "hi")
        assert "jsparse: temperature 1.5, top_p 0.9 from generation_config.json" in err
        assert "num_beams=4 of generation_config.json is not followed" in err
        other, _ = run("--prompt", "hi", "--seed", "1")
        assert len({plain, drawn, other}) == 3
        assert run("--prompt", "hi", "--generation-config", "none").out == plain
        out, err = run("--prompt", "hi", "--temperature", "0")
        assert out == plain and "temperature" not in err and "top_p" not in err
    finally:
        file.write_text(stored)
    assert "without effect at temperature 0: top_p" in run("--prompt", "hi", "--top-p", "0.5").err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "prompts: .* is empty"),
        ('{"prompt": 1}', "line 1: prompt must be a string, not 1"),
        ('{"prompt": "a"}\n{"text": "b"}', r"line 2 has the fields \['text'\]"),
        ('{"prompt": "a", "messages": []}', "line 1 has the fields"),
        ("[1]", r"line 1 holds \[1\]"),
        ("{", "line 1 is not valid JSON"),
        ('{"prompt": "a"}\n\n{"prompt": b}', r"line 3 is not valid JSON \(Expecting value at character 11\)"),
        ("\n \n", "prompts: .* is empty"),
        ('{"prompt": "a", "id": 1.5}', "line 1: id must be a string or an integer, not 1.5"),
        ('{"messages": "hi"}', "line 1: messages must be a list"),
        ('{"messages": [{"content": "hi"}]}', r"line 1: messages\[0\].*role"),
        ('{"prompt": ""}', "line 1: the text is empty"),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_bad_prompts_are_named(run, tmp_path, content, named):
    import re

    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    out, err = run("--prompts", str(file), code=2)
    assert out == "" and err.count("\n") == 1 and re.search(named, err), err


def test_a_file_of_several_conversations_belongs_to_another_option(run, tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    (tmp_path / "chats.jsonl").write_text(f"{row}\n{row}\n")
    out, err = run("--messages", str(tmp_path / "chats.jsonl"), code=2)
    assert out == "" and "has JSON lines; jsparse generate --prompts takes one conversation per line" in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", "a", "--min-p", "2"], "min_p must be a number from 0 to 1"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty must be"),
        (["--prompt", "a", "--stop", *"abcdefghijklmnopq"], "stop must have at most 16 strings"),
        (["--prompt", "a", "--n", "0"], "n must be an integer from 1"),
        (["--prompt-file", "nothing"], "prompt_file: nothing cannot be read: No such file or directory"),
        (["--messages", "."], "messages: . cannot be read: Is a directory"),
    ],
)
def test_bad_options_are_named(run, options, named):
    out, err = run(*options, code=2)
    assert out == "" and named in err


@pytest.mark.parametrize(
    "options", [["--prompt", "a", "--messages", "b"], ["--prompt", "a", "--batch-size", "0"], []]
)
def test_options_that_do_not_fit_one_another(model, options):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", str(model), *options])


def test_a_model_without_a_template_cannot_talk(run, model, tmp_path):
    (tmp_path / "talk.json").write_text(json.dumps(HELLO))
    template = model / "chat_template.jinja"
    template.rename(model / "away")
    try:
        assert "chat_template" in run("--messages", str(tmp_path / "talk.json"), code=2).err
    finally:
        (model / "away").rename(template)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "hi"],
        ["evaluate", "--contexts", "64"],
        ["scoreboard", "--tasks", "needle", "--methods", "dense", "--grid-methods", "--samples", "1"],
        ["bench", "decode", "--model", "{model}", "--output", "{folder}", "--contexts", "64"],
        ["bench", "prefill", "--model", "{model}", "--output", "{folder}", "--contexts", "64"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_the_dtype_reaches_the_weights(model, tmp_path, monkeypatch, capfd, command):
    def load(cls, directory, *, dtype=None, mesh=None):
        raise ValueError(f"weights in {dtype}")

    monkeypatch.setattr(Llama, "from_pretrained", classmethod(load))
    words = [word.format(model=model, folder=tmp_path / "out") for word in command]
    assert main([*words, "--dtype", "bfloat16"]) == 2
    assert "weights in bfloat16" in capfd.readouterr().err


def test_stop_strings_add_up(run):
    """Several after one --stop, or each after its own."""
    text = run("--prompt", "to be", "--max-new-tokens", "40").out[:-1]
    cut = {stop: text.index(stop) for stop in (text[9], text[14])}
    expected = text[: min(cut.values())] + "\n"
    for stops in (["--stop", *cut], [word for stop in cut for word in ("--stop", stop)]):
        assert run("--prompt", "to be", "--max-new-tokens", "40", *stops).out == expected
    assert run("--prompt", "to be", "--max-new-tokens", "40", *[*stops[2:], *stops[:2]]).out == expected


def test_no_new_tokens_are_refused(run):
    assert (
        "max_new_tokens must be an integer >= 1, not 0"
        in run("--prompt", "a", "--max-new-tokens", "0", code=2).err
    )


def test_an_empty_pipe_is_no_prompt(run, monkeypatch, tmp_path):
    (tmp_path / "text").write_text("")
    with (tmp_path / "text").open("rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        assert "prompt_file: standard input is empty" in run(code=2).err
