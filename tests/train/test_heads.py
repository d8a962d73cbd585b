"""Learned head patterns: the mixing, its gradient, what is learned and what is written."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import jsparse
from jsparse.models import Llama, LlamaConfig, byte_tokenizer
from jsparse.texts.passkeys import passkey_batch
from jsparse.train import HeadsConfig, learn_heads
from jsparse.train.head_gates import gate_loss, mixed_attend

SINK, WINDOW = 1, 8
LAYERS, KV_HEADS, GROUP = 2, 2, 2
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)
IS_ANSWER = np.zeros(TOKENS.shape, bool)
IS_ANSWER[0, 25:30] = IS_ANSWER[1, [12, 13, 37]] = True


def random_model(vocab_size=50, model_type="llama", **fields) -> Llama:
    config = LlamaConfig.tiny(
        vocab_size=vocab_size,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        initializer_range=0.3,
        model_type=model_type,
        **fields,
    )
    return Llama(config, rngs=nnx.Rngs(0))


MODELS = {
    "llama": random_model(),
    "mistral": random_model(
        model_type="mistral", sliding_windows=(12, 12)
    ),  # full attention is this window there
}


def mixed_hidden(model, gates):
    return model.hidden(
        TOKENS, None, mixed_attend(model.config, jnp.asarray(gates), sink=SINK, window=WINDOW)
    )


def dense_attend(streams, full_windows=(None, None)):
    """A dense float64 computation: each KV head of a pattern sees the sink and the window, or its layer's
    own window.
    """

    def attend(layer, q, k, v):
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        query, key = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
        near = key > query - (full_windows[layer] or q.shape[1])
        local = (key < SINK) | (key > query - WINDOW)
        out = np.zeros(q.shape)
        for head in range(q.shape[2]):
            kv = head // GROUP
            scores = np.einsum("btd,bsd->bts", q[:, :, head], k[:, :, kv]) / np.sqrt(q.shape[-1])
            visible = (key <= query) & (local if streams[layer][kv] else near)
            weights = np.where(visible, np.exp(scores - scores.max()), 0.0)
            out[:, :, head] = weights / weights.sum(-1, keepdims=True) @ v[:, :, kv]
        return jnp.asarray(out, jnp.float32)

    return attend


@pytest.mark.parametrize("name", MODELS)
def test_open_gates_are_full_attention_and_closed_ones_streaming(name):
    model = MODELS[name]
    full = model.hidden(TOKENS, None, model.attend())
    np.testing.assert_array_equal(mixed_hidden(model, np.ones((LAYERS, KV_HEADS))), full)
    windows = model.config.sliding_windows
    for pattern in ([[0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 0], [0, 1]], [[0, 0], [1, 0]]):
        expected = model.hidden(TOKENS, None, dense_attend(pattern, windows))
        error = np.linalg.norm(mixed_hidden(model, 1.0 - np.array(pattern)) - expected)
        assert error <= 2e-6 * np.linalg.norm(expected)  # by norm: single entries depend on the CPU's sums
        if np.any(pattern):
            assert np.abs(expected - full).max() > 1e-2


def test_half_open_gates_mix_outputs():
    """Each query head by the gate of its KV head, not queries, scores or hidden states."""
    q, k, v = (
        np.random.default_rng(n).normal(size=(1, 30, h, 8)).astype(np.float32)
        for n, h in enumerate((4, 2, 2))
    )
    gates = np.array([[0.3, 0.9], [0.0, 0.6]], np.float32)
    attend = mixed_attend(MODELS["llama"].config, jnp.asarray(gates), sink=SINK, window=WINDOW)
    full, streaming = (dense_attend([[s, s]] * LAYERS) for s in (False, True))
    for layer in range(LAYERS):
        alpha = np.repeat(gates[layer], GROUP)[:, None]
        expected = alpha * full(layer, q, k, v) + (1 - alpha) * streaming(layer, q, k, v)
        np.testing.assert_allclose(attend(layer, *map(jnp.asarray, (q, k, v))), expected, atol=2e-6)


def loss_parts(gates, *, tokens=TOKENS, l1=0.05, remat=False):
    return gate_loss(gates, MODELS["llama"], tokens, IS_ANSWER, sink=SINK, window=WINDOW, l1=l1, remat=remat)


GATES = np.array([[0.8, 0.3], [0.5, 1.0]], np.float32)


def test_the_loss_counts_the_states_that_predict_answers():
    model = MODELS["llama"]
    full, mixed = (np.asarray(mixed_hidden(model, g), np.float64) for g in (np.ones((2, 2)), GATES))
    before = [(0, t) for t in range(24, 29)] + [(1, 11), (1, 12), (1, 36)]
    expected = np.mean([(full[at] - mixed[at]) ** 2 for at in before])
    loss, distance = loss_parts(jnp.asarray(GATES))
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, expected + 0.05 * (0.8 + 0.3 + 0.5 + 1.0) / 4, rtol=1e-5)
    assert loss_parts(jnp.ones((2, 2)), l1=0.0) == (0, 0)

    padded = TOKENS.copy()
    padded[0, 30:] = 0  # what follows the last answer
    padded[1, 38:] = 0
    np.testing.assert_allclose(loss_parts(jnp.asarray(GATES), tokens=padded)[0], loss, rtol=1e-5)


def test_the_gradient_is_what_finite_differences_say():
    value = jax.jit(lambda gates: loss_parts(gates)[0])
    expected = np.zeros(GATES.shape)
    for at in np.ndindex(GATES.shape):
        step = np.zeros(GATES.shape, np.float32)
        step[at] = 1 / 64

        def difference(n, step=step):
            return (float(value(GATES + n * step)) - float(value(GATES - n * step))) / (2 * n / 64)

        expected[at] = (4 * difference(1) - difference(2)) / 3  # Richardson: float32 allows no small steps

    gradient = jax.jit(jax.grad(lambda gates: loss_parts(gates, remat=True)[0]))(GATES)
    assert np.abs(gradient - expected).max() < 1e-4 * np.abs(expected).max()


# --- whole runs ---


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def silence(model, layer, head):
    """A KV head whose output is never read."""
    kernel = model.layers[layer].self_attn.o_proj.kernel
    rows = model.config.head_dim * GROUP
    kernel[...] = kernel[...].at[head * rows : (head + 1) * rows].set(0)


def look_near(model, layer, head):
    """A KV head that knows positions only, and attends to the token itself.

    Its queries and keys are one vector, and a vector turned by RoPE fits none as well as itself.
    """
    attention, dim = model.layers[layer].self_attn, model.config.head_dim
    for projection, size in ((attention.q_proj, GROUP * dim), (attention.k_proj, dim)):
        columns = slice(head * size, (head + 1) * size)
        projection.kernel[...] = projection.kernel[...].at[:, columns].set(0)
        projection.bias[...] = projection.bias[...].at[columns].set(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and a model with a head that looks near, a silent one, and two that see everything."""
    folder = tmp_path_factory.mktemp("heads")
    words = np.random.default_rng(0).choice(["cat", "dog", "sat", "ran", "on", "the", "mat"], 300)
    (folder / "text.txt").write_text(" ".join(words))
    model = random_model(vocab_size=257, attention_bias=True)
    look_near(model, 0, 1)
    silence(model, 1, 0)
    save(model, folder / "model")
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return HeadsConfig(
        model=folder / "model",
        data=(folder / "text.txt",),
        output=tmp_path / "pattern",
        context=160,
        min_context=120,
        lengths=3,
        needles=1,
        words=2,
        sink=SINK,
        window=WINDOW,
        steps=3,
    )


