"""Passkeys in a haystack: samples whose last tokens follow from sentences far back (DuoAttention)."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

# The NATO alphabet, spelt as DuoAttention spells it.
WORDS = tuple(
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa "
    "quebec romeo sierra tango uniform victor whiskey xray yankee zulu".split()
)
_NEEDLE = "\nRemember: passkey number {number} is"
_NEEDLE_END = ".\n"
_QUESTION = "\nWhat is passkey number {number}? It is"
_ANSWER_END = "."
_DEPTHS = 0.05, 0.95  # where in the haystack a needle may lie, as in DuoAttention


@dataclasses.dataclass(frozen=True, eq=False)
class Passkeys:
    """What samples are made of.

    - haystack: the tokens of some text.
    - encode: gives the tokens of a string, without special tokens.
    - needles: sentences with a passkey per sample.
    - words: random words per passkey.
    - start: the tokens that a sample begins with (Llama's begin-of-sequence token).
    """

    haystack: Int32[np.ndarray, " N"]
    encode: Callable[[str], list[int]]
    needles: int
    words: int
    start: tuple[int, ...] = ()


def passkey_sample(
    passkeys: Passkeys, length: int, rng: np.random.Generator
) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """The tokens of one sample, ``length`` in all, and which of them are answers.

    A random stretch of the haystack has needles such as "Remember: passkey number 2 is tango golf." at random
    depths from 5% to 95%. Then follows, for each number in order, "What is passkey number 2? It is tango
    golf." The answer is the passkey there, with the same tokens as in the needle. Only a head that still sees
    a needle can tell what it said.

    Raises ValueError if the length is too short for the needles and the questions, or the haystack for the
    length.

    Source: DuoAttention (arXiv 2410.10819).

    >>> from jsparse.models import byte_tokenizer
    >>> tokenizer = byte_tokenizer()
    >>> haystack = np.array(tokenizer.encode("All work and no play. " * 20).ids, np.int32)
    >>> passkeys = Passkeys(haystack, lambda text: tokenizer.encode(text).ids, needles=1, words=2)
    >>> tokens, is_answer = passkey_sample(passkeys, 160, np.random.default_rng(0))
    >>> print(tokenizer.decode(tokens))
    play.
    Remember: passkey number 1 is whiskey quebec.
     All work and no play. All work and no play. All work and no
    What is passkey number 1? It is whiskey quebec.
    >>> tokenizer.decode(tokens[is_answer])
    ' whiskey quebec'
    """
    encode = passkeys.encode
    numbers = range(1, passkeys.needles + 1)
    keys = [encode(_key(rng.choice(WORDS, passkeys.words))) for _ in numbers]
    needles = [_needle(encode, n, key) for n, key in zip(numbers, keys, strict=True)]
    questions = [encode(_QUESTION.format(number=n)) for n in numbers]
    end = encode(_ANSWER_END)

    taken = len(passkeys.start) + sum(map(len, needles + questions + keys)) + len(numbers) * len(end)
    rest = length - taken
    if rest < 0:
        raise ValueError(f"length={length} is too short for the {taken} tokens of the passkeys")
    if rest > len(passkeys.haystack):
        raise ValueError(
            f"length={length} needs {rest} tokens of haystack beside {taken} of passkeys, but it has "
            f"{len(passkeys.haystack)}"
        )
    haystack = random_stretch(passkeys.haystack, rest, rng)
    places = (rng.uniform(*_DEPTHS, len(numbers)) * rest).astype(int)
    context = [*passkeys.start, *hide_needles(haystack, needles, places.tolist())]
    is_answer = [False] * len(context)
    for question, key in zip(questions, keys, strict=True):
        context += [*question, *key, *end]
        is_answer += [False] * len(question) + [True] * len(key) + [False] * len(end)
    return np.array(context, np.int32), np.array(is_answer)


def random_stretch(
    text: Integer[np.ndarray, " N"], length: int, rng: np.random.Generator
) -> Integer[np.ndarray, " length"]:
    """``length`` consecutive tokens of a text, from a random place."""
    start = int(rng.integers(len(text) - length + 1))
    return text[start : start + length]


def hide_needles(
    haystack: Integer[np.ndarray, " N"], needles: Sequence[Sequence[int]], places: Sequence[int]
) -> list[int]:
    """The haystack with each needle put before the token at its place, those at one place in the order given.

    >>> hide_needles(np.arange(4), [[10], [11, 12]], [3, 0])
    [11, 12, 0, 1, 2, 10, 3]
    """
    tokens, text, last = haystack.tolist(), [], 0
    for i in np.argsort(places, kind="stable"):
        text += [*tokens[last : places[i]], *needles[i]]
        last = places[i]
    return text + tokens[last:]


def passkey_batch(
    passkeys: Passkeys,
    lengths: Sequence[int],
    *,
    context: int,
    step: int,
    batch_size: int,
    seed: int,
) -> tuple[Int32[np.ndarray, "B context"], Bool[np.ndarray, "B context"]]:
    """The samples of step ``step`` (from 0), each of one of ``lengths``, and which tokens are answers.

    They are padded to ``context`` with token 0 on the right, where causal attention does not look. The result
    depends only on the arguments: each sample is drawn from ``(seed, step, row)``.
    """
    tokens = np.zeros((batch_size, context), np.int32)
    is_answer = np.zeros((batch_size, context), bool)
    for row in range(batch_size):
        rng = np.random.default_rng([seed, step, row])
        length = int(rng.choice(lengths))
        tokens[row, :length], is_answer[row, :length] = passkey_sample(passkeys, length, rng)
    return tokens, is_answer


def check_passkeys_fit(passkeys: Passkeys, length: int) -> None:
    """Raises ValueError, with the arithmetic, unless every sample of ``length`` tokens can hold its passkeys.

    How many tokens a passkey takes is known only when it is drawn, so this counts the longest words.
    """
    encode = passkeys.encode
    longest_key = max((encode(_key([word] * passkeys.words)) for word in WORDS), key=len)
    numbers = range(1, passkeys.needles + 1)
    needle = max(len(_needle(encode, n, longest_key)) for n in numbers)
    question = max(len(encode(_QUESTION.format(number=n))) for n in numbers)
    question += len(longest_key) + len(encode(_ANSWER_END))
    start = len(passkeys.start)
    needed = passkeys.needles * (needle + question) + start
    if needed > length:
        raise ValueError(
            f"needles={passkeys.needles} of words={passkeys.words} do not fit the shortest sample of "
            f"{length} tokens: {passkeys.needles} * (needle of {needle} + question and answer of {question}) "
            f"+ {start} at the start = {needed}; allowed are fewer needles or words, or a longer min_context"
        )


def _key(words: Iterable[str]) -> str:
    return "".join(f" {word}" for word in words)


def _needle(encode: Callable[[str], list[int]], number: int, key: list[int]) -> list[int]:
    return [*encode(_NEEDLE.format(number=number)), *key, *encode(_NEEDLE_END)]
