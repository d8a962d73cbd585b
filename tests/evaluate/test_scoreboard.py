"""The scoreboard: answers against generate and against one text at a time, and what is made of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse
from jsparse.__main__ import main
from jsparse.evaluate import METHODS, Method, ScoreboardConfig, greedy_answers, run_scoreboard
from jsparse.evaluate import scoreboard as board
from jsparse.evaluate.answers import Question, prefill_layouts
from jsparse.evaluate.scoreboard import token_budgets, wilson_interval
from jsparse.evaluate.scoreboard_report import GRID, markdown_table, print_scoreboard
from jsparse.models import Llama, load_tokenizer, shipped_model
from jsparse.serve import CacheConfig, SamplingParams, decode_logits, generate, loop
from jsparse.serve.layout import layout_of
from jsparse.texts.tasks import TASKS

CACHE = CacheConfig(
    capacity=64, page_size=8, logical_page_size=4, budget=16, prefill_chunk=16, sink=2, window=5
)
STREAMS = ((False, True),)


def cache(**fields):
    return dataclasses.replace(CACHE, **fields)


CACHES = [
    cache(),
    cache(policy="random", select_every=1),  # shares the prefill
    cache(streaming_heads=STREAMS, select_every=16, kv_bits=4),
]


@pytest.fixture(scope="module")
def questions():
    """Ragged in every part; one context is within the budget."""
    rng = np.random.default_rng(3)
    sizes = [(33, 9, 6), (40, 1, 1), (11, 13, 4)]

    def tokens(count):
        return rng.integers(0, 60, count).astype(np.int32)

    return [Question(tokens(context), tokens(tail), new) for context, tail, new in sizes]


# --- answers ---


def test_dense_answers_are_those_of_generate(small, questions):
    (answers,) = greedy_answers(small, questions, [cache(policy="dense")], batch_size=2)
    greedy = [SamplingParams(ignore_eos=True)] * 3
    prompts = [np.concatenate([q.context, q.tail]) for q in questions]
    expected = generate(small, prompts, 6, greedy, cache(policy="dense", budget=None)).tokens
    assert answers == [tokens[: q.new_tokens] for tokens, q in zip(expected, questions, strict=True)]


def test_each_answer_is_that_of_a_text_and_a_cache_alone(small, questions):
    """decode_logits feeds one token by one, in a cache of its own; the batches share prefills here."""
    found = greedy_answers(small, questions, CACHES, batch_size=2)
    assert len({str(answers) for answers in found}) == 3  # they do read different things
    for of_cache, answers in zip(CACHES, found, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            fed = np.zeros(20, np.int32)  # of one length, to compile once; what comes later changes nothing
            tokens = [*question.tail, *answer][:20]
            fed[: len(tokens)] = tokens
            logits = decode_logits(small, question.context, fed, of_cache)
            first = len(question.tail) - 1
            expected = np.argmax(logits[first : first + question.new_tokens], axis=-1)
            assert answer == expected.tolist()


def test_caches_that_differ_in_what_a_step_reads_share_a_prefill(small, questions, monkeypatch):
    prefills, prefill = [], loop.prefill
    monkeypatch.setattr(loop, "prefill", lambda *args: prefills.append(1) or prefill(*args))
    greedy_answers(small, questions, CACHES, batch_size=2)
    assert len(prefills) == 2 * 2  # of two batches; the first two caches share theirs


def test_what_is_shared_is_the_prefill_of_each_alone(small):
    def layout(name, budget=128):
        method = METHODS[name].cache(budget, np.array(STREAMS))
        return layout_of(dataclasses.replace(method, capacity=512, batch=1), small.config)

    names = ["dense", "random", "mean", "oracle", "lserve", "lserve-reuse-16", "lserve-flat", "quest", "int8"]
    shared = dict(zip(names, prefill_layouts([layout(name) for name in names]), strict=True))
    assert len(set(shared.values())) == 4
    assert len({shared[name] for name in names[:6]}) == 1
    logical = {name: {layer.logical_page_size for layer in of.layers} for name, of in shared.items()}
    assert logical["lserve"] == {16} and logical["lserve-flat"] == {64}
    assert shared["quest"].page_size == 16 and shared["int8"].kv_bits == 8
    budgets = prefill_layouts([layout("lserve", budget) for budget in (128, 256)])
    assert budgets[0] == budgets[1]
    (dense,) = prefill_layouts([layout("dense")])
    assert {layer.logical_page_size for layer in dense.layers} == {None}
    assert len(set(prefill_layouts([layout("streaming", budget) for budget in (128, 256)]))) == 2


def test_logits_that_are_not_finite_are_an_error(small, questions):
    graph, state = nnx.split(small)
    broken = nnx.merge(graph, state)
    embedding = broken.embed_tokens.embedding
    broken.embed_tokens.embedding = nnx.Param(embedding[...].at[60].set(jnp.nan))
    with pytest.raises(FloatingPointError, match="not finite with the cache CacheConfig"):
        question = dataclasses.replace(questions[0], tail=np.array([60], np.int32))
        greedy_answers(broken, [questions[1], question], [cache()], batch_size=2)
    with pytest.raises(FloatingPointError, match="not finite after a prompt"):
        question = dataclasses.replace(questions[0], context=np.array([60], np.int32))
        greedy_answers(broken, [questions[1], question], [cache()], batch_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": np.zeros(0, np.int32)}, r"questions\[1\].tail must be one id or more"),
        (
            {"context": np.array([61], np.int32)},
            r"questions\[1\].context must be .*vocab_size=61\), not \[61\]",
        ),
        ({"new_tokens": 0}, r"questions\[1\].new_tokens must be at least 1, not 0"),
        ({"new_tokens": 60}, "more than capacity=64"),
        ({"caches": []}, "must not be empty, not 2 and 0"),
        ({"caches": [cache(batch=2)]}, r"caches\[0\].batch must be None, not 2"),
        ({"caches": [cache(num_pages=9)]}, r"caches\[0\].num_pages must be None, not 9"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_questions_are_refused(small, questions, change, message):
    arguments = {name: change.pop(name) for name in ("caches", "batch_size") if name in change}
    asked = [questions[0], dataclasses.replace(questions[1], **change)]
    with pytest.raises(ValueError, match=message):
        greedy_answers(small, asked, **{"caches": [cache()], "batch_size": 2} | arguments)


# --- the scoreboard ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_model):
    """A model too small to answer anything, with a tokenizer for which short texts suffice."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 1536, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    save_tiny_model(folder, num_hidden_layers=1, max_position_embeddings=512, **sizes)
    shutil.copy(shipped_model() / "tokenizer.json", folder)
    jsparse.HeadPattern([[0.9, 0.1]]).save(folder / "full_attention_heads.tsv")
    return folder


