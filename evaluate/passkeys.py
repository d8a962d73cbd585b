"""Passkey retrieval: does a model find five digits in a long text, by length and depth?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int32, Integer
from tokenizers import Tokenizer

from jsparse.models import Llama, text_encoder
from jsparse.models.masking import ModelMask, hashable
from jsparse.reports.progress import progress_bar
from jsparse.texts.passkeys import hide_needles, random_stretch
from jsparse.texts.tasks import PASSKEY_HEADER, PASSKEY_NEEDLE, PASSKEY_QUESTION, question_and_answer
from jsparse.texts.tokenizer import prompt_ids

_FILLER = "The grass grows. The river runs. The sun goes down. We walk on. And back home again.\n"


@dataclasses.dataclass(frozen=True)
class PasskeyAccuracy:
    """``correct`` of ``samples`` passkeys were found in texts of ``length`` tokens, at a ``depth``."""

    length: int
    depth: float
    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


def evaluate_passkeys(
    model: Llama,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float | int] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    digits: int = 5,
    haystack: Integer[np.ndarray, " N"] | None = None,
    mask_for: Callable[[int], ModelMask | None] = lambda length: None,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> list[PasskeyAccuracy]:
    """How often a model retrieves a passkey, for each of ``lengths`` and ``depths``, in that order.

    A sample is a text of ``length`` tokens, the answer included: a description of the task, filler text with
    "The pass key is 12345. Remember it. 12345 is the pass key." somewhere in it, and "What is the pass key?
    The pass key is 12345". It counts as correct where greedy decoding would answer with exactly these digits.
    One forward pass decides this: each token of the answer must be the most likely one after the *true*
    tokens before it. As long as that holds, greedy decoding has these same tokens before it and chooses the
    next of the answer; where it first fails, greedy decoding departs from the answer.

    - tokenizer: the model's own. The digits are tokenized as they are in the sentence, together with what is
      before them.
    - lengths: tokens per text, in all.
    - depths: where in the filler the passkey is, from 0 (its start) to 1 (its end, before the question).
    - samples: texts for each length and depth, each with its own key. The keys, and the places in the
      haystack that texts come from, follow from ``seed``, length and sample: samples at two depths differ in
      the depth alone.
    - digits: digits per passkey.
    - haystack: tokens to take the filler from, a random stretch for each text; None: a few short sentences,
      again and again, as in LongLoRA.
    - mask_for: the mask for a length, as in ``perplexity_by_context``; None is full causal attention.
    - batch_size: texts per batch.
    - progress: show a progress bar, if stderr is a terminal.

    Logits are computed for the answer alone; it compiles once per length.

    Raises ValueError for arguments out of range, a tokenizer that is not the model's, a length that is too
    short for the task or a haystack that is too short for the length, all before anything is computed;
    FloatingPointError where logits are not finite.

    >>> from jsparse.models import LlamaConfig, byte_tokenizer
    >>> config = LlamaConfig.tiny()
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> evaluate_passkeys(model, byte_tokenizer(), lengths=[256], depths=[0.5], samples=2)
    [PasskeyAccuracy(length=256, depth=0.5, correct=0, samples=2)]
    """
    _check(lengths, depths, samples, digits, batch_size)
    material = _material(tokenizer, model.config.vocab_size, digits, seed, haystack)
    for length in lengths:
        for sample in range(samples):
            _text(material, length, sample, depth=0.0)  # raises where there is no room
    masks = [hashable(mask_for(length)) for length in lengths]

    graphdef, state = nnx.split(model)
    results = []
    with progress_bar(progress) as bar:
        for length, mask in zip(lengths, masks, strict=True):
            task = bar.add_task(f"passkeys at {length}", total=len(depths) * samples, note="")
            texts = [_text(material, length, sample, depth) for depth in depths for sample in range(samples)]
            retrieved: list[bool] = []
            for tokens, answers in _batches(texts, batch_size):
                right, finite = _is_retrieved(graphdef, state, tokens, answers, mask)
                if not np.asarray(finite).all():
                    raise FloatingPointError(f"logits are not finite in texts of {length} tokens")
                retrieved += np.asarray(right).tolist()[: len(texts) - len(retrieved)]
                bar.update(task, completed=len(retrieved), note=f"{np.mean(retrieved):.0%} found")
            correct = np.reshape(retrieved, (len(depths), samples)).sum(axis=1)
            results += [
                PasskeyAccuracy(length, float(depth), int(count), samples)
                for depth, count in zip(depths, correct, strict=True)
            ]
    return results


@functools.partial(jax.jit, static_argnames=("graphdef", "mask"))
def _is_retrieved(
    graphdef, state, tokens: Int32[Array, "B T"], answers: Bool[Array, "B A"], mask: ModelMask | None
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Whether every token of an answer is the most likely one, and whether the logits are finite.

    ``answers``: which of the last A tokens are the answer.
    """
    model = nnx.merge(graphdef, state)
    asked = answers.shape[1]
    hidden = model.hidden(tokens, None, model.attend(mask))[:, -asked - 1 : -1]  # what predicts answers
    logits = model.logits(hidden)
    right = (jnp.argmax(logits, axis=-1) == tokens[:, -asked:]) | ~answers
    return right.all(axis=1), jnp.isfinite(logits).all(axis=(1, 2))


