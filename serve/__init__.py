"""Serving: text generation from a sparse KV cache, and sampling."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.serve.batch import Batch as Batch
    from jsparse.serve.batch import TokenEvent as TokenEvent
    from jsparse.serve.config import CacheConfig as CacheConfig
    from jsparse.serve.generation import GenerateResult as GenerateResult
    from jsparse.serve.generation import GenerateStats as GenerateStats
    from jsparse.serve.generation import generate as generate
    from jsparse.serve.generation import stream as stream
    from jsparse.serve.generation_file import GenerationDefaults as GenerationDefaults
    from jsparse.serve.generation_file import generation_defaults as generation_defaults
    from jsparse.serve.logits import decode_logits as decode_logits
    from jsparse.serve.logprobs import TokenLogprobs as TokenLogprobs
    from jsparse.serve.sampling import SamplingParams as SamplingParams
    from jsparse.serve.stop_strings import StopStrings as StopStrings
    from jsparse.serve.stop_strings import TextStream as TextStream
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