def test_learning_finds_the_heads_that_need_the_context(config, folder):
    result = learn_heads(dataclasses.replace(config, steps=100), progress=False)
    scores = result.pattern.scores
    assert len(result.losses) == 100 and result.losses[-1] < 0.7 * result.losses[0]
    assert scores.min() == 0 and scores.max() <= 1  # not below, where l1 would pull it
    assert scores[0, 1] < 0.05 and scores[1, 0] < 0.05  # looks near, silent
    assert scores[0, 0] > 0.5 and scores[1, 1] > 0.5
    np.testing.assert_array_equal(result.pattern.threshold(0.5), [[False, True], [True, False]])

    # The head that looks near is needed all the same, or its gate would show no more than the silent one's.
    model = Llama.from_pretrained(folder / "model")
    hidden = model.hidden(TOKENS, None, model.attend())
    silence(model, 0, 1)
    assert np.abs(model.hidden(TOKENS, None, model.attend()) - hidden).max() > 0.1


def test_without_a_price_no_gate_closes(config):
    """The control: it is l1 that closes gates, and only those that the distance does not hold."""
    result = learn_heads(dataclasses.replace(config, steps=30, l1=0.0), progress=False)
    assert result.pattern.scores.min() > 0.99
    np.testing.assert_array_equal(result.pattern.scores[1, 0], 1.0)  # no gradient reaches a silent head
    assert max(result.losses) < 1e-6


