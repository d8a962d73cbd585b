"""What ``jsparse merge`` writes, and from where."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jsparse.checks import is_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write what a run has learned so far, from one of its checkpoints; or merge adapters with their base.

    Several adapters of one base are added to it by weight: W + w1 s1 A1 B1 + w2 s2 A2 B2, where s is an
    adapter's own scale (lora_alpha / r).

    >>> MergeConfig(run="my-run", output="merged").adapter
    False
    >>> MergeConfig(run=("code", "math"), weights=(0.7, 0.3), output="merged").runs
    ('code', 'math')
    """

    run: str | Path | Sequence[str | Path]
    """The output folder of ``finetune``, finished or not; or an adapter in PEFT's format, as a folder or an
    id on the Hub, to merge with its base; or several such adapters."""
    output: str | Path
    """A new folder."""
    weights: Sequence[float] | None = None
    """What each adapter counts, one number for each; 1 for a single adapter if not given."""
    step: int | None = None
    """The step of the checkpoint to take; by default the one that the run writes: that with the lowest
    held-out loss so far, or the last if there is none or with ``export_last``."""
    adapter: bool = False
    """Write the LoRA matrices, and the embeddings and norms trained beside them, as an adapter that PEFT
    loads onto the base, instead of a whole model."""
    model: str | Path | None = None
    """Where the base model is, a folder or an id on the Hub, if it is no longer where the run found it, or
    not where adapter_config.json says."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("run must name a run or an adapter")
        given = () if self.weights is None else tuple(self.weights)
        if len(given) != len(self.runs) and (self.weights is not None or len(self.runs) > 1):
            raise ValueError(
                f"weights must have one number for each run, which are {len(self.runs)}, not {list(given)}"
            )
        strangers = [weight for weight in given if not is_number(weight)]
        if strangers:
            raise ValueError(f"weights must be finite numbers, not {strangers[0]!r}")

    @property
    def runs(self) -> tuple[str | Path, ...]:
        """``run``, as several."""
        return (self.run,) if isinstance(self.run, str | Path) else tuple(self.run)
