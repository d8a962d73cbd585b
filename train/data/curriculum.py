"""What pretraining shows a model: real text, and texts that cannot be continued without looking far back."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Integer
from tokenizers import Tokenizer

from jsparse.texts import tasks
from jsparse.texts.passkeys import Passkeys, passkey_sample, random_stretch

# What each token is scored as. COPY to COMMON are answers: the tokens before determine them.
NOT_SCORED, TEXT, COPY, RECALL, CHAIN, PASSKEY, COMMON, LISTED = range(-1, 7)
KINDS = ("text", "copy", "recall", "chain", "passkey", "common", "words")

_PLAIN_BELOW = 192  # tokens of a text that is too short for a header
_ALIASES = 0.25  # fraction of new keys whose value is another key
_QUESTIONS = 0.5  # fraction of repetitions that are questions
Sentence = tuple[list[int], list[int]]  # tokens and their kinds


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps on rows of one length: ``rows`` per step, with kinds in the proportions of ``mix``."""

    steps: int
    length: int
    rows: int
    mix: Mapping[str, float]


class Lessons:
    """Makes rows from the tokens of real text.

    Kinds of rows, by the names that a ``Stage`` mixes:

    - "text": a stretch of the text.
    - "copy": random words, and then the same words again. A model learns induction from these in a few
      hundred steps, and does not from the others alone.
    - "recall": a stretch of the text with sentences such as "amber is tulip" at random places, each said or
      asked for several times. When it is said again, the value is an answer. The value of some keys is
      another key, and the answer is then the chain to a value. Some texts have a passkey. Between key and
      value comes " is", "?" or nothing, so a model looks for the value at each of these tokens, not only at
      the last token of a question. With up to four tokens in between, a model did not tell keys apart after
      500 steps.
    - "far": like "recall", but each key is said once, at a random place, and all are asked for at the end.
      Without these, a model missed 7 of 64 keys in texts of 2048 tokens, all in the first 36 % of the text.
    - "list": lists of words, three of which are more frequent, and a question that asks for those three. The
      words themselves are scored too: the most frequent ones are the best prediction of the next.
    - "passkeys": what ``jsparse heads`` asks (``jsparse.texts.passkeys``).
    """

    def __init__(self, tokenizer: Tokenizer, text: Integer[np.ndarray, " N"]):
        def encode(string: str) -> list[int]:
            return tokenizer.encode(string, add_special_tokens=False).ids

        self.text = np.asarray(text, np.int32)
        self._encode = encode
        self._words = np.array([_one_token(encode, word) for word in tasks.WORDS])
        self._keys = np.array([_one_token(encode, word) for word in tasks.KEYS])
        self._values = np.array([_one_token(encode, word) for word in tasks.VALUES])
        self._headers = encode(tasks.HEADER), encode(tasks.PASSKEY_HEADER)
        self._list_header = encode(tasks.LIST_HEADER)
        self._list_question = encode("\n" + tasks.LIST_QUESTION)
        self._said, self._asked = encode("\n#"), encode("\n# What is")
        self._is, self._mark, self._end = encode(" is"), encode("?"), encode(".\n")
        self._passkey_question = encode(tasks.PASSKEY_QUESTION)

    def batch(
        self, stage: Stage, step: int, seed: int
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """The tokens of a step's rows, and the kind that each is scored as.

        A pure function of its arguments: row ``r`` is drawn from ``(seed, step, r)``.
        """
        makers = {
            "text": self._text_row,
            "copy": self._copy_row,
            "recall": self._recall_row,
            "far": functools.partial(self._recall_row, far=True),
            "list": self._list_row,
            "passkeys": self._passkeys_row,
        }
        names = list(stage.mix)
        edges = np.cumsum([stage.mix[name] for name in names])
        rows = []
        for row in range(stage.rows):
            rng = np.random.default_rng([seed, step, row])
            place = (row + rng.random()) / stage.rows * edges[-1]  # so every step has all kinds
            name = names[min(int(np.searchsorted(edges, place, side="right")), len(names) - 1)]
            rows.append(makers[name](stage.length, rng))
        tokens, kinds = zip(*rows, strict=True)
        return np.array(tokens, np.int32), np.array(kinds, np.int32)

    def _text_row(self, length: int, rng: np.random.Generator) -> Sentence:
        return self._stretch(length, rng), [TEXT] * length

    def _stretch(self, length: int, rng: np.random.Generator) -> list[int]:
        return random_stretch(self.text, length, rng).tolist()

    def _copy_row(self, length: int, rng: np.random.Generator) -> Sentence:
        period = int(rng.integers(length // 8, length // 2 + 1))
        words = rng.choice(self._words, period)
        return np.resize(words, length).tolist(), [NOT_SCORED] * period + [COPY] * (length - period)

    def _recall_row(self, length: int, rng: np.random.Generator, *, far: bool = False) -> Sentence:
        short = length < _PLAIN_BELOW
        start = [] if short else self._headers[int(rng.random() < 0.2)]
        said, asked = (self._said_once if far else self._said_often)(length, rng, short=short)
        return self._hidden(start, said, asked, length, rng)

    def _said_often(
        self, length: int, rng: np.random.Generator, *, short: bool
    ) -> tuple[list[Sentence], list[Sentence]]:
        """Sentences for random places, close together, and one for the end."""
        spacing = rng.uniform(20, 48) if short else np.exp(rng.uniform(np.log(24), np.log(160)))
        *sentences, last = self._sentences(max(3, int(length / spacing)), rng, passkey=not short)
        return sentences, [last]

    def _said_once(
        self, length: int, rng: np.random.Generator, *, short: bool
    ) -> tuple[list[Sentence], list[Sentence]]:
        """One sentence for each key, and sentences at the end that ask for all of them."""
        count = max(2, int(length / np.exp(rng.uniform(np.log(40), np.log(100)))))
        keys = [int(key) for key in rng.permutation(self._keys)[:count]]
        known: dict[int, int] = {}
        said = [self._said_of(key, known, rng) for key in keys]
        asked = [self._said_of(key, known, rng) for key in rng.permutation(keys).tolist()]
        if not short:
            key = str(rng.integers(10_000, 100_000))
            question = _answered(self._passkey_question, self._encode(f" {key}"), PASSKEY, self._end)
            said.insert(rng.integers(len(said) + 1), self._passkey_said(key))
            asked.insert(rng.integers(len(asked) + 1), question)
        return said, asked

    def _hidden(
        self,
        start: list[int],
        sentences: list[Sentence],
        at_end: list[Sentence],
        length: int,
        rng: np.random.Generator,
    ) -> Sentence:
        """A row of text with sentences at random places in it, in order, and others at its end."""
        sentences = sentences + at_end
        rest = length - len(start) - sum(len(tokens) for tokens, _ in sentences)
        while rest < 0:  # drop the earliest; questions about them are then guesses, in short rows only
            rest += len(sentences.pop(0)[0])
        ends = min(len(at_end), len(sentences))
        cuts = [*np.sort(rng.integers(0, rest + 1, len(sentences) - ends)), *[rest] * ends]
        text = self._stretch(rest, rng)
        row, row_kinds, last = [*start], [NOT_SCORED] * len(start), 0
        for cut, (tokens, kinds) in zip(cuts, sentences, strict=True):
            row += text[last:cut] + tokens
            row_kinds += [TEXT] * (cut - last) + kinds
            last = cut
        return row, row_kinds

    def _sentences(self, count: int, rng: np.random.Generator, *, passkey: bool) -> list[Sentence]:
        """What is said and asked about some keys, in order. The last is about a key that was said before."""
        keys = rng.permutation(self._keys)[: max(2, int(count * rng.uniform(0.25, 0.5)))]
        known: dict[int, int] = {}  # what a key was said to be: a value, or another key
        passkey_at = rng.integers(count // 2 + 1) if passkey and rng.random() < 0.5 else count
        digits: list[int] = []
        sentences = []
        for number in range(count):
            if number == passkey_at:
                key = str(rng.integers(10_000, 100_000))
                digits = self._encode(f" {key}")
                sentences.append(self._passkey_said(key))
            elif digits and rng.random() < 0.08:
                sentences.append(_answered(self._passkey_question, digits, PASSKEY, self._end))
            else:
                last = number == count - 1 and known
                key = int(rng.choice(list(known) if last else keys))
                sentences.append(self._said_of(key, known, rng))
        return sentences

    def _said_of(self, key: int, known: dict[int, int], rng: np.random.Generator) -> Sentence:
        link = ([], self._is, self._mark)[rng.integers(3)]
        if key not in known:
            is_alias = known and rng.random() < _ALIASES
            known[key] = int(rng.choice(list(known) if is_alias else self._values))
            return _answered([*self._said, key, *link], [known[key]], NOT_SCORED, self._end)
        if rng.random() >= _QUESTIONS:
            return _answered([*self._said, key, *link], [known[key]], RECALL, self._end)
        chain = [known[key]]
        while chain[-1] in known:
            chain += [*self._is, known[chain[-1]]]
        before = [*self._asked, key, *self._mark, key, *link]
        return _answered(before, chain, CHAIN if len(chain) > 1 else RECALL, self._end)

    def _passkey_said(self, key: str) -> Sentence:
        """The sentence has the key twice: the second time it is an answer."""
        before, after = tasks.PASSKEY_NEEDLE.format(key=key).rsplit(f" {key}", 1)
        return _answered(self._encode(before), self._encode(f" {key}"), PASSKEY, self._encode(after))

    def _list_row(self, length: int, rng: np.random.Generator) -> Sentence:
        """Lists of words with their questions, one after another, of any length up to the whole row."""
        row, kinds = [*self._list_header], [NOT_SCORED] * len(self._list_header)
        asked = len(self._list_question) + 3 + len(self._end)
        while (room := length - len(row) - asked) >= 24:
            count = room if rng.random() < 0.4 else int(np.exp(rng.uniform(np.log(24), np.log(room + 1))))
            pool = rng.permutation(self._words)[: int(np.clip(count // rng.integers(4, 17), 8, 128))]
            common = pool[:3]
            weights = np.ones(len(pool))
            weights[:3] = rng.uniform(4, 8)
            times = np.round(weights * count / weights.sum()).astype(int)
            words = rng.permutation(np.repeat(pool, times))[:count].tolist()
            asks, answered = _answered(
                self._list_question, rng.permutation(common).tolist(), COMMON, self._end
            )
            row += words + asks
            kinds += [LISTED] * len(words) + answered
        rest = length - len(row)
        return row + self._stretch(rest, rng), kinds + [NOT_SCORED] * rest

    def _passkeys_row(self, length: int, rng: np.random.Generator) -> Sentence:
        needles, words = int(rng.integers(1, 1 + max(1, length // 256))), int(rng.integers(1, 6))
        passkeys = Passkeys(self.text, self._encode, needles, words)
        tokens, is_answer = passkey_sample(passkeys, length, rng)
        return tokens.tolist(), np.where(is_answer, PASSKEY, NOT_SCORED).tolist()


def _answered(before: Sequence[int], answer: list[int], kind: int, after: list[int]) -> Sentence:
    tokens = [*before, *answer, *after]
    return tokens, [NOT_SCORED] * len(before) + [kind] * len(answer) + [NOT_SCORED] * len(after)


def _one_token(encode, word: str) -> int:
    tokens = encode(f" {word}")
    if len(tokens) != 1:
        raise ValueError(f"tokenizer must have {word!r} as one token, but takes {len(tokens)}")
    return tokens[0]