@pytest.fixture
def settings(folder):
    """Options of ScoreboardConfig for texts of 320 tokens; budgets are 128 and 192."""

    def make(**fields):
        small = {"length": 320, "samples": 2, "seeds": 2, "budgets": (0.4, 0.6), "batch_size": 4}
        grid = {"grid_samples": 2, "grid_budget": 0.4, "grid_lengths": (160, 320), "depths": (0.0, 1.0)}
        return ScoreboardConfig(model=folder, **{**small, **grid, **fields})

    return make


@pytest.fixture
def perfect(monkeypatch):
    """Answers that are right wherever a cache reads everything or is given 192 tokens; what was asked."""
    tokenizer, calls = load_tokenizer(shipped_model()), []

    def answer(model, questions, caches, *, batch_size):
        calls.append((questions, caches))
        right = [tokenizer.encode(expected.pop(0)).ids for _ in questions]
        knows = (cache.policy == "dense" or cache.budget in (None, 192) for cache in caches)
        return [right if known else [[0]] * len(right) for known in knows]

    expected = []
    for name, make in list(TASKS.items()):

        def remembered(*args, make=make):
            example = make(*args)
            expected.append(" ".join(example.expected))
            return example

        monkeypatch.setitem(TASKS, name, remembered)
    monkeypatch.setattr(board, "needle", TASKS["needle"])
    monkeypatch.setattr(board, "greedy_answers", answer)
    return calls


def test_every_method_answers_every_task_at_every_budget(settings, perfect, tmp_path):
    config = settings(json=tmp_path / "s.json", output=tmp_path / "out")
    rows = run_scoreboard(config)
    assert json.loads(config.json.read_text()) == rows
    table = [row for row in rows if row["task"] != GRID]
    keys = [(row["task"], row["method"], row["budget"]) for row in table]
    budgets = {name: [128, 192] if method.budgeted else [None] for name, method in METHODS.items()}
    assert keys == [(task, name, budget) for task in TASKS for name in METHODS for budget in budgets[name]]
    for row in table:
        assert set(row) == set("model task method budget length score low high samples seed_scores".split())
        assert row["length"] == 320 and row["samples"] == 4 and len(row["seed_scores"]) == 2
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        if METHODS[row["method"]].budgeted and row["method"] != "streaming":
            assert row["score"] == (row["budget"] == 192)
    grid = [row for row in rows if row["task"] == GRID]
    assert {row["model"] for row in rows} == {str(config.model)}
    assert len(grid) == len(config.grid_methods) * 2 * 2
    assert {(row["length"], row["depth"]) for row in grid} == {(n, d) for n in (160, 320) for d in (0.0, 1.0)}
    assert all(row["score"] == (row["method"] == "dense" or row["budget"] is None) for row in grid[:2])
    for name in ("scoreboard.png", "needle_grid.png"):
        assert (config.output / name).read_bytes().startswith(b"\x89PNG")
    assert (config.output / "scoreboard.md").read_text().count("\n| ") == len(METHODS)