def test_files_are_what_was_learned_and_the_same_each_time(config, tmp_path):
    result = learn_heads(config, progress=False)
    assert result.output == config.output
    assert sorted(file.name for file in config.output.iterdir()) == [
        "config.json",
        "full_attention_heads.tsv",
        "losses.tsv",
    ]
    scores = jsparse.HeadPattern.load(config.output / "full_attention_heads.tsv").scores
    np.testing.assert_array_equal(scores, result.pattern.scores)
    assert scores.shape == (LAYERS, KV_HEADS) and scores.min() >= 0 and 0.9 < scores.max() < 1

    settings = json.loads((config.output / "config.json").read_text())
    assert settings["sink_size"] == SINK and settings["recent_size"] == WINDOW
    assert settings["l1"] == 0.05 and settings["min_context"] == 120 and settings["needles"] == 1
    assert settings["data"] == [str(config.data[0])]
    table = np.loadtxt(config.output / "losses.tsv", skiprows=1)
    np.testing.assert_array_equal(table[:, 0], [1, 2, 3])
    np.testing.assert_allclose(table[:, 1], result.losses, rtol=1e-5)
    np.testing.assert_allclose(table[:, 1], table[:, 2] + 0.05 * table[:, 3], rtol=1e-4)
    assert table[0, 2] < 1e-8 and table[0, 3] == 1  # all gates open: the model itself

    again = learn_heads(dataclasses.replace(config, output=tmp_path / "again"), progress=False)
    assert again.losses == result.losses
    np.testing.assert_array_equal(again.pattern.scores, scores)


def test_samples_begin_as_the_tokenizer_begins_texts_and_fill_one_shape(
    config, folder, tmp_path, monkeypatch
):
    model = save(Llama.from_pretrained(folder / "model"), tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=200)
    tokenizer.save(str(model / "tokenizer.json"))
    batches = []

    def spy(*arguments, **settings):
        batches.append(passkey_batch(*arguments, **settings))
        return batches[-1]

    monkeypatch.setattr("jsparse.train.heads.passkey_batch", spy)
    learn_heads(dataclasses.replace(config, model=model, steps=6), progress=False)
    assert {tokens.shape for tokens, _ in batches} == {(1, 160)}
    assert all(tokens[0, 0] == 256 for tokens, _ in batches)
    lengths = {int(np.flatnonzero(tokens[0]).max()) + 1 for tokens, _ in batches}
    assert lengths <= {120, 140, 160} and len(lengths) > 1
    assert all(answers.any() for _, answers in batches)


def test_the_checkpoint_dtype_can_be_changed(config):
    settings = {"dtype": "bfloat16", "remat": False, "batch_size": 2, "lengths": 1, "steps": 2}
    result = learn_heads(dataclasses.replace(config, **settings), progress=False)
    assert ((0.9 < result.pattern.scores) & (result.pattern.scores < 1)).all()


def test_a_loss_that_is_not_finite(config, tmp_path):
    model = random_model(vocab_size=257, attention_bias=True)
    kernel = model.layers[1].mlp.up_proj.kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
    broken = dataclasses.replace(config, model=save(model, tmp_path / "broken"))
    with pytest.raises(FloatingPointError, match="step 1: loss is nan"):
        learn_heads(broken, progress=False)
    assert not list(config.output.iterdir())


