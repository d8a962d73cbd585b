"""Training checkpoints on disk: Orbax, with a description of the run beside the arrays of every step."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2  # steps on disk: the last, and the one before in case the last is damaged; and the best


class Checkpoints:
    """The checkpoints of one run, in ``directory/<step>``, written whole or not at all.

    A step is written into a temporary directory that is renamed when complete, so a crash leaves the earlier
    steps as they were; what it left half-written is removed before the next save.
    ``open_checkpoints`` makes one.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager = manager

    def latest_step(self) -> int | None:
        """The last step that was saved completely; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps that were saved completely."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, run: dict, *, keep: int | None = None) -> None:
        """Write a pytree of arrays and the JSON description of the run. Returns when both are on disk.

        Steps before the last ``KEPT`` are then removed, except step ``keep``.

        Raises OSError if they cannot be written, for instance on a full disk; earlier steps are then
        unchanged.
        """
        items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(run)}
        earlier = self.latest_step()
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # the storage library raises errors of its own
            kept = "there is no earlier one" if earlier is None else f"that of step {earlier} is intact"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self._manager.directory}; {kept}. "
                f"Make room or mend the disk, then give the same command again. ({_first_line(error)})"
            ) from error
        for old in self.steps()[:-KEPT]:
            if old != keep:
                self._manager.delete(old)

    def read_run(self, step: int) -> dict:
        """The description of the run that wrote ``step``."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def restore(self, step: int, like: Any) -> Any:
        """The state of ``step``, with the structure, shapes, dtypes and devices of ``like``."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=wanted)["state"]


@contextlib.contextmanager
def open_checkpoints(directory: Path, *, writable: bool) -> Iterator[Checkpoints]:
    """Open ``directory``. Unless ``writable``, nothing on disk is made, removed or changed."""
    # Saving blocks: a run that says it reached a step has that step on disk, and no thread outlives the call.
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, create=writable, cleanup_tmp_directories=writable
    )
    manager = ocp.CheckpointManager(directory.absolute(), options=options)
    try:
        yield Checkpoints(manager)
    finally:
        manager.close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
