"""Text from tokens as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_INCOMPLETE = "\ufffd"  # what bytes decode to that are no whole character
_CONTEXT = 16  # tokens of the prompt that are decoded with the first new one


class StopStrings:
    """Text up to the first stop string that is complete, from pieces cut anywhere.

    An end of the text that may be the start of a stop string is held back until that is decided.

    - stop: the strings.

    >>> text = StopStrings(["###"])
    >>> text.feed("one #"), text.feed(" two #"), text.feed("## three"), text.stopped
    ('one ', '# two ', '', True)
    """

    def __init__(self, stop: Sequence[str]):
        self.stopped = False
        self._stop = stop
        self._held = ""

    def feed(self, text: str) -> str:
        """What is safe to print now that ``text`` has come."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.index(one) + len(one), text.index(one)) for one in self._stop if one in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        start = len(text) - max((_overlap(text, one) for one in self._stop), default=0)
        self._held = text[start:]
        return text[:start]

    def end(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one sequence, token by token.

    What may still become another character or a stop string is held back. Special tokens have no text.

    - tokenizer: that of the model.
    - prompt: the tokens before, which decide whether the text begins with a space.
    - stop: strings that end the text; it is cut before the first that is complete.
    - min_tokens: stop strings count only after this many tokens.

    >>> from jsparse.models import byte_tokenizer
    >>> text = TextStream(byte_tokenizer(), stop=["END"])
    >>> [text.feed(token) for token in "né END!".encode()], text.stopped
    (['n', '', 'é', ' ', '', '', '', ''], True)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ):
        self._tokenizer = tokenizer
        # A prompt that ends within a character would be taken for new text.
        end = len(prompt)
        while self._text(prompt[max(0, end - _CONTEXT) : end]).endswith(_INCOMPLETE):
            end -= 1
        self._decode = _decoder(prompt[max(0, end - _CONTEXT) : end])
        self._strings = StopStrings(stop)
        self._unchecked = min_tokens
        self._pending: list[int] = []  # tokens of a character that is not complete

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._strings.stopped

    def feed(self, token: int) -> str:
        """What is safe to print after one more token, "" once a stop string has come."""
        self._pending.append(token)
        try:
            text = self._decode.step(self._tokenizer, token)
        except Exception:  # a bare one: bytes that were no character would change text that is out already
            text, self._decode = self._text(self._pending), _decoder(self._pending)
        if text is not None:
            self._pending = []
        if self._unchecked:
            self._unchecked -= 1
            return text or ""
        return self._strings.feed(text or "")

    def end(self) -> str:
        """What was held back, when no more tokens come: an incomplete character becomes U+FFFD."""
        rest = self._text(self._pending)
        self._pending = []
        return self._strings.feed(rest) + self._strings.end()

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def _decoder(context: Sequence[int]) -> DecodeStream:
    return DecodeStream(ids=list(context), skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` are the first ones of ``stop``, which is not in it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
