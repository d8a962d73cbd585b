"""What several processes (``jax.distributed``) do apart, and where they wait for one another."""

import jax


def is_first_process() -> bool:
    """Whether this process writes what one must write."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when all processes have called it with this name; at once where there is one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
