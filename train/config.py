"""The settings of a fine-tuning run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsparse
from jsparse.hub import model_folder
from jsparse.models.choices import KINDS
from jsparse.models.mesh_config import MeshConfig
from jsparse.texts.reading import Reading
from jsparse.train.config_checks import BLOCK, GROUP_RATIO, check_settings
from jsparse.train.run.paths import as_paths

if TYPE_CHECKING:  # what needs jax is imported late: the command line lists these settings without it
    from optax import GradientTransformation, Schedule

    from jsparse.models.config import LlamaConfig
    from jsparse.models.patterns import AttentionPattern
else:
    LlamaConfig = AttentionPattern = GradientTransformation = Schedule = Any

# By default, with LoRA and without. benchmarks/training/learning_rates.py found LoRA best at 6e-3, and all
# parameters equally good at 6e-4 and 2e-3. Both defaults are far lower, for larger models and longer runs.
LORA_RATE, FULL_RATE = 2e-4, 2e-5

_STEPS, _WARMUP_STEPS = 1000, 20
_ROUNDING = 1e-6  # 0.29 * 100 is 28.99...


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
    """Files, folders, patterns, "-" for standard input, or a dataset's id on the Hub. Text files are
    documents. JSON, Parquet and Arrow hold rows with "text"; "prompt" and "completion"; "instruction" and
    "output"; "messages"; or "conversations". Messages are rendered by the model's chat template."""
    output: str | Path
    """A new folder. It becomes a Hugging Face folder, with checkpoints and metrics.jsonl beside the model."""
    context: int
    """Tokens per window. If this exceeds the model's own context, rope extends the positions."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names for the fields of rows, each after ours: with prompt question completion answer,
    the field "question" is the prompt and "answer" the completion."""
    loss_on: str = "answers"
    """"answers" learns documents, completions and what the assistant says; "all" learns prompts too."""
    bad_rows: str = "error"
    """Rows that cannot be read: "error" names them and ends the run, "skip" leaves them out, counted."""
    too_long: str = "error"
    """Prompts with answers that are longer than the context: "error", "skip", or "truncate", at the end."""

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
    """Tokens per group: even, and a divisor of the context. Default: a quarter of the context."""
    group_ratio: float | None = None
    """Fraction of the context that a group takes, instead of group_size. Default: 0.25."""
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
    rslora: bool = False
    """Scale the LoRA product by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    lora_rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Other ranks for some layers: the end of a name, from a dot on, as a regular expression ("down_proj",
    "layers.0.mlp.*"), and its rank. The first that fits counts, as in PEFT."""
    lora_alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other alphas for some layers, in the same way."""
    lora_layers: tuple[int, ...] | None = None
    """The decoder layers that get adapters (PEFT's layers_to_transform); None for all. lm_head is in none."""
    lora_dropout: float = 0.0
    """Fraction of the adapters' inputs that is dropped in training."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """The linear layers that get adapters: names, or dotted paths with * ("layers.*.mlp.*"). "all-linear" is
    all but the head, "lm_head" the head."""
    train_embeddings_and_norms: bool = True
    """Train embeddings and norms beside LoRA, as LongLoRA must to reach long contexts."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside LoRA, without adapters, by the ends of their names as in PEFT:
    "lm_head", "embed_tokens", "norm" (every norm), "layers.0.mlp.up_proj". Those that
    train_embeddings_and_norms means are trained too, unless it is off."""
    base_bits: int | None = None
    """Keep the frozen matrices in 4 or 8 bits (QLoRA; needs the extra qlora). None keeps them in dtype."""
    dtype: str | None = None
    """Dtype for computing and for the saved model; None for the checkpoint's. Updates are in float32."""
    remat: str = "none"
    """What the backward pass keeps: "none" recomputes nothing; "layers" keeps each layer's input and takes a
    third more time; "attention" also keeps attention's output; "dots" keeps the products with weights."""
    mesh: MeshConfig = MeshConfig()
    """How many devices split each part of the work."""

    steps: int | None = None
    """Optimizer steps in all. Unless the schedule depends on their number, a run can be resumed with more.
    Default: 1000."""
    epochs: float | None = None
    """How often to go through the data, instead of steps: 3, or 0.5 for half of it. The steps follow from the
    number of windows."""
    batch_size: int = 8
    """Windows per step."""
    micro_batches: int = 1
    """Compute the windows of a step in this many parts, one after another: less memory, the same step."""
    learning_rate: float | None = None
    """AdamW's learning rate after the warm-up (betas 0.9 and 0.95). None: 2e-4 with LoRA, and 2e-5 without,
    since on the shipped model LoRA did best at three to ten times the rate of all parameters. Both are far
    below what was best there, for larger models (docs/results/training.md). LongLoRA's own is 2e-5."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises to its value. Default: 20."""
    warmup_ratio: float | None = None
    """The warm-up as a fraction of all steps, instead of warmup_steps."""
    schedule: str = "constant"
    """After the warm-up: "constant", or "cosine" or "linear", which fall to a tenth at the last step."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this."""
    max_skipped: int = 3
    """A step whose loss or gradient is not finite is skipped; this many in a row end the run."""
    dpo_beta: float | None = None
    """Learn from pairs of answers, "chosen" and "rejected", by direct preference optimisation (DPO). A larger
    number holds the model closer to what it was before the run; 0.1 is usual."""
    seed: int = 0
    """Seed of the order of the windows, of the initial LoRA matrices and of dropout."""
    checkpoint_every: int = 100
    """Steps between checkpoints. The last step always writes one, and so does a run that SIGTERM or Ctrl-C
    ends."""
    log_to: tuple[str, ...] = ()
    """Where numbers go beside metrics.jsonl: any of "tensorboard", "wandb" and "mlflow" (extras of the same
    names). Those that use files keep them in the output."""

    eval_data: Sequence[str | Path] = ()
    """Held-out files, of the same kinds as data. Their loss and perplexity are measured before the first
    step, every eval_every steps and after the last, with full attention and without dropout."""
    eval_every: int | None = None
    """Steps between the measurements of eval_data. Default: checkpoint_every."""
    patience: int | None = None
    """End the run once this many measurements in a row have found no lower held-out loss. Default: take all
    steps."""
    export_last: bool = False
    """Write the model of the last step. Default: with eval_data, the model of the step with the lowest
    held-out loss, whose checkpoint is always kept."""

    def __post_init__(self):
        if self.attention is None and (self.group_size is not None or self.group_ratio is not None):
            object.__setattr__(self, "attention", "shifted")
        check_settings(self)

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
    def reading(self) -> Reading:
        """How the rows of the data become samples."""
        return Reading(
            fields=dict(self.fields),
            loss_on=self.loss_on,
            bad_rows=self.bad_rows,
            too_long=self.too_long,
            pairs=self.dpo_beta is not None,
            mixed=False,
        )

    @property
    def eval_files(self) -> tuple[Path, ...]:
        return as_paths(self.eval_data, "eval_data")

    @property
    def evaluation_interval(self) -> int:
        """``eval_every`` with its default filled in."""
        return self.checkpoint_every if self.eval_every is None else self.eval_every

    @property
    def total_steps(self) -> int:
        """``steps`` with its default filled in; how many ``epochs`` take only ``for_windows`` knows."""
        return _STEPS if self.steps is None else self.steps

    @property
    def warmup(self) -> int:
        """``warmup_steps`` with its default filled in; those of a ratio only ``for_windows`` knows."""
        return _WARMUP_STEPS if self.warmup_steps is None else self.warmup_steps

    def for_windows(self, windows: int) -> "FinetuneConfig":
        """These settings in steps: ``epochs`` and ``warmup_ratio`` as ``steps`` and ``warmup_steps``.

        The last step of ``epochs`` is the one that takes the last window of them; the rest of its batch is of
        the next epoch. A warm-up is rounded up to whole steps, as in transformers, but never takes them all.

        - windows: how many windows the data fill.

        Raises ValueError for a schedule whose warm-up would not be shorter than the run.

        >>> config = FinetuneConfig(
        ...     model="base", data="book.txt", output="new", context=64, epochs=3.0, warmup_ratio=0.1
        ... )
        >>> config = config.for_windows(100)
        >>> config.steps, config.warmup_steps
        (38, 4)
        """
        steps, warmup = self.total_steps, self.warmup
        if self.epochs is not None:
            steps = max(1, math.ceil(self.epochs * windows / self.batch_size - _ROUNDING))
        if self.warmup_ratio is not None:
            warmup = min(steps - 1, math.ceil(self.warmup_ratio * steps - _ROUNDING))
        return dataclasses.replace(self, steps=steps, epochs=None, warmup_steps=warmup, warmup_ratio=None)

    @property
    def groups(self) -> int | None:
        """``group_size`` with its default filled in; None for attention without groups, or not chosen yet."""
        if self.attention not in ("shifted", "grouped"):
            return None
        if self.group_size is not None:
            return self.group_size
        return int(self.context * (self.group_ratio or GROUP_RATIO) + _ROUNDING)  # whole tokens

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
        """The learning rate of a step, counted from 0, by ``total_steps`` and ``warmup``."""
        import jax.numpy as jnp

        return float(jnp.asarray(self._schedule()(step)))

    def _schedule(self) -> Schedule:
        import optax

        peak = self.peak_learning_rate
        falling = max(1, self.total_steps - self.warmup)  # less only while the steps are not known
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, falling, alpha=0.1)
        elif self.schedule == "linear":
            after = optax.linear_schedule(peak, 0.1 * peak, falling)
        else:
            after = optax.constant_schedule(peak)
        # Rises through 1/n, 2/n, ... to 1, so that the first step is not wasted on a rate of 0.
        rising = optax.linear_schedule(0.0, peak, self.warmup)
        return optax.join_schedules([lambda step: rising(step + 1), after], [self.warmup])
