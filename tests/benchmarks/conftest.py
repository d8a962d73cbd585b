"""The benchmarks are scripts, no part of the package: their folder goes on the path, as in running them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
