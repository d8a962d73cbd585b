"""``jsparse chat``: what a conversation in the terminal prints, keeps and saves."""

import contextlib
import functools
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from jsparse.__main__ import main
from jsparse.models import (
    Llama,
    LlamaConfig,
    byte_tokenizer,
    load_chat_template,
    load_config,
    load_tokenizer,
)
from jsparse.reports import console
from jsparse.reports.console import for_terminal
from jsparse.serve import Batch, CacheConfig, SamplingParams, chat_command, generate
from jsparse.serve.chat import Chat
from jsparse.serve.chat_command import _print_answer
from jsparse.serve.conversation import Conversation
from jsparse.serve.prompts import Prompt

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"])
    config = LlamaConfig.tiny(
        vocab_size=261, max_position_embeddings=256, initializer_range=0.5, eos_token_ids=(259,)
    )
    Llama(config, rngs=nnx.Rngs(27)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chat(folder, capfd, monkeypatch):
    def chat(text, *options, model=folder, code=0, terminal=False):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(chat_command, "_in_terminal", lambda: terminal)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        assert main(["chat", "--model", str(model), *options]) == code
        return capfd.readouterr()

    return chat


@pytest.fixture(scope="module")
def answers(folder):
    """The conversation that these messages of a user lead to."""
    model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
    template = load_chat_template(folder)

    def answers(*texts, most=8, messages=()):
        messages = list(messages)
        for text in texts:
            messages.append({"role": "user", "content": text})
            ids = template.encode(messages)
            answer = generate(model, [ids], most, tokenizer=tokenizer).texts[0]
            messages.append({"role": "assistant", "content": answer})
        return messages

    return answers


def spoken(messages):
    return "".join(message["content"] + "\n" for message in messages if message["role"] == "assistant")


def test_each_line_is_answered_after_those_before(chat, answers, tmp_path):
    out, err = chat(
        f"hello\n\nand you?\n//slash\n/save {tmp_path}/talk.json\n/save {tmp_path}/talk.json\n",
        "--max-new-tokens",
        "8",
    )
    messages = answers("hello", "and you?", "/slash")
    assert out == spoken(messages)
    assert json.loads((tmp_path / "talk.json").read_text()) == messages
    assert err.count(f"wrote 6 messages to {tmp_path}/talk.json\n") == 2


def test_a_saved_conversation_goes_on(chat, answers, tmp_path):
    before, file = answers("hello"), tmp_path / "talk.json"
    file.write_text(json.dumps(before))
    options = ["--messages", str(file), "--max-new-tokens", "8"]
    out, _ = chat("why?\n/save " + str(file), *options)
    after = answers("why?", messages=before)
    assert out == spoken(after[2:]) and json.loads(file.read_text()) == after
    tools = [{"type": "function", "function": {"name": "add"}}]
    file.write_text(json.dumps({"messages": after[:3], "tools": tools}))  # the last one is the user's
    out, _ = chat(f"/save {file}\n", *options)
    assert out == spoken(after[2:]) and json.loads(file.read_text()) == {"messages": after, "tools": tools}


def test_a_system_prompt(chat, answers):
    system = {"role": "system", "content": "be short"}
    expected = spoken(answers("hello", messages=[system]))
    most = ["--max-new-tokens", "8"]
    assert chat("hello\n", "--system", "be short", *most)[0] == expected
    assert chat("/system be short\nhello\n", *most)[0] == expected
    assert chat("hello\n/reset\nhello\n", "--system", "be short", *most)[0] == 2 * expected
    without = chat("/system\nhello\n/reset\nhello\n", "--system", "be short", *most)[0]
    assert without == 2 * spoken(answers("hello")) != 2 * expected


def test_messages_of_several_lines(chat, answers):
    assert chat('"""one\n two"""\n', "--max-new-tokens", "8")[0] == spoken(answers("one\n two"))
    assert chat('"""\none\n"""\n', "--max-new-tokens", "8")[0] == spoken(answers("\none\n"))


def test_it_ends_where_the_model_does(chat, answers):
    [_, answer] = answers("hello", most=200)
    assert 0 < len(answer["content"].encode()) < 199  # by its end token
    out, err = chat("hello\n")
    assert out == answer["content"] + "\n" and "cut" not in err
    out, err = chat("hello\n", "--max-new-tokens", "3")
    assert "jsparse: the answer was cut after 3 tokens (--max-new-tokens allows more)" in err
    stop = answer["content"][4:6]
    assert chat("hello\n", "--stop", stop)[0] == answer["content"].partition(stop)[0] + "\n"


def test_a_message_of_several_lines_that_does_not_end(chat):
    out, err = chat('"""one\ntwo\n', code=2)
    assert out == "" and 'the input ends within a message that began with """' in err
    chat('"""one\ntwo\n', terminal=True)  # Ctrl-D ends the conversation there too


@pytest.mark.parametrize("command", ["/exit", "/quit", " /exit now"])
def test_exit_ends_it(chat, answers, command):
    out, _ = chat(f"hello\n{command}\nhello\n", "--max-new-tokens", "8")
    assert out == spoken(answers("hello"))


def test_later_answers_have_later_seeds(chat, folder):
    """Without --seed, every conversation has its own."""
    sampled, text = ["--max-new-tokens", "8", "--temperature", "1"], "hello\n/reset\nhello\n/stats\n"
    out, err = chat(text, *sampled, "--seed", "4294967295")
    model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
    ids = load_chat_template(folder).encode([{"role": "user", "content": "hello"}])
    how = SamplingParams(temperature=1)
    texts = [
        generate(model, [ids], 8, how, seed=seed, tokenizer=tokenizer).texts[0] for seed in (2**32 - 1, 0)
    ]
    assert out == "".join(text + "\n" for text in texts) and texts[0] != texts[1]
    assert err.count("answer 1: ") == 1 and "answer 2" not in err and "; seed 4294967295\n" in err
    assert len({re.findall("seed [0-9]+", chat(text, *sampled)[1])[0] for _ in range(2)}) == 2


def test_what_a_terminal_would_obey_is_not_printed(chat, answers):
    [_, answer] = answers("hello", most=200)
    controls = set(map(chr, range(32))) - set("\n\t\r")
    assert controls & set(answer["content"]) and chat("hello\n")[0] == answer["content"] + "\n"
    shown = chat("hello\n", terminal=True)[0]
    assert answer["content"][:2] in shown and not controls & set(shown)


def test_stats_tell_what_the_cache_had(chat):
    """The second prompt has the first one, of which all but the last page is in the cache."""
    _, err = chat("x" * 100 + "\nhi\n/stats\n", "--max-new-tokens", "2")
    assert re.search(
        r"answer 1: prompt of 103 tokens, 0 of them in the cache; [\d.]+ s to the first of ", err
    )
    assert re.search(r"answer 2: prompt of \d+ tokens, 64 of them in the cache; ", err)
    assert re.search(r"cache of [\d.]+ MiB; the model's max_position_embeddings=256\n", err)


def test_a_conversation_may_fill_the_context(chat, answers):
    """An answer gets the room that is left, and a message that leaves none is refused."""
    text = "x" * 250
    out, err = chat(text + "\n", "--min-tokens", "5")
    assert len(out.encode()) <= 3 * 4 and "the answer was cut where the model's context ends; /reset" in err
    _, err = chat(text + "xxx\n", code=2)
    assert "the conversation has 256 tokens, which leaves no room for an answer within the model's" in err
    assert "max_position_embeddings=256; /reset begins anew" in err


def test_a_base_model_goes_on_with_the_text(chat, capfd, tmp_path):
    out, err = chat(f"import os\n  def f(\n/save {tmp_path}/text.json", model="models/small")
    assert "what you type is added to the text" in err and "cut" not in err
    main(["generate", "--model", "models/small", "--prompt", "import os"])
    first = capfd.readouterr().out
    main(["generate", "--model", "models/small", "--prompt", f"import os{first[:-1]}  def f("])
    assert out == first + capfd.readouterr().out
    saved = json.loads((tmp_path / "text.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant", "user", "assistant"]
    _, err = chat("/system be short\n", model="models/small", code=2)
    assert "the model has no chat template, so it takes no system prompt" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/sav x\n", "/sav is no command; commands are /system, /save, /reset, /stats, /help and /exit"),
        ("/help me\n", "/help takes nothing, not 'me'"),
        ("/reset all\n", "/reset takes nothing, not 'all'"),
        ("caf\udce9\n", "the line 'caf\\udce9' is not UTF-8 text"),
        ("/save\n", "/save takes the name of a file"),
        ("/save chat_template.jinja\n", "chat_template.jinja exists already, and is not this conversation's"),
        ("/save nowhere/talk.json\n", "'nowhere/talk.json'"),
        ("/save ~nobody-of-this-name/talk.json\n", "'~nobody-of-this-name/talk.json'"),
    ],
)
def test_lines_that_cannot_be_followed(chat, folder, answers, monkeypatch, text, message):
    """The conversation goes on, and the exit code tells."""
    monkeypatch.chdir(folder)
    out, err = chat(text + "hello\n", "--max-new-tokens", "8", code=2)
    assert f"jsparse: error: {message}" in err.replace("[Errno 2] No such file or directory: ", "")
    assert out == spoken(answers("hello"))