# --- texts ---


@dataclasses.dataclass(frozen=True, eq=False)
class _Material:
    """What texts are made of: ``start`` is what the tokenizer puts before every text."""

    encode: Callable[[str], list[int]]
    start: list[int]
    haystack: Integer[np.ndarray, " N"] | None
    digits: int
    seed: int


def _material(
    tokenizer: Tokenizer,
    vocab_size: int,
    digits: int,
    seed: int,
    haystack: Integer[np.ndarray, " N"] | None,
) -> _Material:
    if haystack is not None and haystack.size and not 0 <= haystack.min() <= haystack.max() < vocab_size:
        raise ValueError(
            f"haystack must be ids 0 to {vocab_size - 1}, the model's vocabulary, not {haystack.min()} to "
            f"{haystack.max()}"
        )
    start = prompt_ids(tokenizer, "")
    return _Material(text_encoder(tokenizer, vocab_size), start, haystack, digits, seed)


def _text(
    material: _Material, length: int, sample: int, depth: float | int
) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """The tokens of a text, ``length`` in all, and which of them, the last ones, are the answer."""
    rng = np.random.default_rng([material.seed, length, sample])
    key = str(rng.integers(10 ** (material.digits - 1), 10**material.digits))
    before = [*material.start, *material.encode(PASSKEY_HEADER)]
    needle = material.encode(PASSKEY_NEEDLE.format(key=key))
    question, answer = question_and_answer(material.encode, PASSKEY_QUESTION, key)

    taken = len(before) + len(needle) + len(question) + len(answer)
    rest = length - taken
    if rest < 0:
        raise ValueError(f"lengths: {length} is too short for the {taken} tokens of the task and its passkey")
    filler = _filler(material, rest, rng)
    text = hide_needles(filler, [needle], [round(depth * rest)])
    tokens = np.array([*before, *text, *question, *answer], np.int32)
    return tokens, np.arange(length) >= length - len(answer)


def _filler(material: _Material, count: int, rng: np.random.Generator) -> Integer[np.ndarray, " N"]:
    if material.haystack is None:
        return np.resize(np.array(material.encode(_FILLER)), count)  # again and again
    spare = len(material.haystack) - count
    if spare < 0:
        raise ValueError(
            f"haystack has {len(material.haystack)} tokens, but the longest text needs {count} beside the "
            "passkey; give more or shorter lengths"
        )
    return random_stretch(material.haystack, count, rng)


def _batches(
    texts: list[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> Iterator[tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B A"]]]:
    """Tokens, and which are the answer, for as many last tokens as the longest answer has.

    All batches have one shape: the last is filled up with its last text.
    """
    answer = max(int(is_answer.sum()) for _, is_answer in texts)
    for first in range(0, len(texts), batch_size):
        rows = texts[first : first + batch_size]
        rows += rows[-1:] * (batch_size - len(rows))
        yield np.stack([tokens for tokens, _ in rows]), np.stack([row[-answer:] for _, row in rows])


def _check(
    lengths: Sequence[int], depths: Sequence[float | int], samples: int, digits: int, batch_size: int
) -> None:
    if not lengths or not depths:
        raise ValueError(f"lengths and depths must not be empty, not {list(lengths)} and {list(depths)}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths must be from 0 to 1, not {depth}")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 1 <= digits <= 18:
        raise ValueError(f"digits must be 1 to 18, not {digits}")
