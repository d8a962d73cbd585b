"""``jsparse bench``: how long a token and a prompt take, by context length and by what is read."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.evaluate.speed.decode import DecodeBench as DecodeBench
    from jsparse.evaluate.speed.decode import bench_decode as bench_decode
    from jsparse.evaluate.speed.prefill import PrefillBench as PrefillBench
    from jsparse.evaluate.speed.prefill import bench_prefill as bench_prefill
    from jsparse.evaluate.speed.results import DecodeRow as DecodeRow
    from jsparse.evaluate.speed.results import PrefillRow as PrefillRow
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
