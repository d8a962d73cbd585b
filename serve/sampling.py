"""How tokens are chosen and when sequences end: one sequence's parameters, and those of a batch."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jsparse.arrays import HostOrDevice
from jsparse.integers import is_integer, require_integer
from jsparse.serve.logprobs import MAX_LOGPROBS

_LEAST_TEMPERATURE = 1e-30  # a smaller one may be 0 in float32; nothing but a tie survives either
_MOST_TEMPERATURE = 1e30
MAX_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_SAMPLES = 128


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are chosen and when it stops; fields as in vLLM.

    - temperature: 0 takes the most likely token; otherwise logits are divided by it. However small it is,
      nothing overflows, so none is raised (vLLM makes 0.01 of what is less).
    - top_k: sample among the k most likely tokens only; 0 or -1 for all.
    - top_p: of these, only the most likely tokens that together reach this probability, in (0, 1].
    - stop_token_ids: tokens that end the sequence, besides the model's own ``eos_token_ids``. They are
      returned.
    - ignore_eos: whether the sequence continues after the model's own end tokens.
    - min_p: sample only among tokens that are at least this times as likely as the most likely one, in
      [0, 1].
    - repetition_penalty: more than 1 makes tokens of the prompt and of the continuation less likely, less
      than 1 more likely; from 0.01 to 100.
    - presence_penalty, frequency_penalty: taken from the logit of a token that was generated, once and as
      often as it was; from -2 to 2.
    - logit_bias: what is added to the logits of some ids, from -100 to 100; of at most 1024 ids.
    - min_tokens: no token or string ends the sequence before this many new tokens.
    - stop: strings that end the sequence, at most 16. The text ends before the first of them that is
      complete. ``generate`` needs a tokenizer then. One that is a special token counts as its id.
    - n: samples per prompt, at most 128. Sample ``i`` has the prompt's seed plus ``i``, as in vLLM. Each
      takes a row and pages of its own. Those of temperature 0 are all equal.
    - logprobs: return the log-probability of each new token, and of this many most likely ones, at most 20;
      None for neither. They are of the model's distribution before any of these parameters.
    - prompt_logprobs: the same for the tokens of the prompt. The first request for it compiles once more.

    Tokens exactly as likely as the last one that top-k or top-p keeps are kept too.

    Raises ValueError, naming the field and its range.

    >>> SamplingParams(top_p=0.0)
    Traceback (most recent call last):
        ...
    ValueError: top_p must be a number in (0, 1], not 0.0
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    logit_bias: Mapping[int, float | int] = dataclasses.field(default_factory=dict, hash=False)
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self):
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or a finite number above it, not {self.temperature!r}"
            )
        if not is_integer(self.top_k) or not -1 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be an integer >= 1, or 0 or -1 for all tokens, not {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number in (0, 1], not {self.top_p!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        for name, least, most in (
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            _require_number(name, getattr(self, name), least, most)
        require_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        require_integer("n", self.n, 1, MAX_SAMPLES)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 0, MAX_LOGPROBS, " or None")
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _stop_strings(self.stop))


def _token_ids(given) -> tuple[int, ...]:
    try:
        ids = tuple(given)
    except TypeError:
        raise ValueError(f"stop_token_ids must be a sequence of ids, not {given!r}") from None
    for token in ids:
        if not is_integer(token) or token < 0:
            raise ValueError(f"stop_token_ids must be integers >= 0, not {token!r}")
    return ids


def _biases(given) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias must be a mapping from ids to numbers, not {given!r}")
    if len(given) > MAX_BIASES:
        raise ValueError(f"logit_bias must have at most {MAX_BIASES} ids, not {len(given)}")
    for token, bias in given.items():
        if not is_integer(token) or token < 0:
            raise ValueError(f"logit_bias must be of ids, integers >= 0, not {token!r}")
        _require_number(f"logit_bias[{token}]", bias, -100, 100)
    return {int(token): float(bias) for token, bias in given.items()}


def _stop_strings(given) -> tuple[str, ...]:
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, Sequence):
        raise ValueError(f"stop must be a string or a list of strings, not {given!r}")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must have at most {MAX_STOP_STRINGS} strings, not {len(strings)}")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be strings of one character or more, not {string!r}")
    return tuple(strings)


def _require_number(name: str, value, least: float | int, most: float | int) -> None:
    if not _is_number(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


GREEDY = SamplingParams(temperature=0.0)  # always the most likely token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """The sampling parameters of a batch as arrays, one entry per row: new values compile nothing."""

    temperature: HostOrDevice  # float32 [B]
    top_k: HostOrDevice  # int32 [B], 0 for all
    top_p: HostOrDevice  # float32 [B]
    min_p: HostOrDevice  # float32 [B]
    repetition_penalty: HostOrDevice  # float32 [B]
    presence_penalty: HostOrDevice  # float32 [B]
    frequency_penalty: HostOrDevice  # float32 [B]
    biased: HostOrDevice  # bool [B]: whether the row has biases
    bias_ids: HostOrDevice  # int32 [B, MAX_BIASES], filled up with ids beyond the vocabulary
    biases: HostOrDevice  # float32 [B, MAX_BIASES]
    min_tokens: HostOrDevice  # int32 [B]
    scored: HostOrDevice  # bool [B]: whether log-probabilities are wanted
    seed: HostOrDevice  # uint32 [B]
    prompt_hash: HostOrDevice  # uint32 [B]
    stops: HostOrDevice  # bool [B, vocab]: the tokens that end the row
    max_new: HostOrDevice  # int32 [B], 0 in a row without a prompt

    @classmethod
    def of(
        cls,
        sampling: list[SamplingParams],
        seeds: list[int],
        max_new: list[int],
        *,
        batch: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        prompt_hashes: Sequence[int] = (),
    ) -> "RowParams":
        """NumPy arrays of ``batch`` rows; those beyond the sequences are greedy and never used.

        ``prompt_hashes`` are 0 where none are given.
        """
        rows = [*sampling, *[SamplingParams()] * (batch - len(sampling))]
        stops = np.zeros((batch, vocab_size), bool)
        bias_ids = np.full((batch, MAX_BIASES), vocab_size, np.int32)
        biases = np.zeros((batch, MAX_BIASES), np.float32)
        for row, params in enumerate(rows):
            stops[row, list(params.stop_token_ids)] = True
            if not params.ignore_eos:
                stops[row, list(eos_token_ids)] = True
            count = len(params.logit_bias)
            bias_ids[row, :count] = list(params.logit_bias)
            biases[row, :count] = list(params.logit_bias.values())

        def floats(name: str) -> np.ndarray:
            return np.array([getattr(params, name) for params in rows], np.float32)

        def padded(values: Sequence[int], dtype: type) -> np.ndarray:
            return np.array([*values, *[0] * (batch - len(values))], dtype)

        temperatures = [
            params.temperature and min(max(params.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)
            for params in rows
        ]
        return cls(
            temperature=np.array(temperatures, np.float32),
            top_k=np.array([max(params.top_k, 0) for params in rows], np.int32),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            repetition_penalty=floats("repetition_penalty"),
            presence_penalty=floats("presence_penalty"),
            frequency_penalty=floats("frequency_penalty"),
            biased=np.array([bool(params.logit_bias) for params in rows]),
            bias_ids=bias_ids,
            biases=biases,
            min_tokens=np.array([params.min_tokens for params in rows], np.int32),
            scored=np.array([params.logprobs is not None for params in rows]),
            seed=padded(seeds, np.uint32),
            prompt_hash=padded(prompt_hashes, np.uint32),
            stops=stops,
            max_new=padded(max_new, np.int32),
        )
