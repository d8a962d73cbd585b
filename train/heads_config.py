"""The settings for learning a head pattern."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jsparse.checks import require_choice, require_integers, require_numbers, require_seed
from jsparse.train.run.paths import as_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The settings for learning a head pattern; the defaults are DuoAttention's recipe.

    Raises ValueError, naming the field, the value and what is allowed. ``learn_heads`` checks, before it
    starts, that the files exist and fit one another.

    >>> HeadsConfig(model="base", data="book.txt", output="pattern", context=32000).sample_lengths[:3]
    (8000, 8489, 8979)
    """

    model: str | Path
    """The checkpoint, which does not change: a Hugging Face folder with safetensors and a tokenizer.json, or
    an id on the Hub, org/name or org/name@revision."""
    data: Sequence[str | Path]
    """Text files (one, or several), or .jsonl files with one "text" per line, to hide passkeys in."""
    output: str | Path
    """A new folder for the pattern (full_attention_heads.tsv), its config.json and losses.tsv."""
    context: int
    """Tokens of the longest sample: the context that the pattern is for, at most the model's own."""
    min_context: int | None = None
    """Tokens of the shortest sample. Default: context // 4."""
    lengths: int = 50
    """Number of sample lengths, evenly spaced from the longest to the shortest; 1: only the longest."""

    sink: int = 128
    """First tokens that a streaming head sees."""
    window: int = 256
    """Recent tokens that a streaming head sees, the query's own included."""
    needles: int = 10
    """Passkeys per sample."""
    words: int = 32
    """Random words per passkey."""
    dtype: str | None = None
    """Dtype for computing: "float32", "bfloat16", or None for the checkpoint's. Gates are in float32."""
    remat: bool = True
    """Recompute each layer in the backward pass: less memory, more time."""

    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 1
    """Samples per step."""
    learning_rate: float = 0.02
    """AdamW's. It rises from a tenth to this in the first fifth of the steps and falls again in the last."""
    l1: float = 0.05
    """The price of open gates: this times the mean of all gates is added to the loss."""
    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self):
        if not self.data_files:
            raise ValueError("data must name at least one text file")
        require_integers(self, 2, "context")
        require_integers(self, 1, "lengths", "window", "needles", "words", "steps", "batch_size")
        require_integers(self, 0, "sink")
        require_seed(self)
        if self.min_context is not None:
            require_integers(self, 2, "min_context")
        require_numbers(self, "learning_rate")
        require_numbers(self, "l1", allow_zero=True)
        require_choice(self, "dtype", None, "float32", "bfloat16")
        if self.shortest > self.context:
            raise ValueError(f"min_context={self.shortest} must be at most context={self.context}")
        if self.sink + self.window >= self.shortest:
            origin = " (context // 4, for none was given)" if self.min_context is None else ""
            raise ValueError(
                f"sink={self.sink} and window={self.window} show all of a sample of min_context="
                f"{self.shortest} tokens{origin}; their sum must be less, or nothing can be learned from it"
            )

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def data_files(self) -> tuple[Path, ...]:
        return as_paths(self.data)

    @property
    def shortest(self) -> int:
        """``min_context`` with its default filled in."""
        return self.context // 4 if self.min_context is None else self.min_context

    @property
    def sample_lengths(self) -> tuple[int, ...]:
        """The lengths of the samples, from the shortest to the longest."""
        # Counted from the longest, so a single length is the longest.
        spaced = np.linspace(self.context, self.shortest, self.lengths).astype(int)
        return tuple(sorted({int(length) for length in spaced}))

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        import jax.numpy as jnp  # late: the command line lists the settings without jax
        import optax

        rising = optax.linear_schedule(0.1 * self.learning_rate, self.learning_rate, max(self.steps // 5, 1))
        # It falls at the end as it rises at the start.
        return float(jnp.asarray(rising(min(step, self.steps - 1 - step))))
