"""Texts with something to find: their lengths, what is hidden where, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.models import byte_tokenizer
from jsparse.texts.tasks import KEYS, TASKS, VALUES, WORDS, Material, score, statement

TOKENIZER = byte_tokenizer()
START = (256,)
LONGEST = 6000
SHORTEST = 1500  # in bytes, with the needles of all tasks
WITH_DEPTH = [name for name in TASKS if name != "common_words"]


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


# A haystack of digits: in it nothing looks like a needle, and each place looks different.
MATERIAL = Material(encode, np.array(encode("".join(f"{i:05d};" for i in range(LONGEST // 6)))), START)


def make(task, length=2000, seed=0, depth=None, material=MATERIAL):
    return TASKS[task](material, length, np.random.default_rng(seed), depth)


def text_of(*parts):
    return TOKENIZER.decode(np.concatenate(parts).tolist())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(TASKS)), st.integers(SHORTEST, LONGEST), st.integers(0, 2**32))
def test_a_text_is_as_long_as_asked_and_ends_in_its_answer(task, length, seed):
    example = make(task, length, seed)
    whole = [*example.context, *example.tail, *example.answer]
    if task == "common_words":  # whole words, and a number of each that the shares of the list allow
        assert 0 <= length - len(whole) < 140 * 10
    else:
        assert len(whole) == length
    assert example.context[0] == START[0] and START[0] not in whole[1:]
    assert all(part.dtype == np.int32 for part in (example.context, example.tail, example.answer))
    between = " is " if task == "tracking" else " "
    assert text_of(example.answer) == " " + between.join(example.expected)
    assert score(text_of(example.answer), example.expected) == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_generator_decides_everything(task):
    first, again, other = make(task, seed=1), make(task, seed=1), make(task, seed=2)
    for part in ("context", "tail", "answer"):
        np.testing.assert_array_equal(getattr(first, part), getattr(again, part))
    assert first.expected == again.expected
    assert not np.array_equal(first.context[:1500], other.context[:1500])


@pytest.mark.parametrize("task", TASKS)
def test_the_tail_begins_up_to_15_tokens_before_the_question(task):
    questions = {name: "\n# What is" for name in ("needle", "recall", "two_turns", "tracking")}
    questions |= {"passkey": "\nWhat is the pass key?", "common_words": "\n# The words that came most often"}
    extra = [text_of(make(task, seed=seed).tail).index(questions[task]) for seed in range(60)]
    assert min(extra) == 0 and 10 <= max(extra) <= 15 and len(set(extra)) > 8


@pytest.mark.parametrize("task", WITH_DEPTH)
def test_what_is_asked_for_is_in_the_context(task):
    for seed in range(20):
        example = make(task, seed=seed)
        context, tail = text_of(example.context, example.tail[:15]), text_of(example.tail)
        value = example.expected[0]
        if task == "passkey":
            assert context.count(f"The pass key is {value}. Remember it. {value} is the pass key.") == 1
            continue
        key = tail.rsplit("# What is ", 1)[1].split("?")[0]
        assert tail.endswith(f"# What is {key}? {key} is")
        if task == "tracking":
            first, second, value = example.expected
            chain = statement(second, value), statement(first, second), statement(key, first)
            places = [context.index(said) for said in chain]
            assert places == sorted(places)
        else:
            assert context.count(f"{key} is ") == 1 and statement(key, value) in context


@pytest.mark.parametrize("task", ["passkey", "needle", "recall", "two_turns"])
def test_the_needle_is_at_its_depth(task):
    places = []
    for depth in (0.0, 0.25, 0.5, 1.0):
        example = make(task, length=4000, depth=depth)
        text = text_of(example.context, example.tail)
        text = text[: text.rindex("What is") if task != "two_turns" else text.index("# What is")]
        (value,) = example.expected
        key = text_of(example.tail).rsplit("# What is ", 1)[-1].split("?")[0]
        needle = f"The pass key is {value}" if task == "passkey" else statement(key, value)
        digits = "0123456789;"  # of the haystack, before the needle and in all
        count = [sum(text[:end].count(digit) for digit in digits) for end in (text.index(needle), len(text))]
        places.append(count[0] / count[1])
    np.testing.assert_allclose(places, [0, 0.25, 0.5, 1], atol=0.01)


@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_two_depths_differ_in_the_depth_alone(task):
    first, last = make(task, depth=0.0), make(task, depth=1.0)
    assert sorted([*first.context, *first.tail]) == sorted([*last.context, *last.tail])
    assert first.expected == last.expected and not np.array_equal(first.context, last.context)


def test_tracking_takes_the_depth_of_the_first_of_its_chain():
    for seed in range(10):
        example = make("tracking", seed=seed, depth=0.0)
        assert text_of(example.context).index(statement(*example.expected[1:])) < 100


def test_two_turns_have_another_turn_before():
    example = make("two_turns")
    tail = text_of(example.tail)
    first, second = tail.split("# What is ")[1:]
    key, answer = first.split("?")[0], first.split("? ")[1].split(" is ")[1].split(".")[0]
    assert key != second.split("?")[0] and statement(key, answer) in text_of(example.context)


def test_common_words_are_those_that_come_most_often():
    for seed in range(5):
        example = make("common_words", length=4000, seed=seed)
        text = text_of(example.context, example.tail)
        words = text.split("\n", 1)[1].split("\n#")[0].split()
        count = {word: words.count(word) for word in set(words)}
        assert set(count) <= set(WORDS) and len(count) == 128
        common = sorted(count, key=count.__getitem__)[-3:]
        assert set(common) == set(example.expected)
        assert min(count[word] for word in common) >= 5 * max(
            count[word] for word in count if word not in common
        )


def test_words_are_distinct():
    assert len(set(WORDS)) == len(WORDS) and not set(KEYS) & set(VALUES)


def test_the_score_is_the_fraction_of_words_found():
    assert score(" Amber, and TULIP", ("tulip", "amber")) == 1
    assert score("tulip", ("tulip", "amber", "rose", "fern")) == 0.25
    assert score("", ("tulip",)) == 0
    assert score(" sparrow", ("arrow",)) == score(" 123456", ("12345",)) == 0


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_is_refused(task):
    with pytest.raises(ValueError, match="length=60 is too short"):
        make(task, length=60)


@pytest.mark.parametrize("task", WITH_DEPTH)
def test_a_haystack_that_is_too_short_is_refused(task):
    with pytest.raises(ValueError, match=r"length=12000 needs \d+ tokens of haystack, but it has 6000"):
        make(task, length=12000)


@pytest.mark.parametrize("task", WITH_DEPTH)
@pytest.mark.parametrize("depth", [-0.1, 1.5])
def test_a_depth_out_of_range_is_refused(task, depth):
    with pytest.raises(ValueError, match=f"depth must be from 0 .* to 1 .*, not {depth}"):
        make(task, depth=depth)


def test_common_words_take_no_depth():
    with pytest.raises(ValueError, match="depth=0.5 must be None"):
        make("common_words", depth=0.5)


def test_a_token_that_joins_the_question_to_the_answer_is_the_answers():
    def joined(text):  # the last letter of a word and the space after it are one token
        return encode(text.replace("s ", "\x01"))

    example = make("needle", material=Material(joined, MATERIAL.haystack, START))
    assert example.answer[0] == 1 and text_of(example.tail).endswith(" i")
