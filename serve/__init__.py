"""Serving: text generation from a sparse KV cache, and sampling."""

from jsparse.serve.batch import Batch as Batch
from jsparse.serve.batch import TokenEvent as TokenEvent
from jsparse.serve.config import CacheConfig as CacheConfig
from jsparse.serve.generate import GenerateResult as GenerateResult
from jsparse.serve.generate import GenerateStats as GenerateStats
from jsparse.serve.generate import generate as generate
from jsparse.serve.generate import stream as stream
from jsparse.serve.logits import decode_logits as decode_logits
from jsparse.serve.sampling import SamplingParams as SamplingParams
