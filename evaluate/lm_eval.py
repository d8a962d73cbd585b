"""Published tasks: a model with its cache as EleutherAI's lm-evaluation-harness takes one."""

import dataclasses
import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jsparse.extras import require_extra
from jsparse.integers import power_of_two_from
from jsparse.models import Llama, load_tokenizer
from jsparse.models.positions import positions_of
from jsparse.serve.config import CacheConfig
from jsparse.serve.generation import stream
from jsparse.serve.head_order import streaming_heads_last
from jsparse.serve.logits import decode_logits
from jsparse.serve.sampling import SamplingParams
from jsparse.texts.tokenizer import prompt_ids

_INSTALLED = importlib.util.find_spec("lm_eval") is not None
# Without the harness there is nothing to derive from. Only the class needs it, not its computations.
_Base: Any = importlib.import_module("lm_eval.api.model").LM if _INSTALLED else object

_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION_KEYWORDS = ("until", "do_sample", "temperature", "top_k", "top_p", *_MAX_NEW_TOKENS)
_SHORTEST = 16  # least number of tokens scored at a time; more come in powers of two, for few compilations


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a request of ``generate_until`` asks for."""

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: SamplingParams


class JsparseLM(_Base):
    """A checkpoint read through a KV cache, for ``lm_eval.simple_evaluate``.

    Answers come from the decode step, so what a sparse cache leaves out counts:

    - ``loglikelihood``: all but the last token of a context is a prompt; then the continuation is fed token
      by token. ``loglikelihood_rolling``: windows of ``max_length`` tokens, token by token.
    - ``generate_until``: prompts in batches; a text ends before the first of its stop strings.

    A context is a prompt, which heads that do not stream read densely: only tokens after it choose pages. So
    a task with its question at the end of the context makes a sparse cache look better than one whose
    question is decoded too (as ``jsparse.texts.tasks`` does).

    - model: a Hugging Face folder with config.json, safetensors and tokenizer.json, or an id on the Hub.
    - cache: ``streaming_heads`` are the model's own, in the order of its checkpoint. ``batch`` must be None.
    - batch_size: prompts per batch.
    - max_new_tokens: the limit where a task names none.
    - max_length: tokens of a context and its continuation together; None takes the model's positions, or the
      cache's capacity. Longer contexts are cut to their end, as the harness does, with a warning.
    - prefix_token_id: the token before a text without a context; None takes the model's bos or eos token.
    - dtype: dtype of the weights; None for the stored one.

    Chat templates are not applied. Logits of a whole continuation are kept at once, in float32.

    Raises MissingExtra where lm_eval is not installed, ValueError for arguments out of range, and what the
    cache, the model and the tokenizer raise when they are loaded.

    With ``pip install -e '.[lm-eval]'`` in a clone, and the data of a task within reach::

        import lm_eval
        from jsparse.serve import CacheConfig
        from jsparse.evaluate.lm_eval import JsparseLM

        lm = JsparseLM("my-llama", CacheConfig(budget=1024))
        print(lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])["results"])
    """

    def __init__(
        self,
        model: str | Path,
        cache: CacheConfig = CacheConfig(),  # noqa: B008, it is frozen
        *,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        dtype: Any = None,
    ):
        require_extra("lm_eval", "lm-eval", "the harness is not installed")
        super().__init__()
        if cache.batch is not None:
            raise ValueError(f"cache.batch={cache.batch} must be None: give batch_size")
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.tokenizer = load_tokenizer(model)
        self.model, self.cache = streaming_heads_last(Llama.from_pretrained(model, dtype=dtype), cache)
        config = self.model.config
        has = positions_of(config)
        most = min(cache.capacity or has.most, has.most)
        if max_length is not None and not 2 <= max_length <= most:
            raise ValueError(f"max_length must be 2 to {most} or None, not {max_length}")
        self.max_length = min(most, has.certain) if max_length is None else max_length
        if prefix_token_id is None:
            prefix_token_id = next(
                (one for one in (config.bos_token_id, *config.eos_token_ids) if one is not None), None
            )
        elif not 0 <= prefix_token_id < config.vocab_size:
            raise ValueError(f"prefix_token_id must be 0 to {config.vocab_size - 1}, not {prefix_token_id}")
        self.prefix_token_id = prefix_token_id
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-probability, and whether greedy decoding gives it."""
        pairs = [self._pair(*request.args) for request in requests]
        cut = [keep_end(context, len(rest) - 1, self.max_length) for context, rest in pairs]
        _warn_of_cut([len(context) for context, _ in pairs], [len(context) for context in cut])
        return [
            score_continuation(self.model, context, continuation, self.cache, self.max_length)
            for context, (_, continuation) in zip(cut, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each (text,): the log-probability of all its tokens, one window after another."""
        return [sum(self._window_scores(*request.args)) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, keywords of generation): what follows, up to the first stop string."""
        prompts = [self._encode(request.args[0]) for request in requests]
        wishes = [read_wish(request.args[1], self.max_new_tokens) for request in requests]
        cut = [
            keep_end(prompt, wish.max_new_tokens, self.max_length)
            for prompt, wish in zip(prompts, wishes, strict=True)
        ]
        _warn_of_cut([len(prompt) for prompt in prompts], [len(prompt) for prompt in cut])
        texts = [""] * len(cut)
        for rows in self._batches(cut, wishes):
            batch = [(cut[i], wishes[i]) for i in rows]
            for i, text in zip(rows, answer(self.model, self.tokenizer, batch, self.cache), strict=True):
                texts[i] = text
        return texts

    def _batches(self, prompts: list[list[int]], wishes: list[Wish]) -> Iterator[tuple[int, ...]]:
        """Places of prompts that are answered together: with one limit, and of like lengths."""
        order = sorted(range(len(prompts)), key=lambda i: (wishes[i].max_new_tokens, len(prompts[i])))
        for _, alike in itertools.groupby(order, key=lambda i: wishes[i].max_new_tokens):
            while rows := tuple(itertools.islice(alike, self.batch_size)):
                yield rows

    def _encode(self, text: str) -> list[int]:
        return prompt_ids(self.tokenizer, text) if text else [self._prefix()]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return encode_pair(self._encode, context, continuation)
        return [self._prefix()], self.tokenizer.encode(continuation, add_special_tokens=False).ids

    def _window_scores(self, text: str) -> Iterator[float]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        for context, continuation in rolling_windows(tokens, self._prefix(), self.max_length):
            yield score_continuation(self.model, context, continuation, self.cache, self.max_length)[0]

    def _prefix(self) -> int:
        if self.prefix_token_id is None:
            raise ValueError(
                "prefix_token_id=None must be given for texts without a context: the model has no bos or eos"
            )
        return self.prefix_token_id


def _warn_of_cut(before: list[int], after: list[int]) -> None:
    count = sum(a != b for a, b in zip(before, after, strict=True))
    if count:
        warnings.warn(
            f"{count} of {len(before)} contexts are too long, the longest with {max(before)} tokens: "
            "of these the end is taken, as the harness does",
            stacklevel=3,
        )


def encode_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The tokens of a context and of its continuation, as the harness cuts them.

    Spaces at the end of the context belong to the continuation. Its tokens are those of both together, after
    as many as the context alone has.

    >>> encode_pair(lambda text: [len(word) for word in text.split()], "a bb ", "ccc")
    ([1, 2], [3])
    """
    stripped = context.rstrip() or context
    tokens = encode(stripped)
    return tokens, encode(context + continuation)[len(tokens) :]


def keep_end(context: list[int], after: int, max_length: int) -> list[int]:
    """As much of the context's end as fits before ``after`` tokens; ValueError where nothing does.

    >>> keep_end([1, 2, 3], 1, max_length=3)
    [2, 3]
    """
    if after >= max_length:
        raise ValueError(
            f"{after} tokens after a context must be less than max_length={max_length}: "
            "at least one token of the context stands before them"
        )
    return context[after - max_length :]


def rolling_windows(tokens: list[int], prefix: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) for all tokens of a text, each scored once, in windows of ``max_length``.

    As the harness cuts them: a window begins after one token of context, and the last window has as much
    context as fits.

    >>> list(rolling_windows([0, 1, 2, 3, 4], prefix=9, max_length=3))
    [([9], [0, 1, 2]), ([1, 2], [3, 4])]
    """
    text = [prefix, *tokens]
    for start in range(1, len(text), max_length):
        end = min(start + max_length, len(text))
        yield text[max(0, end - 1 - max_length) : start], text[start:end]


def score_continuation(
    model: Llama, context: list[int], continuation: list[int], cache: CacheConfig, max_length: int
) -> tuple[float, bool]:
    """The log-probability of the continuation in nats, and whether each token of it is the most likely one.

    All of the context except its last token is the prompt. From there on the decode step takes one token at a
    time, at most ``max_length`` together with the prompt. Raises ValueError for an empty continuation, and
    FloatingPointError for logits that are not finite.

    >>> from flax import nnx
    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig.tiny(vocab_size=4)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> total = sum(np.exp(score_continuation(model, [1, 2], [i], CacheConfig(), 8)[0]) for i in range(4))
    >>> round(float(total), 5)
    1.0
    """
    if not continuation:
        raise ValueError("continuation must be at least one token, not empty")
    tokens = np.array([*context, *continuation], np.int32)
    # Such a context is one token, a prompt whose logits no cache changes.
    alone = len(context) == 1
    border = max(1, len(context) - 1)
    prompt, fed = tokens[:border], tokens[border:-1]
    logits = [np.asarray(model(prompt[None])[0], np.float32)] if alone else []
    if len(fed):
        width = min(max(_SHORTEST, power_of_two_from(len(fed))), max_length - border)
        padded = np.pad(fed, (0, width - len(fed)))  # later tokens change nothing before them
        logits.append(decode_logits(model, prompt, padded, cache)[: len(fed)])
    chosen = np.array(continuation)
    table = np.concatenate(logits)
    values = np.array([row[token] - _log_sum_exp(row) for row, token in zip(table, chosen, strict=True)])
    if not np.isfinite(values).all():
        raise FloatingPointError(f"the logits after a context of {len(context)} tokens are not finite")
    return float(values.sum()), bool((table.argmax(-1) == chosen).all())


def _log_sum_exp(logits: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    return logits.max() + np.log(np.exp(logits - logits.max()).sum())


def read_wish(keywords: Mapping[str, Any], max_new_tokens: int) -> Wish:
    """The keywords of a task's generation, read as the harness reads them.

    Greedy, unless ``do_sample`` or a temperature says otherwise. Raises ValueError for keywords other than
    these, which would be ignored.

    >>> wish = read_wish({"until": "end", "max_gen_toks": 9, "do_sample": False}, max_new_tokens=256)
    >>> wish.max_new_tokens, wish.stops, wish.sampling.temperature
    (9, ('end',), 0.0)
    """
    unknown = sorted(set(keywords) - set(_GENERATION_KEYWORDS))
    if unknown:
        raise ValueError(
            f"generation keyword {unknown[0]}={keywords[unknown[0]]!r} is unknown; "
            f"allowed are {', '.join(_GENERATION_KEYWORDS)}"
        )
    until = keywords.get("until") or []
    stops = [until] if isinstance(until, str) else until
    given = [keywords[name] for name in _MAX_NEW_TOKENS if keywords.get(name) is not None]
    temperature, samples = keywords.get("temperature"), keywords.get("do_sample")
    if samples or (samples is None and temperature):
        sampling = SamplingParams(
            temperature=1.0 if temperature is None else temperature,
            top_k=keywords.get("top_k", 0),
            top_p=keywords.get("top_p", 1.0),
        )
    else:
        sampling = SamplingParams(temperature=0.0)
    limit = int(given[0]) if given else max_new_tokens
    return Wish(limit, tuple(stop for stop in stops if stop), sampling)


def answer(
    model: Llama,
    tokenizer: tokenizers.Tokenizer,
    batch: Sequence[tuple[list[int], Wish]],
    cache: CacheConfig,
) -> list[str]:
    """The texts after prompts with the same ``max_new_tokens``, up to their stop strings.

    Generation ends when each text has its stop string or its end.
    """
    tokens: list[list[int]] = [[] for _ in batch]
    texts, running = [""] * len(batch), set(range(len(batch)))
    events = stream(
        model,
        [prompt for prompt, _ in batch],
        batch[0][1].max_new_tokens,
        [wish.sampling for _, wish in batch],
        cache,
    )
    for row, token, reason in events:
        if row not in running:
            continue
        if token is None:
            raise FloatingPointError(f"the logits are not finite after {len(tokens[row])} new tokens")
        tokens[row].append(token)
        whole = tokenizer.decode(tokens[row])
        texts[row] = until_stop(whole, batch[row][1].stops)
        if texts[row] != whole or reason is not None:
            running.remove(row)
        if not running:
            break
    return texts


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings.

    >>> until_stop("one. two, three", [",", "."])
    'one'
    """
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text
