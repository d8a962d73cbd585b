"""Tasks for which a model must still see its whole context, made from a seed, at any length.

Each is a text for a model to complete: sentences hidden in some other text (the haystack), and a question
about them. They are written for any tokenizer and any model that reads English.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32, Integer

from jsparse.texts.passkeys import hide_needles, random_stretch

# Words that program sources hardly use. A hidden sentence says that a key "is" a value.
WORDS = tuple(
    """
    acorn amber anchor anvil apple apricot apron arrow aspen attic badger banana banjo barley barrel basket
    beacon beaver beetle birch biscuit bison blanket blossom bonnet bottle bouquet breeze bronze bucket butter
    cabin cactus camel canary candle canoe canyon carpet carrot castle cedar cello chalk cherry chimney cider
    clover cobalt cocoa coconut comet copper coral cotton cradle crane cricket crystal daisy desert diamond
    dolphin donkey dragon eagle ebony elbow ember emerald falcon feather fern fiddle flamingo flute forest
    fossil fountain garden garlic garnet ginger giraffe glacier goblet granite grape gravel guitar hammer
    hamster harbor harvest hazel helmet hermit heron honey horizon hornet island ivory jacket jaguar jasmine
    jelly jewel jungle kettle kitten ladder lagoon lantern laurel lemon leopard lily linen lizard lobster
    lotus magnet mango maple marble meadow melon mitten monkey moose mountain mustard nettle nickel nutmeg
    oasis ocean olive onion opal orange orchid otter oyster paddle panda panther parrot peach pearl pebble
    pelican pepper pigeon pillow planet plum poppy prairie pumpkin puzzle quartz quilt rabbit raccoon radish
    rainbow raven ribbon river robin ruby saddle saffron salmon sapphire scarf silver sparrow spider spruce
    squirrel sunset swan tiger tomato topaz tulip turtle valley velvet violet violin walnut walrus willow wolf
    """.split()
)
KEYS, VALUES = WORDS[0::2], WORDS[1::2]

HEADER = "# Some words are explained in this text. Remember them.\n"
LIST_HEADER = "# Some words come often in this list. Remember them.\n"
LIST_QUESTION = "# The words that came most often are"

# LongLoRA's passkey_retrivial.py (arXiv 2309.12307, §4.2), after landmark attention (arXiv 2305.16300, §4.2).
PASSKEY_HEADER = (
    "Somewhere in this text there is a pass key. Find it and keep it in mind: I will ask for it.\n"
)
PASSKEY_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"


def statement(key: str, value: str) -> str:
    return f"# {key} is {value}.\n"


def question(key: str) -> str:
    return f"# What is {key}? {key} is"


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """What tasks are made of.

    - encode: gives the tokens of a string, without special tokens.
    - haystack: the tokens of some text; every example takes a random stretch of it.
    - start: what the tokenizer puts before every text.
    """

    encode: Callable[[str], list[int]]
    haystack: Integer[np.ndarray, " N"]
    start: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One text, cut into what is read as a prompt, what is read token by token, and what should follow.

    - context: the prompt.
    - tail: the rest of the text up to the answer: some of its last tokens and the question. It must be fed to
      the decode step, since only there does a sparse cache choose what it reads; an answer from the prompt's
      own pass would flatter it.
    - answer: what a perfect model continues with.
    - expected: the words of the answer that count.
    """

    context: Int32[np.ndarray, " C"]
    tail: Int32[np.ndarray, " T"]
    answer: Int32[np.ndarray, " A"]
    expected: tuple[str, ...]


TaskFunction = Callable[..., Example]


def score(text: str, expected: Sequence[str]) -> float:
    """The fraction of the expected words that a text has (RULER's string_match_all, for whole words).

    >>> score(" Tulip and rose", ("tulip", "maple"))
    0.5
    """
    # Whole words only: a sparrow is no arrow.
    found = (re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in expected)
    return sum(map(bool, found)) / len(expected)


