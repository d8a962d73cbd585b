"""``jsparse bench``: how long a token and a prompt take, by context length and by what is read."""

from jsparse.serve.bench.common import DecodeRow as DecodeRow
from jsparse.serve.bench.common import PrefillRow as PrefillRow
from jsparse.serve.bench.decode import DecodeBench as DecodeBench
from jsparse.serve.bench.decode import bench_decode as bench_decode
from jsparse.serve.bench.prefill import PrefillBench as PrefillBench
from jsparse.serve.bench.prefill import bench_prefill as bench_prefill