def test_bad_options(chat, folder, tmp_path):
    file = tmp_path / "talk.json"
    for content, message in [
        ([{"role": "critic", "content": "bad"}, {"role": "user", "content": "x"}], "no critics"),
        ([{"content": "x"}], "messages[0].role must be a text"),
        ({"prompt": "x"}, "no messages"),
    ]:
        file.write_text(json.dumps(content))
        out, err = chat("hi\n", "--messages", str(file), code=2)
        assert out == "" and message in err and (message == "no critics" or str(file) in err)
    file.write_text(json.dumps([{"role": "user", "content": ["parts"]}]))
    assert (
        "messages[0].content must be a text for a model without"
        in chat("", "--messages", str(file), model="models/small", code=2)[1]
    )
    with pytest.raises(SystemExit):
        main(["chat", "--model", str(folder), "--messages", str(file), "--system", "be short"])
    # Before the weights, and before the first message.
    for options, message in [
        (["--min-tokens", "9", "--max-new-tokens", "4"], "min_tokens=9 must be at most max_new_tokens=4"),
        (["--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1, not 0"),
        (["--seed", "-1"], "seed must be an integer from 0"),
    ]:
        assert message in chat("", *options, code=2)[1]


def test_errors_and_interrupts_leave_a_conversation_in_a_terminal(chat, answers, monkeypatch, tmp_path):
    """What an answer that broke off has done to the cache is forgotten. The first calls are the warm-up's."""
    add, step, calls = Batch.add, Batch.step, []

    def breaking(method, at, error):
        def call(self, *arguments):
            events = method(self, *arguments)  # the state before is gone
            calls.append(method)
            if calls.count(method) == at:
                raise error
            return events

        return call

    monkeypatch.setattr(Batch, "add", breaking(add, 3, RuntimeError("RESOURCE_EXHAUSTED: no memory")))
    monkeypatch.setattr(Batch, "step", breaking(step, 4, KeyboardInterrupt()))
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "x" * 300}]))
    options = ["--messages", str(file), "--max-new-tokens", "8"]
    out, err = chat("/reset\nhello\nhello\nhello\nwhy?\n/save " + str(file), *options, terminal=True)
    assert json.loads(file.read_text()) == answers("hello", "why?") and "> " in out
    errors = re.findall("jsparse: (error: .{20}|interrupted)", err)
    assert errors == ["error: the conversation has", "interrupted", "error: RESOURCE_EXHAUSTED: "]