def passkey(material: Material, length: int, rng: np.random.Generator, depth: float | None = None) -> Example:
    """LongLoRA's task: five digits, hidden in one place that says them twice, are asked for at the end."""
    key = str(rng.integers(10_000, 100_000))
    needle = PASSKEY_NEEDLE.format(key=key)
    return _example(
        material, length, rng, PASSKEY_HEADER, [needle], [_depth(rng, depth)], [], PASSKEY_QUESTION, (key,)
    )


def needle(material: Material, length: int, rng: np.random.Generator, depth: float | None = None) -> Example:
    """A needle in a haystack: "amber is tulip" is said once, at ``depth``. What is amber?"""
    key, value = str(rng.choice(KEYS)), str(rng.choice(VALUES))
    depths = [_depth(rng, depth)]
    needles = [_line(statement(key, value))]
    return _example(material, length, rng, HEADER, needles, depths, [], _line(question(key)), (value,))


def recall(material: Material, length: int, rng: np.random.Generator, depth: float | None = None) -> Example:
    """Needles of many keys (RULER's multi-key retrieval), one per 64 tokens; one of them is asked for."""
    pairs, needles, depths = _pairs(length, rng, depth)
    if depth is not None:
        depths[0] = depth
    key, value = pairs[0]
    return _example(material, length, rng, HEADER, needles, depths, [], _line(question(key)), (value,))


def two_turns(
    material: Material, length: int, rng: np.random.Generator, depth: float | None = None
) -> Example:
    """As ``recall``, but another key was asked for and answered before, about the same context (SCBench)."""
    pairs, needles, depths = _pairs(length, rng, depth)
    if depth is not None:
        depths[0] = depth
    (key, value), (other, others) = pairs[:2]
    before = [_line(question(other)), f" {others}.\n"]
    return _example(material, length, rng, HEADER, needles, depths, before, _line(question(key)), (value,))


def tracking(
    material: Material, length: int, rng: np.random.Generator, depth: float | None = None
) -> Example:
    """Variable tracking after RULER: "coral is amber", "amber is pearl", "pearl is tulip". What is coral?

    The answer is the chain, "amber is pearl is tulip", and its three words are expected. Each key is
    explained before another sentence uses it. One in four of the other needles uses another key too.
    """
    pairs, needles, depths = _pairs(length, rng, depth)
    chain = pairs[:3]
    for i in (0, 1, *range(6, len(pairs), 4)):
        other = i + 1 if i < 2 else i - 1
        needles[i] = _line(statement(pairs[i][0], pairs[other][0]))
        if i >= 2:
            depths[other], depths[i] = sorted((depths[other], depths[i]))
    depths[2], depths[1], depths[0] = sorted(depths[:3])
    if depth is not None:
        depths[2] = depth * depths[1]
    (asked, _), (first, _), (second, value) = chain
    answer = f"{first} is {second} is {value}"
    return _example(
        material,
        length,
        rng,
        HEADER,
        needles,
        depths,
        [],
        _line(question(asked)),
        (first, second, value),
        answer,
    )


