"""The settings of a fine-tuning run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jsparse.train.checks import require_choice, require_integers, require_numbers


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run; the defaults are LongLoRA's recipe.

    With ``lora_rank=None`` and ``attention="full"`` the same program trains every parameter with causal
    attention: pretraining, from a checkpoint of random weights.

    Everything is checked when it is made: ValueError names the field, the value and what is allowed. That the
    files are there and fit one another is checked by ``finetune``, before it starts.

    >>> config = FinetuneConfig(model="base", data="book.txt", output="longer", context=1024)
    >>> config.shifted_group_size
    256
    """

    model: str | Path
    """The checkpoint to start from: a Hugging Face folder with safetensors and a tokenizer.json."""
    data: Sequence[str | Path]
    """UTF-8 text files (one, or several), each one document."""
    output: str | Path
    """A new folder, to become a Hugging Face folder with checkpoints and metrics.jsonl beside the model."""
    context: int
    """Tokens a window. Beyond what the model was made for, its positions are interpolated linearly."""

    attention: str = "shifted"
    """"shifted" groups (LongLoRA's S²-Attn, causal form), or "full" causal attention."""
    group_size: int | None = None
    """Tokens a shifted group: even, and a divisor of the context. Default: context // 4."""
    lora_rank: int | None = 8
    """Rank of the LoRA matrices on q, k, v and o. None trains every parameter instead, without LoRA."""
    lora_alpha: float = 16.0
    """The LoRA product is scaled by alpha / rank."""
    train_embeddings_and_norms: bool = True
    """Train these beside LoRA, as LongLoRA must to reach long contexts."""
    dtype: str | None = None
    """To compute in and save: "float32", "bfloat16", or None for the checkpoint's. Updates are in float32."""
    remat: bool = False
    """Compute each layer again in the backward pass: less memory, a third more time."""

    steps: int = 1000
    """Optimizer steps in all. Unless the schedule depends on them, a run can be started again with more."""
    batch_size: int = 8
    """Windows a step."""
    learning_rate: float = 2e-5
    """AdamW's (betas 0.9 and 0.95), after the warm-up."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises to its value."""
    schedule: str = "constant"
    """After the warm-up: "constant", or "cosine" for a fall along a cosine to a tenth at the last step."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this."""
    seed: int = 0
    """Of the order of the windows and the initial LoRA matrices."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always has one."""

    def __post_init__(self):
        if not self.data_files:
            raise ValueError("data must name at least one text file")
        require_integers(self, 1, "steps", "batch_size", "checkpoint_every")
        require_integers(self, 2, "context")
        require_integers(self, 0, "warmup_steps", "seed")
        require_numbers(self, "learning_rate", "max_grad_norm", "lora_alpha")
        require_numbers(self, "weight_decay", allow_zero=True)
        require_choice(self, "attention", "shifted", "full")
        require_choice(self, "schedule", "constant", "cosine")
        require_choice(self, "dtype", None, "float32", "bfloat16")
        if self.lora_rank is not None:
            require_integers(self, 1, "lora_rank")
        if self.schedule == "cosine" and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}")
        self._check_groups()

    def _check_groups(self):
        if self.attention == "full":
            if self.group_size is not None:
                raise ValueError(f"group_size={self.group_size} is for attention='shifted', not for 'full'")
            return
        if self.group_size is not None:
            require_integers(self, 2, "group_size")
        size = self.context // 4 if self.group_size is None else self.group_size
        if size < 2 or size % 2 or self.context % size:
            origin = " (context // 4, for none was given)" if self.group_size is None else ""
            raise ValueError(
                f"group_size={size}{origin} does not fit context={self.context}: "
                "it must be even and divide the context"
            )

    @property
    def model_folder(self) -> Path:
        return Path(self.model)

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def data_files(self) -> tuple[Path, ...]:
        files = [self.data] if isinstance(self.data, str | Path) else self.data
        return tuple(Path(file) for file in files)

    @property
    def shifted_group_size(self) -> int | None:
        """``group_size`` with its default filled in; None for full attention."""
        if self.attention == "full":
            return None
        return self.context // 4 if self.group_size is None else self.group_size

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW on clipped gradients."""
        adamw = optax.adamw(
            self._schedule(),
            b1=0.9,
            b2=0.95,
            weight_decay=self.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adamw)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return float(jnp.asarray(self._schedule()(step)))

    def _schedule(self) -> optax.Schedule:
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.learning_rate, self.steps - self.warmup_steps, alpha=0.1)
        else:
            after = optax.constant_schedule(self.learning_rate)
        # Rises through 1/n, 2/n, ... to 1, so that the first step is not wasted on a rate of 0.
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([lambda step: warmup(step + 1), after], [self.warmup_steps])
