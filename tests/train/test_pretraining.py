"""Pretraining: rows ask for what they say, and a run is one run however often it stops."""

import contextlib
import json
import re
import shlex
import shutil

import jax
import numpy as np
import optax
import pytest

from jsparse.__main__ import main
from jsparse.models import Llama, load_tokenizer, train_tokenizer
from jsparse.texts import tasks
from jsparse.texts.passkeys import WORDS as PASSKEY_WORDS
from jsparse.texts.tokenizer import END_OF_TEXT
from jsparse.train import PretrainConfig, pretrain, pretrain_config, pretraining
from jsparse.train.data.curriculum import KINDS, NOT_SCORED, TEXT, Lessons, Stage
from jsparse.train.run import loop
from jsparse.train.run.identity import checkpoint_folder

COPY, RECALL, CHAIN, PASSKEY, COMMON = map(KINDS.index, ("copy", "recall", "chain", "passkey", "common"))
TEXT_SAMPLE = "def first(items):\n    for item in items:\n        return item\n\n\n" * 100


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT_SAMPLE], 512, (*tasks.WORDS, *PASSKEY_WORDS))


@pytest.fixture(scope="module")
def lessons(tokenizer):
    return Lessons(tokenizer, np.array(tokenizer.encode(TEXT_SAMPLE).ids))


def rows(lessons, kind, length, count=8, seed=0):
    return list(zip(*lessons.batch(Stage(1, length, count, {kind: 1.0}), 0, seed), strict=True))


def answers(tokens, kinds, kind):
    """(place, token) of each answer of a kind."""
    return [(place, int(tokens[place])) for place in np.flatnonzero(kinds == kind)]


def test_tokenizer_gives_back_every_text_and_one_token_a_word_and_digit(tokenizer):
    text = " amber and tulip: 123\n\tname = 'é' <|endoftext|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id(END_OF_TEXT) not in ids
    assert len(tokenizer.encode(" amber").ids) == 1
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 258: 256 bytes, 1 words"):
        train_tokenizer(["text"], 256, ["word"])


@pytest.mark.parametrize("kind", ["text", "copy", "recall", "far", "list", "passkeys"])
@pytest.mark.parametrize("length", [256, 512])
def test_rows_are_full_and_some_of_each_counts(lessons, kind, length):
    for tokens, kinds in rows(lessons, kind, length):
        assert tokens.shape == kinds.shape == (length,)
        assert (kinds >= 0).any() and kinds.min() >= NOT_SCORED and kinds.max() < len(KINDS)


