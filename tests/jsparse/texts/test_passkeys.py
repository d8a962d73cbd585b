"""Passkey samples: their answers are what their needles say, and they have the length that was asked for."""

import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jsparse.models import byte_tokenizer
from jsparse.texts.passkeys import WORDS, Passkeys, check_passkeys_fit, passkey_batch, passkey_sample

BYTES = byte_tokenizer()
TEXT = "".join(f"({n}) the cat sat on the mat. " for n in range(150))
HAYSTACK = np.array(BYTES.encode(TEXT).ids, np.int32)


def make_passkeys(needles=2, words=3, start=()):
    return Passkeys(HAYSTACK, lambda text: BYTES.encode(text).ids, needles, words, start)


def read_sample(tokens, is_answer):
    """What a reader finds: number -> words in the needles, the same in the answers, and the rest."""
    text = BYTES.decode(list(tokens))
    needle, question = (
        r"\nRemember: passkey number (\d+) is ([a-z ]+)\.\n",
        r"\nWhat is passkey number (\d+)\? It is ([a-z ]+)\.",
    )
    asked = re.findall(question, text)
    hidden = dict(re.findall(needle, text))
    haystack = re.sub(question, "", re.sub(needle, "", text))
    answers = BYTES.decode(list(tokens[is_answer]))
    return hidden, asked, answers, haystack


@given(
    needles=st.integers(1, 11), words=st.integers(1, 5), extra=st.integers(0, 700), seed=st.integers(0, 99)
)
def test_answers_are_what_the_needles_say(needles, words, extra, seed):
    length = needles * 140 + extra
    passkeys = make_passkeys(needles, words)
    check_passkeys_fit(passkeys, length)
    tokens, is_answer = passkey_sample(passkeys, length, np.random.default_rng(seed))
    assert tokens.dtype == np.int32 and tokens.shape == is_answer.shape == (length,)

    hidden, asked, answers, haystack = read_sample(tokens, is_answer)
    assert [int(number) for number, _ in asked] == list(range(1, needles + 1))
    assert hidden == dict(asked) and len(hidden) == needles
    assert all(set(key.split()) <= set(WORDS) and len(key.split()) == words for key in hidden.values())
    assert answers == "".join(f" {key}" for _, key in asked)  # every token of every answer, and no other
    assert haystack in TEXT


def test_needles_lie_anywhere_and_in_any_order():
    passkeys = make_passkeys(needles=2, words=1)
    firsts, depths = [], []
    for seed in range(60):
        tokens, _ = passkey_sample(passkeys, 900, np.random.default_rng(seed))
        text = BYTES.decode(list(tokens))
        found = [(int(m[1]), m.start()) for m in re.finditer(r"passkey number (\d) is", text)]
        firsts.append(found[0][0])
        # The second needle is 45 bytes or so further back than it would be without the first.
        depths += [(found[0][1] - 11) / 750, (found[1][1] - 55) / 750]
    assert 15 < firsts.count(1) < 45
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert min(depths) > 0.03 and max(depths) < 0.97


def test_a_sample_begins_as_the_tokenizer_begins_a_text():
    tokens, _ = passkey_sample(make_passkeys(start=(256,)), 400, np.random.default_rng(0))
    assert tokens[0] == 256 and (tokens[1:] < 256).all() and len(tokens) == 400


def test_batches_are_drawn_from_seed_and_step_and_padded():
    def batch(**changes):
        settings = {"context": 512, "step": 3, "batch_size": 4, "seed": 7} | changes
        return passkey_batch(make_passkeys(), (300, 400, 512), **settings)

    tokens, is_answer = batch()
    assert tokens.shape == is_answer.shape == (4, 512) and is_answer.dtype == bool
    for again, first in zip(batch(), (tokens, is_answer), strict=True):
        np.testing.assert_array_equal(again, first)
    assert not np.array_equal(batch(step=4)[0], tokens) and not np.array_equal(batch(seed=8)[0], tokens)
    assert not np.array_equal(tokens[0], tokens[1])

    lengths = set()
    for row, answers in zip(tokens, is_answer, strict=True):
        length = int(np.flatnonzero(row).max()) + 1  # text has no zero bytes
        lengths.add(length)
        assert not answers[length:].any()
        hidden, asked, _, _ = read_sample(row[:length], answers[:length])
        assert hidden == dict(asked) and len(hidden) == 2
    assert lengths <= {300, 400, 512} and len(lengths) > 1


def test_one_length_is_the_only_one():
    tokens, _ = passkey_batch(make_passkeys(), (300,), context=512, step=0, batch_size=2, seed=0)
    assert (tokens[:, :300] > 0).all() and not tokens[:, 300:].any()


def test_a_tokenizer_of_words():
    """Not bytes: the answer is the same few tokens as in the needle."""
    texts = ["Remember: passkey number is What It . ? 1 2", TEXT, *WORDS]
    model = tokenizers.models.WordLevel(unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    haystack = np.array(encode(TEXT), np.int32)
    passkeys = Passkeys(haystack, encode, needles=2, words=4)
    check_passkeys_fit(passkeys, 60)
    tokens, is_answer = passkey_sample(passkeys, 60, np.random.default_rng(0))
    assert is_answer.sum() == 8
    for answer in tokens[is_answer].reshape(2, 4):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, 4)
        assert (windows == answer).all(axis=1).sum() == 2  # in the needle, and here


def test_the_shortest_length_that_is_said_to_fit_fits():
    """The check's arithmetic, against the longest sample that there can be: each word an eight-letter one."""
    passkeys = make_passkeys(needles=3, words=2, start=(256,))
    needle = len("\nRemember: passkey number 1 is november november.\n")
    question = len("\nWhat is passkey number 1? It is november november.")
    needed = 3 * (needle + question) + 1
    check_passkeys_fit(passkeys, needed)
    arithmetic = rf"3 \* \(needle of {needle} \+ question and answer of {question}\) \+ 1 .* = {needed}"
    message = f"fit the shortest sample of {needed - 1} tokens: {arithmetic}"
    with pytest.raises(ValueError, match=message):
        check_passkeys_fit(passkeys, needed - 1)
    for seed in range(20):
        passkey_sample(passkeys, needed, np.random.default_rng(seed))


def test_lengths_that_cannot_be():
    with pytest.raises(ValueError, match="length=100 is too short for the .* tokens of the passkeys"):
        passkey_sample(make_passkeys(), 100, np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"length=9000 needs .* but it has {len(HAYSTACK)}"):
        passkey_sample(make_passkeys(), 9000, np.random.default_rng(0))