def common_words(
    material: Material, length: int, rng: np.random.Generator, depth: float | None = None
) -> Example:
    """Common words after RULER: of a list as long as the context, the three that appear far more often.

    There are up to 128 words. Three come six times as often as the others, which come equally often. There is
    no haystack, and ``depth`` must be None, since nothing is hidden.
    """
    if depth is not None:
        raise ValueError(f"depth={depth} must be None: common_words asks about the whole list")
    encode = material.encode
    header, asked = encode(LIST_HEADER), _line(LIST_QUESTION)
    pool = rng.permutation(WORDS)[: int(np.clip(length // 16, 8, 128))]
    common = tuple(map(str, pool[:3]))
    question_ids, answer = question_and_answer(encode, asked, " ".join(common))
    room = length - len(material.start) - len(header) - len(question_ids) - len(answer)
    weights = np.where(np.arange(len(pool)) < 3, 6, 1)
    tokens = np.array([len(encode(f" {word}")) for word in pool])
    counts = np.floor(weights * room / (weights * tokens).sum()).astype(int)
    if counts.min() < 1:
        raise ValueError(f"length={length} is too short for a list of {len(pool)} words")
    words = rng.permutation(np.repeat(pool, counts))
    body = [token for word in words for token in encode(f" {word}")]
    return _cut(rng, [*material.start, *header, *body], [*question_ids], answer, common)


TASKS: dict[str, TaskFunction] = {
    task.__name__: task for task in (passkey, needle, recall, two_turns, tracking, common_words)
}


# --- texts ---


def _line(text: str) -> str:
    return "\n" + text


def _check_depth(depth: float | None) -> None:
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 (the start) to 1 (before the question), not {depth}")


def _depth(rng: np.random.Generator, depth: float | None) -> float:
    _check_depth(depth)
    drawn = float(rng.random())  # even if a depth is given: two texts then differ only in depth
    return drawn if depth is None else depth


def _pairs(
    length: int, rng: np.random.Generator, depth: float | None
) -> tuple[list[tuple[str, str]], list[str], list[float]]:
    """Keys with their values, their sentences, and random depths for these: one key per 64 tokens."""
    _check_depth(depth)
    count = int(np.clip(length // 64, 3, len(KEYS)))
    pairs = [(str(key), str(rng.choice(VALUES))) for key in rng.permutation(KEYS)[:count]]
    needles = [_line(statement(key, value)) for key, value in pairs]
    return pairs, needles, rng.random(count).tolist()


def _example(
    material: Material,
    length: int,
    rng: np.random.Generator,
    header: str,
    needles: list[str],
    depths: list[float],
    before: list[str],
    asked: str,
    expected: tuple[str, ...],
    right: str | None = None,
) -> Example:
    """A text of ``length`` tokens with ``needles`` at ``depths``, and turns ``before`` the question."""
    encode = material.encode
    question_ids, answer = question_and_answer(encode, asked, right or " ".join(expected))
    question_ids = [token for text in before for token in encode(text)] + question_ids
    start = [*material.start, *encode(header)]
    encoded = [encode(text) for text in needles]
    rest = length - len(start) - sum(map(len, encoded)) - len(question_ids) - len(answer)
    if rest < 0:
        raise ValueError(f"length={length} is too short: the task alone takes {length - rest} tokens")
    if rest > len(material.haystack):
        raise ValueError(
            f"length={length} needs {rest} tokens of haystack, but it has {len(material.haystack)}"
        )
    haystack = random_stretch(material.haystack, rest, rng)
    order = np.argsort(depths, kind="stable")  # needles that round to one place stay in order
    text = hide_needles(haystack, [encoded[i] for i in order], [round(depths[i] * rest) for i in order])
    return _cut(rng, start + text, question_ids, answer, expected)


def _cut(
    rng: np.random.Generator, text: list[int], asked: list[int], answer: list[int], expected: tuple[str, ...]
) -> Example:
    """An example in which the last 0 to 15 tokens of the text go with the question.

    So, when a choice of pages is reused, the question starts anywhere between two choices.
    """
    border = len(text) - int(rng.integers(16))
    context, tail = text[:border], text[border:] + asked
    return Example(
        np.array(context, np.int32), np.array(tail, np.int32), np.array(answer, np.int32), expected
    )


def question_and_answer(
    encode: Callable[[str], list[int]], asked: str, answer: str
) -> tuple[list[int], list[int]]:
    """The tokens of both, tokenised together: the answer's are what the model would have to generate.

    A tokenizer may join the end of the question to the answer. Such a token belongs to the answer.
    """
    together, alone = encode(f"{asked} {answer}"), encode(asked)
    same = [a == b for a, b in zip(together, alone, strict=False)]
    border = same.index(False) if False in same else min(len(alone), len(together))
    return together[:border], together[border:]
