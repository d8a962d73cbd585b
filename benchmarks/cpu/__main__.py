"""``python benchmarks/cpu``: see run.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ alone: see CONTRIBUTING.md
from cpu.run import main

sys.exit(main())
