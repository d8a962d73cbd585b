"""What only one of several processes (``jax.distributed``) does, and where they wait for one another."""

import jax


def is_first_process() -> bool:
    """Whether this is the one process that writes shared files."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when all processes have called this with ``name``; at once if there is only one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