def test_an_interrupt_while_an_answer_is_printed(chat, answers, monkeypatch, tmp_path):
    flushes = []

    def interrupted_print(*texts, flush=False, **named):
        if flush and "file" not in named:
            flushes.append(texts)
            if len(flushes) == 3:
                raise KeyboardInterrupt
        print(*texts, flush=flush, **named)

    monkeypatch.setattr(console, "print", interrupted_print, raising=False)
    long = "x" * 100
    text = f"{long}\n{long}\n/stats\n/save {tmp_path}/talk.json"
    _, err = chat(text, "--max-new-tokens", "8", terminal=True)
    assert json.loads((tmp_path / "talk.json").read_text()) == answers(long)
    assert "answer 1: prompt of 103 tokens, 64 of them in the cache" in err


def test_logits_that_are_not_finite(folder, chat, tmp_path):
    model = Llama.from_pretrained(folder)
    assert model.lm_head is not None
    model.lm_head.kernel[...] *= float("nan")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text((folder / name).read_text())
    message = "error: the logits are not finite after 0 tokens\n"
    assert chat("hello\nhello\n", model=tmp_path, code=2)[1].count(message) == 1
    assert chat("hello\nhello\n", model=tmp_path, terminal=True)[1].count(message) == 2


def test_closed_files(folder):
    """As a shell's <&- and >&- leave them."""
    command = [sys.executable, "-m", "jsparse", "chat", "--model", str(folder), "--max-new-tokens", "1"]

    for redirection in ("<&-", ">&-"):
        shell = ["sh", "-c", f'echo hello | "$@" {redirection}', "sh", *command]
        closed = subprocess.run(shell, capture_output=True, text=True, check=False)
        assert closed.returncode == 2
        assert closed.stderr.startswith("jsparse: error: a conversation needs standard input and output")


