"""The settings of a fine-tuning run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsparse
from jsparse.checks import require_choice, require_integers, require_numbers
from jsparse.hub import model_folder
from jsparse.models.choices import EXTENSIONS, KINDS, REMAT
from jsparse.models.mesh_config import MeshConfig
from jsparse.train.run.paths import as_paths

if TYPE_CHECKING:  # what needs jax is imported late: the command line lists these settings without it
    from optax import GradientTransformation, Schedule

    from jsparse.models.config import LlamaConfig
    from jsparse.models.patterns import AttentionPattern
else:
    LlamaConfig = AttentionPattern = GradientTransformation = Schedule = Any

BLOCK = 128  # tokens, of strided attention
# By default, with LoRA and without. benchmarks/training/learning_rates.py found LoRA best at 6e-3, and all
# parameters equally good at 6e-4 and 2e-3. Both defaults are far lower, for larger models and longer runs.
LORA_RATE, FULL_RATE = 2e-4, 2e-5

_CHOICES = {
    "attention": (None, *KINDS),
    "rope": (None, *EXTENSIONS),
    "base_bits": (None, 4, 8),
    "dtype": (None, "float32", "bfloat16"),
    "remat": REMAT,
    "schedule": ("constant", "cosine", "linear"),
}
# The kinds of attention that each setting is for.
_READ_BY = {
    ("group_size", "group_ratio"): ("shifted", "grouped"),
    ("sink", "window"): ("longgen", "streaming"),
    ("stride", "full_layers"): ("longgen",),
    ("head_pattern", "sparsity"): ("streaming",),
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run.

    Where the context is extended, the defaults are LongLoRA's recipe, except for the learning rate.
    With ``lora_rank=None`` and ``attention="full"``, the same program trains every parameter with causal
    attention. From a checkpoint of random weights, that is pretraining.

    Raises ValueError, naming the field, the value and what is allowed. ``finetune`` checks, before it starts,
    that the files exist and fit one another.

    >>> from jsparse.models import LlamaConfig
    >>> config = FinetuneConfig(model="base", data="book.txt", output="longer", context=1024)
    >>> config.for_model(LlamaConfig.tiny(max_position_embeddings=1024)).attention
    'full'
    >>> longer = config.for_model(LlamaConfig.tiny(max_position_embeddings=512))
    >>> longer.attention, longer.groups
    ('shifted', 256)
    """

    model: str | Path
    """The checkpoint to start from: a Hugging Face folder with safetensors and a tokenizer.json, or an id on
    the Hub, org/name or org/name@revision. A run keeps the commit that it began with."""
    data: Sequence[str | Path]
    """Text files (one, or several), each one document, and .jsonl files: each line is an object with "text",
    with "prompt" and "completion", or with "instruction" and "output". Prompts are read, not learned."""
    output: str | Path
    """A new folder. It becomes a Hugging Face folder, with checkpoints and metrics.jsonl beside the model."""
    context: int
    """Tokens per window. If this exceeds the model's own context, rope extends the positions."""
    rope: str | None = None
    """How positions are extended; None keeps the checkpoint's own method, or is linear if it has none."""
    positions: int | None = None
    """How many positions the model has, if its linear RoPE factor may be within max_position_embeddings or on
    top of it and the context is longer than both readings; the error then names the two."""

    attention: str | None = None
    """"full" causal attention, "shifted" groups (LongLoRA's S²-Attn, causal form), the same "grouped" without
    the shift, "longgen" (some layers full, the others sink and window, or strided blocks), or "streaming"
    (the streaming heads of a head_pattern see sink and window). None: "full" within the model's own context
    and "shifted" where it is extended, or where a group_size or group_ratio is given."""
    group_size: int | None = None
    """Tokens per group: even, and a divisor of the context. Default: group_ratio of the context."""
    group_ratio: float = 0.25
    """Fraction of the context that a group takes if no group_size is given."""
    sink: int = 128
    """First tokens that heads see with "longgen" and "streaming"."""
    window: int = 256
    """Recent tokens that heads see with "longgen" and "streaming", the query's own included."""
    stride: int | None = None
    """For "longgen": attend in blocks of 128 tokens. A query sees the blocks of the window and every
    stride-th block, counted from the first. None: sink and window."""
    full_layers: tuple[int, ...] | None = None
    """For "longgen": the layers with full attention. Default: the middle third."""
    head_pattern: str | Path | None = None
    """For "streaming": a head pattern (DuoAttention's full_attention_heads.tsv)."""
    sparsity: float = 0.5
    """For "streaming": the fraction of the KV heads that stream, those with the lowest scores."""

    lora_rank: int | None = 8
    """Rank of the LoRA matrices. None trains every parameter instead, without LoRA."""
    lora_alpha: float = 16.0
    """The LoRA product is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Fraction of the adapters' inputs that is dropped in training."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """The linear layers that get adapters: names, or dotted paths with * ("layers.*.mlp.*")."""
    train_embeddings_and_norms: bool = True
    """Train embeddings and norms beside LoRA, as LongLoRA must to reach long contexts."""
    base_bits: int | None = None
    """Keep the frozen matrices in 4 or 8 bits (QLoRA; needs the extra qlora). None keeps them in dtype."""
    dtype: str | None = None
    """Dtype for computing and for the saved model; None for the checkpoint's. Updates are in float32."""
    remat: str = "none"
    """What the backward pass keeps: "none" recomputes nothing; "layers" keeps each layer's input and takes a
    third more time; "attention" also keeps attention's output; "dots" keeps the products with weights."""
    mesh: MeshConfig = MeshConfig()
    """How many devices split each part of the work."""

    steps: int = 1000
    """Optimizer steps in all. Unless the schedule depends on their number, a run can be resumed with more."""
    batch_size: int = 8
    """Windows per step."""
    micro_batches: int = 1
    """Compute the windows of a step in this many parts, one after another: less memory, the same step."""
    learning_rate: float | None = None
    """AdamW's learning rate after the warm-up (betas 0.9 and 0.95). None: 2e-4 with LoRA, and 2e-5 without,
    since on the shipped model LoRA did best at three to ten times the rate of all parameters. Both are far
    below what was best there, for larger models (docs/results/training.md). LongLoRA's own is 2e-5."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises to its value."""
    schedule: str = "constant"
    """After the warm-up: "constant", or "cosine" or "linear", which fall to a tenth at the last step."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this."""
    max_skipped: int = 3
    """A step whose loss or gradient is not finite is skipped; this many in a row end the run."""
    seed: int = 0
    """Seed of the order of the windows, of the initial LoRA matrices and of dropout."""
    checkpoint_every: int = 100
    """Steps between checkpoints. The last step always writes one, and so does a run that SIGTERM ends."""

    def __post_init__(self):
        if not self.data_files:
            raise ValueError("data must name at least one text file")
        require_integers(self, 1, "steps", "batch_size", "micro_batches", "checkpoint_every", "max_skipped")
        require_integers(self, 2, "context")
        require_integers(self, 0, "warmup_steps", "seed")
        require_numbers(self, "max_grad_norm", "lora_alpha")
        if self.learning_rate is not None:
            require_numbers(self, "learning_rate")
        require_numbers(self, "weight_decay", "lora_dropout", allow_zero=True)
        for field in ("attention", "rope", "base_bits", "dtype", "remat", "schedule"):
            require_choice(self, field, *_CHOICES[field])
        self._check_lora()
        self._check_batch()
        self._check_attention()
        if self.schedule != "constant" and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}")

    def _check_lora(self):
        if self.lora_rank is not None:
            require_integers(self, 1, "lora_rank")
        elif self.base_bits is not None:
            raise ValueError(
                f"base_bits={self.base_bits} keeps the base frozen, but lora_rank=None trains all of it; "
                "give a lora_rank"
            )
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout must be a number in [0, 1), not {self.lora_dropout!r}")

    def _check_batch(self):
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"micro_batches={self.micro_batches} must divide batch_size={self.batch_size} windows"
            )
        windows = self.batch_size // self.micro_batches
        if windows % self.mesh.batch:
            raise ValueError(
                f"batch_size={self.batch_size} in micro_batches={self.micro_batches} is {windows} windows at "
                f"a time, which {self.mesh.batch} devices (data * fsdp of the mesh) cannot share evenly"
            )
        if self.context % self.mesh.sequence:
            raise ValueError(
                f"context={self.context} must be a multiple of the mesh's sequence={self.mesh.sequence}"
            )

    def _check_attention(self):
        """Refuse what the chosen attention does not read: it would be ignored. Groups ask for the shifted."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        if self.attention is None and any(
            getattr(self, name) != fields[name].default for name in ("group_size", "group_ratio")
        ):
            object.__setattr__(self, "attention", "shifted")
        for names, kinds in _READ_BY.items():
            for name in names:
                value = getattr(self, name)
                if self.attention not in kinds and value != fields[name].default:
                    wanted = " or ".join(map(repr, kinds))
                    given = "which must be given" if self.attention is None else f"not for {self.attention!r}"
                    raise ValueError(f"{name}={value} is for attention={wanted}, {given}")
        if self.attention in ("longgen", "streaming"):
            require_integers(self, 0, "sink")
            require_integers(self, 1, "window")
        if self.stride is not None:
            require_integers(self, 1, "stride")
            if self.mesh.sequence > 1:
                raise ValueError(
                    f"stride={self.stride} gives lists of blocks, which are not split over the mesh's "
                    f"sequence={self.mesh.sequence} devices; allowed are sink and window, without a stride"
                )
            if self.window % BLOCK or self.window < BLOCK:
                raise ValueError(
                    f"window={self.window} must be a multiple of {BLOCK} tokens with a stride, which shows "
                    "whole blocks"
                )
            if self.sink != BLOCK:
                raise ValueError(
                    f"sink={self.sink} is for sink and window; with a stride the first block of {BLOCK} "
                    "tokens is seen, and every stride-th after it"
                )
        if self.attention == "streaming" and self.head_pattern is None:
            raise ValueError("attention='streaming' needs a head_pattern that says which heads stream")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be a number in [0, 1], not {self.sparsity!r}")
        if self.attention not in ("shifted", "grouped"):
            return
        if self.group_size is not None:
            require_integers(self, 2, "group_size")
        if not 0 < self.group_ratio <= 1:
            raise ValueError(f"group_ratio must be a number in (0, 1], not {self.group_ratio!r}")
        size = self.groups
        if size is None or size < 2 or size % 2 or self.context % size:
            origin = f" ({self.group_ratio:g} of the context)" if self.group_size is None else ""
            raise ValueError(
                f"group_size={size}{origin} does not fit context={self.context}: "
                "it must be even and divide the context"
            )

    @property
    def model_folder(self) -> Path:
        return model_folder(self.model, weights=True)

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def data_files(self) -> tuple[Path, ...]:
        return as_paths(self.data)

    @property
    def groups(self) -> int | None:
        """``group_size`` with its default filled in; None for attention without groups, or not chosen yet."""
        if self.attention not in ("shifted", "grouped"):
            return None
        if self.group_size is not None:
            return self.group_size
        return int(self.context * self.group_ratio + 1e-6)  # whole tokens: 0.29 * 100 is 28.99...

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate`` with its default filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RATE if self.lora_rank is None else LORA_RATE

    def for_model(self, model: LlamaConfig) -> "FinetuneConfig":
        """These settings with the attention and the learning rate that they take where none is given.

        Attention is full if the context is within the model's own positions, and in shifted groups if its
        RoPE is extended.

        - model: the checkpoint's config, before its context is extended.

        Raises ValueError for a context that groups do not fit, and whatever ``LlamaConfig.extend_context``
        raises.
        """
        config = dataclasses.replace(self, learning_rate=self.peak_learning_rate)
        if self.attention is not None:
            return config
        extended = model.extend_context(self.context, self.rope, positions=self.positions)
        if extended.rope == model.rope:
            return dataclasses.replace(config, attention="full")
        try:
            return dataclasses.replace(config, attention="shifted")
        except ValueError as error:
            raise ValueError(
                f"{error}. Where no attention is given, it is 'shifted' beyond the model's own context; "
                "'full' has no groups"
            ) from error

    def pattern(self, model: LlamaConfig) -> AttentionPattern:
        """What each layer and query head of a model sees.

        Raises ValueError or FileNotFoundError for a head pattern that cannot be used, and ValueError for
        layers or heads that the model does not have, and while no attention is chosen.
        """
        from jsparse.models import patterns

        if self.attention is None:
            raise ValueError(
                "attention=None depends on the model: take for_model(model).pattern(...), or give one of "
                f"{', '.join(map(repr, KINDS))}"
            )
        if self.attention == "full":
            return patterns.full_pattern(model)
        if self.groups is not None:
            make = patterns.shifted_pattern if self.attention == "shifted" else patterns.grouped_pattern
            return make(model, self.groups)
        if self.head_pattern is not None:
            streams = jsparse.HeadPattern.load(self.head_pattern).threshold(self.sparsity)
            return patterns.streaming_pattern(model, streams, sink=self.sink, window=self.window)
        if self.stride is None:
            return patterns.longgen_pattern(
                model, jsparse.streaming(self.sink, self.window), self.full_layers
            )
        blocks = patterns.StridedBlocks(block=BLOCK, window=self.window // BLOCK, stride=self.stride)
        return patterns.longgen_pattern(model, blocks, self.full_layers)

    def optimizer(self) -> GradientTransformation:
        """AdamW on clipped gradients."""
        import jax
        import optax

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
        import jax.numpy as jnp

        return float(jnp.asarray(self._schedule()(step)))

    def _schedule(self) -> Schedule:
        import optax

        peak, falling = self.peak_learning_rate, self.steps - self.warmup_steps
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, falling, alpha=0.1)
        elif self.schedule == "linear":
            after = optax.linear_schedule(peak, 0.1 * peak, falling)
        else:
            after = optax.constant_schedule(peak)
        # Rises through 1/n, 2/n, ... to 1, so that the first step is not wasted on a rate of 0.
        warmup = optax.linear_schedule(0.0, peak, self.warmup_steps)
        return optax.join_schedules([lambda step: warmup(step + 1), after], [self.warmup_steps])