def test_the_learning_rate_rises_and_falls(config):
    def rates(steps, *at):
        return [dataclasses.replace(config, steps=steps).learning_rate_at(step) for step in at]

    expected = [0.002, 0.011, 0.02, 0.02, 0.02, 0.011, 0.002]
    np.testing.assert_allclose(rates(2000, 0, 200, 400, 1000, 1599, 1799, 1999), expected, rtol=1e-5)
    np.testing.assert_allclose(
        rates(10, *range(10)), 0.02 * np.array([0.1, 0.55] + [1] * 6 + [0.55, 0.1]), rtol=1e-5
    )
    assert rates(1, 0) == pytest.approx([0.002])
    for steps in (1, 2, 3, 4, 9, 10, 11, 57):
        formula = [
            0.02 * min(0.1 + 0.9 * min(step, steps - 1 - step) / max(steps // 5, 1), 1.0)
            for step in range(steps)
        ]
        np.testing.assert_allclose(rates(steps, *range(steps)), formula, rtol=1e-6)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data must name at least one text file"),
        ({"context": 1}, "context must be an integer >= 2, not 1"),
        ({"lengths": 0}, "lengths must be an integer >= 1, not 0"),
        ({"sink": -1}, "sink must be an integer >= 0, not -1"),
        ({"window": 0}, "window must be an integer >= 1, not 0"),
        ({"needles": 0}, "needles must be an integer >= 1"),
        ({"words": True}, "words must be an integer >= 1, not True"),
        ({"steps": 0}, "steps must be an integer >= 1, not 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295"),
        ({"l1": -0.1}, "l1 must be a number >= 0, not -0.1"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"dtype": "float16"}, "dtype must be one of None, 'float32', 'bfloat16', not 'float16'"),
        ({"min_context": 161}, "min_context=161 must be at most context=160"),
        ({"window": 119}, "sink=1 and window=119 show all of a sample of min_context=120 tokens; their sum"),
        ({"min_context": None, "window": 40}, r"min_context=40 tokens \(context // 4, for none was given\)"),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_what_is_allowed(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_settings_that_do_not_fit_the_files(config, folder, tmp_path):
    def check(error, message, **changes):
        with pytest.raises(error, match=message):
            learn_heads(dataclasses.replace(config, **changes), progress=False)
        assert not config.output.exists()

    message = (
        r"needles=2 of words=2 do not fit the shortest sample of 120 tokens: "
        r"2 \* \(needle of (\d+) \+ question and answer of (\d+)\) \+ 0 at the start = (\d+)"
    )
    check(ValueError, message, needles=2)
    with pytest.raises(ValueError) as error:
        learn_heads(dataclasses.replace(config, needles=2), progress=False)
    [(needle, question, total)] = [map(int, found) for found in re.findall(message, str(error.value))]
    assert 2 * (needle + question) == total > 120
    check(ValueError, "context=513 .* max_position_embeddings=512", context=513)
    check(FileNotFoundError, "no.txt does not exist", data=(tmp_path / "no.txt",))
    check(FileNotFoundError, "nothing", model=tmp_path / "nothing")
    (tmp_path / "short.txt").write_text("short " * 20)
    check(ValueError, "1 file.* with 120 tokens .* context=160", data=(tmp_path / "short.txt",))
    save(random_model(vocab_size=90), tmp_path / "model")
    check(ValueError, "text.txt has token id .* 90 entries", model=tmp_path / "model")
    (tmp_path / "numbers.txt").write_text("0123456789" * 20)  # only the passkeys have ids that are too large
    numbers = {"data": (tmp_path / "numbers.txt",)}
    check(ValueError, "tokenizer gives token id .* 90 entries", model=tmp_path / "model", **numbers)


def test_an_output_that_would_overwrite_something(config, folder, tmp_path):
    def refused(output, message):
        with pytest.raises(FileExistsError, match=message):
            learn_heads(dataclasses.replace(config, output=output), progress=False)

    config.output.mkdir()
    (config.output / "full_attention_heads.tsv").write_text("0.5\n")
    refused(config.output, r"output=.* has files \(full_attention_heads.tsv\)")
    assert (config.output / "full_attention_heads.tsv").read_text() == "0.5\n"
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "file is a file")
    refused(folder / "model", "has files .*config.json")


def test_gates_of_another_model():
    with pytest.raises(ValueError, match=r"gates is \(3, 2\), but must be \(2, 2\)"):
        mixed_attend(MODELS["llama"].config, jnp.ones((3, 2)), sink=1, window=2)
