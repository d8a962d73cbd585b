"""What ``jsparse merge`` writes, and from where."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write what a run has learned so far, from one of its checkpoints; or merge an adapter with its base.

    >>> MergeConfig(run="my-run", output="merged").adapter
    False
    """

    run: str | Path
    """The output folder of ``finetune``, finished or not; or an adapter in PEFT's format, as a folder or an
    id on the Hub, to merge with its base."""
    output: str | Path
    """A new folder."""
    step: int | None = None
    """The step of the checkpoint to take; by default the last."""
    adapter: bool = False
    """Write the LoRA matrices, and the embeddings and norms trained beside them, as an adapter that PEFT
    loads onto the base, instead of a whole model."""
    model: str | Path | None = None
    """Where the base model is, a folder or an id on the Hub, if it is no longer where the run found it, or
    not where adapter_config.json says."""