def test_batches_follow_from_seed_and_step_and_have_all_kinds(lessons):
    stage = Stage(1, 256, 8, {"recall": 0.5, "list": 0.25, "copy": 0.25})
    first, again, next_step, other_seed = (
        lessons.batch(stage, step, seed) for step, seed in ((3, 0), (3, 0), (4, 0), (3, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, next_step) and not np.array_equal(first, other_seed)
    for step in range(5):
        _, kinds = lessons.batch(stage, step, 0)
        assert {RECALL, COMMON, COPY} <= set(kinds.ravel())


def test_copies_repeat_what_came_before(lessons):
    for tokens, kinds in rows(lessons, "copy", 128):
        period = int((kinds == NOT_SCORED).sum())
        np.testing.assert_array_equal(tokens[period:], tokens[:-period])
        assert 16 <= period <= 64 and (kinds[period:] == COPY).all()


@pytest.mark.parametrize("kind_of_row", ["recall", "far"])
def test_what_is_recalled_was_said(lessons, tokenizer, kind_of_row):
    """Read as text: every answer is what its key was said to be, and a chain ends with no other key."""
    seen = dict.fromkeys((RECALL, CHAIN, PASSKEY), 0)
    for tokens, kinds in rows(lessons, kind_of_row, 1024, count=20):
        words = [tokenizer.decode([token]).strip() for token in tokens.tolist()]
        for kind in (RECALL, CHAIN):
            for place in np.flatnonzero(kinds == kind):
                if tokens[place] in tokenizer.encode(" is").ids:
                    continue  # between the words of a chain
                before = tokenizer.decode(tokens[:place].tolist())
                key = [word for word in words[:place] if word in tasks.WORDS][-1]
                said = re.findall(rf"\n# {key}(?: is|\?)? ([a-z]+)\.", before)
                assert set(said) == {words[place]}
                seen[kind] += 1
        row = tokenizer.decode(tokens.tolist())
        chains = re.findall(r"# What is [a-z]+\? ((?:[a-z]+(?: is|\?)? )*[a-z]+)\.", row)
        assert chains and all(chain.split()[-1] in tasks.VALUES for chain in chains)
        digits = tokenizer.decode(tokens[kinds == PASSKEY].tolist()).split()
        assert len(set(digits)) <= 1
        if digits:
            said = tokenizer.decode(tokens[: np.flatnonzero(kinds == PASSKEY)[0]].tolist())
            assert f"The pass key is {digits[0]}." in said
            seen[PASSKEY] += 1
    assert min(seen.values()) > 3


def test_far_rows_say_each_key_once_and_then_ask_for_all(lessons, tokenizer):
    for tokens, kinds in rows(lessons, "far", 1024):
        row = tokenizer.decode(tokens.tolist())
        keys = re.findall(r"\n# (?:What is [a-z]+\? )?([a-z]+)(?: is|\?)? [a-z]+", row)
        said, asked = keys[: len(keys) // 2], keys[len(keys) // 2 :]
        assert len(said) == len(set(said)) >= 10 and sorted(said) == sorted(asked)
        first = np.flatnonzero((kinds == RECALL) | (kinds == CHAIN))[0]
        assert (kinds[first:] != TEXT).all()


def test_lists_ask_for_the_three_most_common_words(lessons, tokenizer):
    for tokens, kinds in rows(lessons, "list", 512):
        ends = np.flatnonzero(kinds == COMMON)[2::3]
        start = 0
        for end in ends:
            text = tokenizer.decode(tokens[start : end + 1].tolist())
            words, asked = text.split(tasks.LIST_QUESTION)
            listed = [word for word in re.findall(r"[a-z]+", words.split("list. Remember them.")[-1])]
            common = sorted(set(listed), key=listed.count)[-3:]
            assert sorted(listed.count(word) for word in asked.split()) == [
                listed.count(word) for word in common
            ]
            start = end + 1


def test_text_rows_are_stretches_of_the_text(lessons):
    text = " ".join(map(str, lessons.text))
    for tokens, kinds in rows(lessons, "text", 256):
        assert " ".join(map(str, tokens)) in text
        assert (kinds == TEXT).all()


def test_a_word_that_is_several_tokens_is_refused():
    plain = train_tokenizer([TEXT_SAMPLE], 300)
    with pytest.raises(ValueError, match="tokenizer must have 'acorn' as one token"):
        Lessons(plain, np.zeros(100, int))


# --- runs ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text(TEXT_SAMPLE)
    return file


def tiny(output, data, **changes):
    settings = {"context": 128, "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "layers": 1}
    settings |= {"q_heads": 2, "kv_heads": 1, "head_dim": 8, "stage_steps": 2, "text_steps": 1}
    settings |= {"final_steps": 2, "far_steps": 2, "batch_tokens": 256, "checkpoint_every": 3}
    return PretrainConfig(output=output, data=[data], **settings | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return pretrain(tiny(output, data), command="jsparse pretrain", progress=False)


def test_a_run_ends_in_a_hugging_face_folder(finished):
    assert finished.finished and [line["step"] for line in finished.metrics] == list(range(1, 10))
    model, tokenizer = Llama.from_pretrained(finished.output), load_tokenizer(finished.output)
    assert model.embed_tokens.embedding[...].dtype == "bfloat16"
    assert model.config.eos_token_ids == (tokenizer.token_to_id(END_OF_TEXT),)
    ids = tokenizer.encode("# amber is").ids
    assert np.isfinite(np.asarray(model(np.array([ids])))).all()
    record = json.loads((finished.output / "pretrain.json").read_text())
    assert record["command"] == "jsparse pretrain" and record["settings"]["seed"] == 0
    assert {"text", "recall"} <= set(record["last_steps"])


def test_the_loss_is_that_of_its_docstring(data, tokenizer, lessons):
    """From the logits, kind by kind: text by its mean, answers by the roots of their numbers."""
    config = tiny("out", data, text_weight=0.7)
    state, split = pretraining._start(config, tokenizer.token_to_id(END_OF_TEXT))
    tokens, kinds = lessons.batch(Stage(1, 256, 4, {"recall": 0.5, "list": 0.25, "copy": 0.25}), 0, 0)
    logits = np.asarray(split.join(state.params, split.frozen)(tokens), np.float64)[:, :-1]
    normalised = logits - logits.max(-1, keepdims=True)
    normalised -= np.log(np.exp(normalised).sum(-1, keepdims=True))
    nll = -np.take_along_axis(normalised, tokens[:, 1:, None], axis=-1)[..., 0]
    of_kind = {kind: kinds[:, 1:] == kind for kind in range(len(KINDS))}
    text = nll[of_kind[TEXT] | of_kind[KINDS.index("words")]].mean()
    answers = {kind: nll[where] for kind, where in of_kind.items() if KINDS[kind] not in ("text", "words")}
    weights = {kind: np.sqrt(len(each)) for kind, each in answers.items() if len(each)}
    assert len(weights) >= 3 and len(set(weights.values())) >= 3
    mean = sum(weight * answers[kind].mean() for kind, weight in weights.items()) / sum(weights.values())

    _, loss, counts = pretraining._pretrain_step(split, config)(state, tokens, kinds)
    assert float(loss) == pytest.approx(0.7 * text + mean, rel=1e-5)
    right = logits.argmax(-1) == tokens[:, 1:]
    assert counts.right.tolist() == [int(right[where].sum()) for where in of_kind.values()]


def test_muon_has_the_matrices_of_the_layers_and_rates_fall_to_zero_twice(data):
    config = tiny("out", data, final_steps=8, far_steps=4)
    state, _ = pretraining._start(config, 256)
    of_muon = jax.tree.leaves_with_path(
        pretrain_config._muon_matrices(state.params),
        is_leaf=lambda leaf: isinstance(leaf, optax.contrib.MuonDimensionNumbers),
    )
    names = {jax.tree_util.keystr(path) for path, _ in of_muon}
    assert len(names) == 7 and not any("embed" in name or "lm_head" in name for name in names)
    optimizer, ones = config.optimizer(), jax.tree.map(np.ones_like, state.params)
    opt_state, sizes = optimizer.init(state.params), []
    for _ in range(config.steps + 1):
        updates, opt_state = optimizer.update(ones, opt_state, state.params)
        sizes.append(max(float(abs(update).max()) for update in jax.tree.leaves(updates)))
    falls, rises, ends = config.steps - 5, config.steps - 4, config.steps
    assert 0 < sizes[falls] < sizes[rises] < max(sizes) and 0 == sizes[ends] < sizes[ends - 1] < sizes[rises]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished, data, tmp_path, monkeypatch):
    config = tiny(tmp_path / "stopped", data)
    asked = iter([False, False, False, True])

    @contextlib.contextmanager
    def stops_after_four():
        yield lambda: next(asked, False)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_noted", stops_after_four)
        stopped = pretrain(config, progress=False)
    assert not stopped.finished and len(stopped.metrics) == 4
    assert not (config.output_folder / "config.json").exists()
    resumed = pretrain(config, progress=False)
    assert resumed.finished and resumed.metrics == finished.metrics
    assert (resumed.output / "model.safetensors").read_bytes() == (
        finished.output / "model.safetensors"
    ).read_bytes()


def test_the_command_records_itself(data, tmp_path, capsys):
    options = "--context 64 --vocab-size 512 --hidden-size 16 --intermediate-size 32 --layers 1 --q-heads 2"
    options += " --kv-heads 1 --head-dim 8 --stage-steps 1 --text-steps 1 --final-steps 1 --far-steps 1"
    options += " --batch-tokens 256"
    command = ["pretrain", "--output", str(tmp_path / "out"), "--data", str(data), *options.split()]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: a model after 3 steps\n"
    record = json.loads((tmp_path / "out" / "pretrain.json").read_text())
    assert record["command"] == shlex.join(["jsparse", *command])


def test_a_folder_of_another_run_is_refused(finished, data, tmp_path):
    shutil.copytree(finished.output, tmp_path / "run")
    with pytest.raises(ValueError, match=r"belongs to another run: its seed is 0, here 1"):
        pretrain(tiny(tmp_path / "run", data, seed=1), progress=False)
    shutil.rmtree(checkpoint_folder(tmp_path / "run"))
    with pytest.raises(FileExistsError, match="has other files"):
        pretrain(tiny(tmp_path / "run", data), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 100}, "context=100 must be 64 times a power of two"),
        ({"context": 192}, "context=192 must be 64 times a power of two"),
        ({"stage_steps": 0}, "stage_steps must be an integer >= 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, not 0.0"),
        ({"text_weight": -1.0}, "text_weight must be a number >= 0"),
        ({"batch_tokens": 64}, "batch_tokens must be an integer >= 128, not 64"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295"),
    ],
)
def test_settings_out_of_range_are_refused(data, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny("out", data, **changes)


def test_data_that_cannot_be_used_is_refused_before_anything_is_written(data, tmp_path):
    short = tmp_path / "short.py"
    short.write_text("x = 1\n")
    with pytest.raises(ValueError, match="less than a row of context=128"):
        pretrain(tiny(tmp_path / "out", short), progress=False)
    with pytest.raises(FileNotFoundError, match="missing.py does not exist"):
        pretrain(tiny(tmp_path / "out", tmp_path / "missing.py"), progress=False)
    with pytest.raises(ValueError, match="vocab_size=300 must be at least"):
        pretrain(tiny(tmp_path / "out", data, vocab_size=300), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    with pytest.raises(FloatingPointError, match="a lower learning_rate may help|A lower learning_rate"):
        pretrain(
            tiny(tmp_path / "out", data, learning_rate=1e30, embedding_learning_rate=1e30), progress=False
        )


@pytest.mark.slow
def test_copying_is_learned_in_the_first_stage(data, tmp_path):
    """The claim that the curriculum rests on: induction appears within a few hundred short steps."""
    config = tiny(
        tmp_path / "out", data, context=64, hidden_size=128, intermediate_size=256, layers=2, q_heads=4,
        kv_heads=2, head_dim=32, stage_steps=300, final_steps=1, far_steps=1, batch_tokens=4096,
    )  # fmt: skip
    metrics = pretrain(config, progress=False).metrics
    assert np.mean([line["copy"]["right"] for line in metrics[280:300]]) > 0.8