def test_the_grid_gives_each_depth_its_own_scores(settings, monkeypatch):
    """Right are needles in the second half only: depths and lengths must not change places."""

    def scores(config, model, tokenizer, examples, entries):
        def found(example):
            (value,) = tokenizer.encode(f" {example.expected[0]}").ids
            (place,) = np.flatnonzero(example.context == value)
            return float(place > len(example.context) / 2 or len(example.context) < 200)

        return {key: [found(example) for example in examples] for key in entries}

    monkeypatch.setattr(board, "_scores", scores)
    rows = run_scoreboard(settings(tasks=("needle",), grid_methods=("dense", "lserve"), depths=(0.0, 0.9)))
    grid = [row for row in rows if row["task"] == GRID]
    assert len(grid) == 2 * 2 * 2
    assert all(row["score"] == (row["depth"] == 0.9 or row["length"] == 160) for row in grid)


def test_every_method_sees_the_same_texts_whatever_else_is_measured(settings, perfect):
    run_scoreboard(settings(grid_methods=()))
    every = perfect.copy()
    assert [len(questions) for questions, _ in every] == [4] * len(TASKS)  # once for all methods
    perfect.clear()
    run_scoreboard(settings(grid_methods=(), tasks=("recall",), methods=("quest",)))
    ((questions, _),) = perfect
    for one, other in zip(questions, every[list(TASKS).index("recall")][0], strict=True):
        np.testing.assert_array_equal(one.context, other.context)
        np.testing.assert_array_equal(one.tail, other.tail)
    assert len({question.context.tobytes() for question in questions}) == 4  # and all of them are different


def test_the_model_answers_for_itself_and_a_method_is_one_entry(settings, monkeypatch):
    """No fake here: scores, twice the same, and a new method that is lserve by another name."""
    entry = Method(lambda budget, _: CacheConfig(budget=budget), "as lserve")
    monkeypatch.setitem(METHODS, "mine", entry)
    config = settings(tasks=("needle",), methods=("dense", "lserve", "mine"), budgets=(0.4,), grid_methods=())
    rows = run_scoreboard(config)
    assert rows == run_scoreboard(config)
    dense, lserve, mine = rows
    assert mine == lserve | {"method": "mine"} and dense["budget"] is None


def test_rows_name_the_commit_of_an_id(settings, perfect, hub_cache, store_snapshot):
    config, commit = settings(tasks=("needle",), grid_methods=()), "a" * 40
    files = {file.name: file.read_bytes() for file in Path(config.model).iterdir() if file.is_file()}
    store_snapshot(hub_cache, "org/name", commit, files, main=commit)
    rows = run_scoreboard(dataclasses.replace(config, model="org/name"))
    assert {row["model"] for row in rows} == {f"org/name@{commit}"}
    assert board._model_name(str(shipped_model())) == "the shipped model"


def test_without_a_pattern_its_methods_are_left_out(settings, perfect, tmp_path, capsys):
    config = settings(tasks=("needle",), grid_methods=())
    shutil.copytree(config.model, tmp_path / "model")
    (tmp_path / "model" / "full_attention_heads.tsv").unlink()
    rows = run_scoreboard(dataclasses.replace(config, model=tmp_path / "model"))
    assert {row["model"] for row in rows} == {str(tmp_path / "model")}
    heads = {"right-heads", "wrong-heads", "lserve-heads"}
    assert {row["method"] for row in rows} == set(METHODS) - heads
    assert "right-heads, wrong-heads, lserve-heads left out" in capsys.readouterr().err


def test_right_and_wrong_heads_are_each_others_complement():
    streams = np.array([[True, False], [True, True]])
    right, wrong = (
        np.array(METHODS[f"{n}-heads"].cache(None, streams).streaming_heads) for n in ("right", "wrong")
    )
    assert (right == streams).all() and (wrong == ~streams).all()
    streaming = METHODS["streaming"].cache(256, None)
    assert streaming.sink + streaming.window == 256


