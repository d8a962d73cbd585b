"""The settings of a fine-tuning run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsparse
from jsparse.checks import require_choice, require_integers, require_numbers
from jsparse.hub import model_folder
from jsparse.integers import is_integer, require_integer
from jsparse.models.choices import EXTENSIONS, KINDS, REMAT
from jsparse.models.mesh_config import MeshConfig
from jsparse.models.peft_names import check_expression
from jsparse.texts.reading import Reading
from jsparse.train.run.paths import as_paths

if TYPE_CHECKING:  # what needs jax is imported late: the command line lists these settings without it
    from optax import GradientTransformation, Schedule

    from jsparse.models.config import LlamaConfig
    from jsparse.models.patterns import AttentionPattern
else:
    LlamaConfig = AttentionPattern = GradientTransformation = Schedule = Any

BLOCK = 128  # tokens, of strided attention
SERVICES = ("tensorboard", "wandb", "mlflow")


_CHOICES = {
    "attention": KINDS,
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
_ROUNDING = 1e-6  # 0.29 * 100 is 28.99...


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run; the defaults are LongLoRA's recipe.

    With ``lora_rank=None`` and ``attention="full"``, the same program trains every parameter with causal
    attention. From a checkpoint of random weights, that is pretraining.

    Raises ValueError, naming the field, the value and what is allowed. ``finetune`` checks, before it starts,
    that the files exist and fit one another.

    >>> config = FinetuneConfig(model="base", data="book.txt", output="longer", context=1024)
    >>> config.groups
    256
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

    attention: str = "shifted"
    """"shifted" groups (LongLoRA's S²-Attn, causal form), the same "grouped" without the shift, "full" causal
    attention, "longgen" (some layers full, the others sink and window, or strided blocks), or "streaming"
    (the streaming heads of a head_pattern see sink and window)."""
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

    steps: int = 1000
    """Optimizer steps in all. Unless the schedule depends on their number, a run can be resumed with more."""
    epochs: float | None = None
    """How often to go through the data, instead of steps: 3, or 0.5 for half of it. The steps follow from the
    number of windows."""
    batch_size: int = 8
    """Windows per step."""
    micro_batches: int = 1
    """Compute the windows of a step in this many parts, one after another: less memory, the same step."""
    learning_rate: float = 2e-5
    """AdamW's learning rate after the warm-up (betas 0.9 and 0.95)."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises to its value."""
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
        if not self.data_files:
            raise ValueError("data must name at least one text file")
        _ = self.reading  # which checks its settings
        require_integers(self, 1, "steps", "batch_size", "micro_batches", "checkpoint_every", "max_skipped")
        require_integers(self, 2, "context")
        require_integers(self, 0, "warmup_steps", "seed")
        require_numbers(self, "learning_rate", "max_grad_norm", "lora_alpha")
        require_numbers(self, "weight_decay", "lora_dropout", allow_zero=True)
        for field in ("attention", "rope", "base_bits", "dtype", "remat", "schedule"):
            require_choice(self, field, *_CHOICES[field])
        if not set(self.log_to) <= set(SERVICES):
            raise ValueError(f"log_to must be some of {', '.join(map(repr, SERVICES))}, not {self.log_to!r}")
        if len(set(self.log_to)) < len(self.log_to):
            raise ValueError(f"log_to must name each service once, not {self.log_to!r}")
        self._check_lora()
        self._check_batch()
        self._check_attention()
        self._check_length()
        self._check_evaluation()

    def _check_length(self):
        """Of the run, and of its warm-up."""
        defaults = {field.name: field.default for field in dataclasses.fields(FinetuneConfig)}
        for name, other in (("epochs", "steps"), ("warmup_ratio", "warmup_steps")):
            if getattr(self, name) is not None and getattr(self, other) != defaults[other]:
                raise ValueError(
                    f"{name}={getattr(self, name)} and {other}={getattr(self, other)} say the same in two "
                    "ways; give one of them"
                )
        if self.epochs is not None:
            require_numbers(self, "epochs")
        if self.warmup_ratio is not None:
            require_numbers(self, "warmup_ratio", allow_zero=True)
            if self.warmup_ratio >= 1:
                raise ValueError(f"warmup_ratio must be a number in [0, 1), not {self.warmup_ratio!r}")
        elif self.epochs is None and self.schedule != "constant" and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}")

    def _check_evaluation(self):
        for name, default in (("eval_every", None), ("patience", None), ("export_last", False)):
            if not self.eval_files and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for a run with eval_data, and none is given"
                )
        for name in ("eval_every", "patience"):
            if getattr(self, name) is not None:
                require_integers(self, 1, name)

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
        for name in ("rslora", "lora_rank_pattern", "lora_alpha_pattern", "lora_layers", "modules_to_save"):
            value = getattr(self, name)
            if self.lora_rank is None and value not in (False, {}, None, ()):
                raise ValueError(
                    f"{name}={value!r} is for LoRA, but lora_rank=None trains every parameter; give a rank"
                )
        for name in ("lora_targets", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of names, not the string {getattr(self, name)!r}")
        if self.lora_layers is not None and not (
            self.lora_layers and all(is_integer(layer) and layer >= 0 for layer in self.lora_layers)
        ):
            raise ValueError(
                f"lora_layers must be None or numbers of layers, from 0, not {self.lora_layers!r}"
            )
        self._check_patterns()

    def _check_patterns(self):
        for key, rank in self.lora_rank_pattern.items():
            check_expression("lora_rank_pattern", key)
            require_integer(f"lora_rank_pattern[{key!r}]", rank)
        for key, alpha in self.lora_alpha_pattern.items():
            check_expression("lora_alpha_pattern", key)
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha_pattern[{key!r}] must be a number > 0, not {alpha!r}")

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
        """Refuse what the chosen attention does not read: it would be ignored."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        for names, kinds in _READ_BY.items():
            for name in names:
                value = getattr(self, name)
                if self.attention not in kinds and value != fields[name].default:
                    wanted = " or ".join(map(repr, kinds))
                    raise ValueError(f"{name}={value} is for attention={wanted}, not for {self.attention!r}")
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
    def reading(self) -> Reading:
        """How the rows of the data become samples."""
        return Reading(
            fields=dict(self.fields),
            loss_on=self.loss_on,
            bad_rows=self.bad_rows,
            too_long=self.too_long,
            mixed=False,
        )

    @property
    def eval_files(self) -> tuple[Path, ...]:
        return as_paths(self.eval_data)

    @property
    def evaluation_interval(self) -> int:
        """``eval_every`` with its default filled in."""
        return self.checkpoint_every if self.eval_every is None else self.eval_every

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
        steps, warmup = self.steps, self.warmup_steps
        if self.epochs is not None:
            steps = max(1, math.ceil(self.epochs * windows / self.batch_size - _ROUNDING))
        if self.warmup_ratio is not None:
            warmup = min(steps - 1, math.ceil(self.warmup_ratio * steps - _ROUNDING))
        return dataclasses.replace(self, steps=steps, epochs=None, warmup_steps=warmup, warmup_ratio=None)

    @property
    def groups(self) -> int | None:
        """``group_size`` with its default filled in; None for attention without groups."""
        if self.attention not in ("shifted", "grouped"):
            return None
        if self.group_size is not None:
            return self.group_size
        return int(self.context * self.group_ratio + _ROUNDING)  # whole tokens

    def pattern(self, model: LlamaConfig) -> AttentionPattern:
        """What each layer and query head of a model sees.

        Raises ValueError or FileNotFoundError for a head pattern that cannot be used, and ValueError for
        layers or heads that the model does not have.
        """
        from jsparse.models import patterns

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
        """The learning rate of a step, counted from 0, by ``steps`` and ``warmup_steps``."""
        import jax.numpy as jnp

        return float(jnp.asarray(self._schedule()(step)))

    def _schedule(self) -> Schedule:
        import optax

        falling = max(1, self.steps - self.warmup_steps)  # less only while the steps are not known
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.learning_rate, falling, alpha=0.1)
        elif self.schedule == "linear":
            after = optax.linear_schedule(self.learning_rate, 0.1 * self.learning_rate, falling)
        else:
            after = optax.constant_schedule(self.learning_rate)
        # Rises through 1/n, 2/n, ... to 1, so that the first step is not wasted on a rate of 0.
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([lambda step: warmup(step + 1), after], [self.warmup_steps])