def test_an_answer_that_the_user_ends(folder, capfd, monkeypatch):
    """One Ctrl-C ends the answer, of which the conversation keeps what there is; another ends the program."""
    tokenizer, config = load_tokenizer(folder), load_config(folder)
    talk = Chat(
        Conversation(Llama.from_pretrained(folder), CacheConfig(policy="dense"), tokenizer),
        config,
        tokenizer,
        load_chat_template(folder),
        Prompt(),
        max_new_tokens=100,
        sampling=SamplingParams(ignore_eos=True),
        seed=0,
    )

    def pressed(times, stopped):
        for number, part in enumerate(talk.say("hello", stopped), start=1):
            yield part
            for _ in range(times if number == 4 else 0):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    before = signal.getsignal(signal.SIGINT)
    _print_answer(talk, functools.partial(pressed, 1), interactive=True)
    assert [turn.new_tokens for turn in talk.turns] == [4] and talk.turns[0].finish_reason is None
    assert for_terminal(talk.messages[1]["content"]) + "\n" == capfd.readouterr().out
    for times, interactive in ((2, True), (1, False)):
        with pytest.raises(KeyboardInterrupt):
            _print_answer(talk, functools.partial(pressed, times), interactive=interactive)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_space_before_an_answer_is_not_part_of_it(chat, tmp_path):
    """SentencePiece's words begin with one, which the text of a message by itself does not have."""
    words = {"<s>": 0, "</s>": 1} | {f"\u2581{word}": 2 + n for n, word in enumerate("to be or not".split())}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    config = LlamaConfig.tiny(vocab_size=len(words), initializer_range=0.5, eos_token_ids=(1,))
    Llama(config, rngs=nnx.Rngs(1)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}{% endfor %}<s>")
    out, _ = chat(f"to be\n/save {tmp_path}/talk.json", "--max-new-tokens", "4", model=tmp_path)
    ids = load_chat_template(tmp_path).encode([{"role": "user", "content": "to be"}])
    tokens = generate(Llama.from_pretrained(tmp_path), [ids], 4).tokens[0]
    assert tokens[0] > 1 and out == tokenizer.decode(tokens) + "\n"
    assert json.loads((tmp_path / "talk.json").read_text())[1]["content"] == out[:-1]


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "jsparse", *arguments]
        env = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)

    def type(self, text):
        os.write(self.ours, text.encode())

    def interrupt_until(self, pattern):
        """Press Ctrl-C until a pattern comes: between its prompt and its wait, input() does not notice."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.until(pattern, seconds=2)
        raise AssertionError(pattern)

    def until(self, pattern, seconds=120):
        """What it prints, up to a pattern."""
        text, end = "", time.monotonic() + seconds
        while not re.search(pattern, text):
            assert select.select([self.ours], [], [], max(0, end - time.monotonic()))[0], text
            text += os.read(self.ours, 4096).decode(errors="replace")
        return text


def test_in_a_terminal(folder):
    """Errors and Ctrl-C do not end the conversation."""
    endless = ["--max-new-tokens", "100000", "--temperature", "1"]
    terminal = Terminal("chat", "--model", "models/small", *endless)
    terminal.until("/help; Ctrl-D ends.*\n> ")
    terminal.type("/nothing\n")
    terminal.until("jsparse: error: /nothing is no command.*\n> ")
    terminal.type("import os\n")
    terminal.until("import os\r\n[^>]{40}")  # in the middle of an answer
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("\n> ")
    terminal.type("and\n")
    terminal.until("and\r\n[^>]{40}")
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("\n> ")
    terminal.type("/stats\n")
    assert len(re.findall(r"first of \d+ new", terminal.until("MiB.*\n> "))) == 2
    terminal.type("a line that")
    terminal.interrupt_until("\n> ")  # at the prompt, it drops the line
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
