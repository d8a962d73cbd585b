import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax < 0.12 cannot interpret Mosaic GPU")
@pytest.mark.parametrize(
    "kind, mask",
    [
        ("Auto", "heads"),
        pytest.param("Explicit", "sequences", marks=pytest.mark.slow),
        pytest.param("Auto", "decode", marks=pytest.mark.slow),
        pytest.param("Explicit", "decode", marks=pytest.mark.slow),
    ],
)
def test_kernels_split_batch_and_heads_over_a_mesh(kind, mask):
    program = Path(__file__).parent / "on_eight_devices.py"
    # Threads for the warpgroups of all devices: jsparse.device says why.
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PJRT_NPROC": "64",
    }
    done = subprocess.run(
        [sys.executable, program, kind, mask], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "agree on 8 devices\n"
