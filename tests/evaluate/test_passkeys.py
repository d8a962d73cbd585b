"""Passkey retrieval: the texts say what they should, and a model's score is that of greedy decoding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import jsparse
from jsparse.evaluate import passkeys
from jsparse.evaluate.passkeys import PasskeyAccuracy, _material, _text, evaluate_passkeys
from jsparse.models import Llama, LlamaConfig, byte_tokenizer
from jsparse.texts.tasks import PASSKEY_QUESTION, question_and_answer

BYTES = byte_tokenizer()
VOCAB = 257
NEEDLE = r"\nThe pass key is (\d+)\. Remember it\. (\d+) is the pass key\.\n"
QUESTION = r"\nWhat is the pass key\? The pass key is (\d+)$"


def material(haystack=None, digits=5, seed=0):
    return _material(BYTES, VOCAB, digits, seed, haystack)


def read(tokens) -> tuple[str, str, str, str, int]:
    """The keys that the needle and the question say, the filler, and the place of the needle in it."""
    text = BYTES.decode(list(tokens))
    needle, question = re.search(NEEDLE, text), re.search(QUESTION, text)
    assert needle is not None and question is not None and needle[1] == needle[2]
    task = text.index("\n") + 1
    filler = text[task : needle.start()] + text[needle.end() : question.start()]
    return needle[1], question[1], filler, text[:task], needle.start() - task


@pytest.mark.parametrize("length", [300, 511])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_text_asks_for_the_key_that_it_hides_at_its_depth(length, depth):
    tokens, is_answer = _text(material(), length, sample=0, depth=depth)
    assert tokens.dtype == np.int32 and tokens.shape == is_answer.shape == (length,)
    key, asked, filler, _, place = read(tokens)
    assert key == asked and len(key) == 5
    assert BYTES.decode(list(tokens[is_answer])) == f" {key}"
    assert place == round(depth * len(filler))
    assert filler.startswith("The grass grows.") and not re.search(r"\d", filler)


def test_samples_have_their_own_keys_and_depths_share_them():
    keys = [[read(_text(material(), 300, n, depth)[0])[0] for n in range(20)] for depth in (0.1, 0.9)]
    assert keys[0] == keys[1] and len(set(keys[0])) == 20
    assert keys[0] != [read(_text(material(seed=1), 300, n, 0.1)[0])[0] for n in range(20)]


def test_a_haystack_is_cut_at_random():
    source = "".join(chr(97 + n % 26) * (1 + n % 7) for n in range(400))
    haystack = np.array(BYTES.encode(source).ids, np.uint16)
    fillers = [read(_text(material(haystack), 300, n, 0.5)[0])[2] for n in range(5)]
    assert all(filler in source for filler in fillers) and len(set(fillers)) > 1


def test_the_answer_is_tokenized_behind_its_question():
    """With pieces of words that reach over the border, as byte-pair tokenizers have them."""
    pieces = {
        character: number for number, character in enumerate(sorted(set("\nWhat is the pass key? The 12")))
    }
    pieces |= {"s ": len(pieces), "12": len(pieces) + 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [("s", " "), ("1", "2")]))

    def encode(text):
        return tokenizer.encode(text).ids

    question, answer = question_and_answer(encode, PASSKEY_QUESTION, "12")
    text = "\nWhat is the pass key? The pass key is 12"
    assert [*question, *answer] == encode(text)
    assert [tokenizer.id_to_token(one) for one in answer] == ["s ", "12"]


def bigram_model(follows: dict[str, str]):
    """A Llama without attention whose most likely next token is a table's: by the last token alone."""
    config = LlamaConfig.tiny(
        vocab_size=VOCAB,
        hidden_size=VOCAB + 3,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=2,
        model_type="qwen3",
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    table = np.zeros((VOCAB + 3, VOCAB), np.float32)
    for one, other in follows.items():
        table[ord(one), ord(other)] = 1
    model.embed_tokens.embedding[...] = jnp.eye(VOCAB, VOCAB + 3)
    model.norm.scale[...] = jnp.ones(VOCAB + 3)
    assert model.lm_head is not None
    model.lm_head.kernel[...] = jnp.asarray(table)
    return model


def greedy(follows, prompt, steps):
    text = prompt
    for _ in range(steps):
        text += follows.get(text[-1], "\0")
    return text[len(prompt) :]


@pytest.mark.parametrize("follows", [{"s": " ", " ": "7"}, {"s": "x", " ": "7"}, {"s": " ", " ": "x"}])
def test_what_counts_is_what_greedy_decoding_answers(follows):
    """A table that answers "7" finds the keys that are 7, and no key where one of two tokens is wrong."""
    samples, depths = 30, (0.0, 1.0)
    model = bigram_model(follows)
    results = evaluate_passkeys(
        model, BYTES, lengths=[260], depths=depths, samples=samples, digits=1, batch_size=7
    )
    for result in results:
        keys = [read(_text(material(digits=1), 260, n, result.depth)[0])[0] for n in range(samples)]
        correct = [f" {key}" == greedy(follows, "The pass key is", 2) for key in keys]
        assert result.correct == sum(correct) and result.samples == samples
        assert result.accuracy == sum(correct) / samples
        assert (0 < result.correct < samples) == (follows == {"s": " ", " ": "7"})


def test_results_stand_by_length_and_depth_and_a_length_has_one_shape(model, monkeypatch):
    """With a stand-in for the model, that finds keys above 50000 in the second half of a text only."""
    shapes = set()

    def find(graphdef, state, tokens, answers, mask):
        shapes.add((tokens.shape, answers.shape))
        key, _, filler, _, place = zip(*map(read, tokens), strict=True)
        found = [int(k) > 50000 and 2 * p > len(f) for k, p, f in zip(key, place, filler, strict=True)]
        return np.array(found), np.full(len(tokens), True)

    monkeypatch.setattr(passkeys, "_is_retrieved", find)
    results = evaluate_passkeys(model, BYTES, lengths=[300, 270], depths=[0.8, 0.2], samples=9, batch_size=4)
    assert shapes == {((4, length), (4, 6)) for length in (300, 270)}
    keys = {n: [int(read(_text(material(), n, sample, 0)[0])[0]) for sample in range(9)] for n in (300, 270)}
    above = {length: sum(key > 50000 for key in keys[length]) for length in keys}
    assert results == [
        PasskeyAccuracy(300, 0.8, above[300], 9),
        PasskeyAccuracy(300, 0.2, 0, 9),
        PasskeyAccuracy(270, 0.8, above[270], 9),
        PasskeyAccuracy(270, 0.2, 0, 9),
    ]
    assert all(0 < count < 9 for count in above.values())


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig.tiny(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return Llama(config, rngs=nnx.Rngs(0))


def test_the_mask_of_a_length_reaches_the_model(model):
    asked = []

    def mask_for(length):
        asked.append(length)
        return jsparse.BlockMask.from_token_masks(jsparse.causal(), 256, 256)

    assert evaluate_passkeys(model, BYTES, lengths=[256], depths=[1], samples=1, mask_for=mask_for) == [
        PasskeyAccuracy(256, 1.0, 0, 1)
    ]
    with pytest.raises(ValueError, match="mask is for q_len=256, kv_len=256, not for 300"):
        evaluate_passkeys(model, BYTES, lengths=[300], depths=[1], samples=1, mask_for=mask_for)
    assert asked == [256, 300]


def test_a_broken_model_finds_nothing_and_says_so(model):
    broken = nnx.merge(
        nnx.graphdef(model), jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), nnx.state(model))
    )
    with pytest.raises(FloatingPointError, match="not finite in texts of 256 tokens"):
        evaluate_passkeys(broken, BYTES, lengths=[256], depths=[0], samples=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "lengths and depths must not be empty"),
        ({"depths": []}, "lengths and depths must not be empty"),
        ({"depths": [0.5, 1.5]}, "depths must be from 0 to 1, not 1.5"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"digits": 0}, "digits must be 1 to 18, not 0"),
        ({"digits": 19}, "digits must be 1 to 18, not 19"),
        ({"lengths": [256, 100]}, "lengths: 100 is too short for the .* tokens of the task"),
        ({"haystack": np.zeros(5, np.int32)}, "haystack has 5 tokens, but the longest text needs"),
        ({"haystack": np.full(300, VOCAB)}, f"haystack must be ids 0 to {VOCAB - 1}"),
    ],
)
def test_bad_arguments(model, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_passkeys(model, BYTES, **{"lengths": [256]} | changes)


def test_a_tokenizer_of_another_model():
    config = LlamaConfig.tiny(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="tokenizer gives token id .* vocabulary has 64 entries"):
        evaluate_passkeys(Llama(config, rngs=nnx.Rngs(0)), BYTES, lengths=[256])
