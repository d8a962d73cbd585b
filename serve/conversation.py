"""The cache of a conversation: it grows with it, and each turn computes only what is new."""

import dataclasses
from collections.abc import Generator, Sequence

from tokenizers import Tokenizer

from jsparse.models import Llama
from jsparse.models.positions import positions_of
from jsparse.serve.batch import Batch, TokenEvent
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import CacheLayout, capacity_for, plan_cache
from jsparse.serve.request import check_requests
from jsparse.serve.sampling import GREEDY, SamplingParams

_LEAST_CAPACITY = 2048  # so that the first turns compile once


class Conversation:
    """Answers prompts, each of which most often begins with the one before: the turns of a conversation.

    The answers are those of ``stream``, up to rounding: a prompt that begins otherwise is computed anew.

    - model, tokenizer: what answers.
    - cache: as for ``stream``; its ``batch`` is 1. Without ``capacity`` it has room for 2048 tokens, or for a
      power of two of pages that the longest turn so far needs. A larger cache begins empty.

    Raises ValueError for a cache that does not fit the model.

    >>> from flax import nnx
    >>> from jsparse.models import LlamaConfig, byte_tokenizer
    >>> model = Llama(LlamaConfig.tiny(vocab_size=300, max_position_embeddings=256), rngs=nnx.Rngs(0))
    >>> talk = Conversation(model, CacheConfig(policy="dense"), byte_tokenizer())
    >>> prompt = list(range(100))
    >>> answer = [event.token for event in talk.answer(prompt, max_new_tokens=3)]
    >>> answer += [event.token for event in talk.answer([*prompt, *answer, 7], max_new_tokens=3)]
    >>> len(answer), talk.reused_tokens
    (6, 64)
    """

    def __init__(self, model: Llama, cache: CacheConfig, tokenizer: Tokenizer):
        self._model, self._tokenizer = model, tokenizer
        self._cache = dataclasses.replace(cache, batch=1)
        self._batch: Batch | None = None
        self._layout(1, 1)  # raises

    @property
    def reused_tokens(self) -> int:
        """How many tokens of the last prompt were in the cache already."""
        return 0 if self._batch is None else self._batch.reused_tokens

    @property
    def cache_bytes(self) -> int:
        return 0 if self._batch is None else self._batch.cache_bytes

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
    ) -> Generator[TokenEvent, None, None]:
        """``stream`` for one prompt. If the generator is closed early, the answer ends there.

        After an answer that breaks off, or that is left open, the next begins with an empty cache.

        Raises what ``stream`` raises, when the first token is asked for, and ValueError for ``n`` > 1.
        """
        config = self._model.config
        if sampling.n > 1:
            raise ValueError(f"n={sampling.n}, but a turn of a conversation has one answer")
        [request] = check_requests(config, [prompt], max_new_tokens, sampling, seed, self._tokenizer)
        layout = self._layout(len(request.prompt), request.max_new)
        batch = self._batch  # it still runs if the answer before was left in the middle
        if batch is None or batch.running or batch.layout.capacity < layout.capacity:
            self._batch = batch = None  # its memory is free before the larger cache takes its own
            self._batch = batch = Batch(self._model, layout, self._tokenizer, keeps_prompt=True)
        try:
            events = batch.add([request])
            number = events[0].prompt
            yield from events
            while batch.running:
                yield from batch.step()
        except GeneratorExit:  # closed
            if batch.running:
                batch.remove(number)
            raise
        except BaseException:
            self._batch = None  # the call that broke off was given its arrays for good
            raise

    def _layout(self, length: int, max_new: int) -> CacheLayout:
        config, cache = self._model.config, self._cache
        tokens = max(length + max_new, min(_LEAST_CAPACITY, positions_of(config).most))
        cache = dataclasses.replace(cache, capacity=capacity_for(cache, tokens))
        return plan_cache(cache, config, [length], [max_new])