def test_budgets_are_whole_pages():
    assert token_budgets([1 / 16, 0.13, 1 / 2], 2048) == [128, 256, 1024]
    with pytest.raises(ValueError, match="budgets: 0.05 of length=1000 is 64 tokens .* must be at least 128"):
        token_budgets([0.5, 0.05], 1000)
    with pytest.raises(ValueError, match="budgets: 0.5 and 0.51 of length=1024 are both 512 tokens"):
        token_budgets([0.25, 0.5, 0.51], 1024)


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.5, 1.0])
def test_the_interval_is_wilsons(mean):
    """Its ends are the shares p whose distance from the mean is 1.96 of their standard deviations."""
    for end in wilson_interval(mean, 36):
        assert (mean - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 36, abs=1e-9)
    low, high = wilson_interval(mean, 36)
    assert 0 <= low <= mean <= high <= 1 and high - low > 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ("needles",)}, "tasks must be of passkey, needle.*, not 'needles'"),
        ({"methods": ("dense", "magic")}, "methods must be of dense.*, not 'magic'"),
        ({"methods": ("dense", "dense")}, "methods must name each once, not dense, dense"),
        ({"methods": ()}, "methods must not be empty"),
        ({"budgets": (0.5, 1.0)}, "fractions of --length between 0 and 1, not 1.0"),
        ({"depths": (0.0, 2.0)}, "depths must be from 0 to 1, not 2.0"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"length": 513}, "length=513 must be from 1 to the model's max_position_embeddings=512"),
        ({"length": 300, "budgets": (0.2,)}, "budgets: 0.2 of length=300 is 64 tokens"),
        ({"grid_lengths": (512,)}, "grid_lengths must be from 1 to length=320, not 512"),
        ({"grid_lengths": (30,)}, "length=30 is too short"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(settings, monkeypatch, fields, message):
    monkeypatch.setattr(Llama, "from_pretrained", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        run_scoreboard(settings(**fields))


def test_bad_files_are_refused_before_weights_are_read(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(Llama, "from_pretrained", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(FileNotFoundError, match="json: the folder of"):
        run_scoreboard(settings(json=tmp_path / "no" / "s.json"))
    with pytest.raises(FileNotFoundError, match="output: the folder of"):
        run_scoreboard(settings(output=tmp_path / "no" / "out"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="haystack: .*latin is not UTF-8"):
        run_scoreboard(settings(haystack=(tmp_path / "latin",)))
    (tmp_path / "short").write_text("Too short.")
    with pytest.raises(ValueError, match=r"length=320 needs \d+ tokens of haystack, but it has"):
        run_scoreboard(settings(haystack=(tmp_path / "short",)))
    (tmp_path / "pattern.tsv").write_text("0.1\t0.2\n0.3\t0.4\n")
    with pytest.raises(ValueError, match=r"streaming_heads is \(2, 2\), but must be \(1, 2\)"):
        run_scoreboard(settings(pattern=tmp_path / "pattern.tsv"))


def test_a_tokenizer_of_another_model_is_refused(settings, tmp_path):
    config = settings()
    shutil.copytree(config.model, tmp_path / "model")
    other = json.loads((tmp_path / "model" / "config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "model" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"token id \d+, but the model's vocabulary has 300 entries"):
        run_scoreboard(dataclasses.replace(config, model=tmp_path / "model"))


def test_a_tokenizer_that_truncates_and_starts_texts_is_taken_as_it_is_meant(settings, perfect, tmp_path):
    from tokenizers.processors import TemplateProcessing

    config = settings(tasks=("needle",), methods=("dense",), grid_methods=())
    shutil.copytree(config.model, tmp_path / "model")
    tokenizer = load_tokenizer(config.model)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    first = tokenizer.id_to_token(0)
    tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    run_scoreboard(dataclasses.replace(config, model=tmp_path / "model"))
    for question in perfect[0][0]:
        assert question.context[0] == 0 and len(question.context) > 256
        assert len(question.context) + len(question.tail) + question.new_tokens == 320


def test_the_command(settings, perfect, tmp_path, capsys):
    options = (
        "--length 320 --samples 1 --seeds 1 --budgets 0.4 0.6 --tasks needle recall --grid-methods dense"
    )
    options += " --grid-lengths 160 --grid-samples 1 --grid-budget 0.4"
    command = ["evaluate", "scoreboard", "--model", str(settings().model), *options.split()]
    assert main([*command, "--json", str(tmp_path / "s.json")]) == 0
    out = capsys.readouterr().out
    assert "128 192" in out and all(name in out for name in METHODS)
    assert json.loads((tmp_path / "s.json").read_text())
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "s.json").read_text())
    with pytest.raises(SystemExit):
        main([*command, "--seed", "x"])
    assert main([*command, "--length", "5000"]) == 2
    assert "length=5000 must be from 1" in capsys.readouterr().err


def test_tables_of_budgets_where_one_is_too_wide(settings, perfect, capsys, monkeypatch):
    rows = run_scoreboard(settings())
    print_scoreboard(rows, "a model")
    assert capsys.readouterr().out.count("lserve-reuse-16") == 1
    monkeypatch.setattr("jsparse.evaluate.scoreboard_report._WIDTH", 80)
    print_scoreboard(rows, "a model")
    out = capsys.readouterr().out
    assert out.count("lserve-reuse-16") == 2 and "a budget of 192 tokens" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "| lserve | 0 / 100 |" in markdown_table(rows)
