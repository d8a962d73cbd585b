"""What a measurement ran on: the device, the processor, versions and the date."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax


def describe_machine() -> dict[str, str | int | None]:
    """The device that JAX computes on, the machine around it, versions, and today's date."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": today(),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """What :func:`describe_machine` returned, in one line.

    >>> machine = {"device": "cpu", "processor": "x86_64", "cores": 2, "jax": "0.12.0", "python": "3.13.0"}
    >>> machine_line(machine | {"date": "2026-11-21"})
    'cpu (x86_64, 2 cores), jax 0.12.0, Python 3.13.0, 2026-11-21'
    """
    return (
        f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), jax {machine['jax']}, "
        f"Python {machine['python']}, {machine['date']}"
    )


def system() -> str:
    """The operating system and the architecture, as in "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def processor() -> str:
    """The model of the CPU if Linux reports it, otherwise the name of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date, as in "2026-11-21"."""
    return datetime.date.today().isoformat()
