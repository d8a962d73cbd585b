"""The settings of a pretraining run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsparse.checks import require_integers, require_numbers, require_seed
from jsparse.texts.corpus import standard_library_files
from jsparse.train.data.curriculum import Stage
from jsparse.train.run.paths import as_paths

if TYPE_CHECKING:  # what needs jax is imported late: the command line lists these settings without it
    from optax import GradientTransformation, Schedule

    from jsparse.models.config import LlamaConfig
else:
    LlamaConfig = GradientTransformation = Schedule = Any

_SHORTEST = 64  # tokens per row of the first stage
_SHORT = 256  # the learning rate does not fall up to rows of this many tokens
_TEXT_LENGTH = 512  # tokens per row for most of the text: longer rows take more time for the same text
_MIX = {"recall": 0.6, "list": 0.08, "copy": 0.08, "passkeys": 0.08, "text": 0.16}
_TEXT_MIX = {"text": 0.5, "recall": 0.25, "list": 0.15, "copy": 0.05, "passkeys": 0.05}
_LONG_MIX = {"recall": 0.5, "list": 0.15, "copy": 0.05, "passkeys": 0.1, "text": 0.2}
_FAR_MIX = {"far": 0.6, "recall": 0.1, "passkeys": 0.1, "text": 0.2}
_FAR_RATE = 0.25  # fraction of the learning rates at which the last stage starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The settings of a pretraining run; the defaults are those of the model that jsparse ships.

    Raises ValueError, naming the field, the value and what is allowed.

    >>> [stage.length for stage in PretrainConfig(output="small").stages]
    [64, 128, 256, 512, 512, 1024, 2048, 2048, 2048]
    """

    output: str | Path
    """A new folder, which becomes a Hugging Face folder."""
    data: Sequence[str | Path] = ()
    """UTF-8 text files to learn from. Default: the sources of the Python standard library, without the
    modules that `jsparse evaluate` and `jsparse demo` measure with."""

    context: int = 2048
    """Tokens of the longest rows: 64 times a power of two."""
    vocab_size: int = 1536
    """Tokens of the vocabulary, including the words of the tasks."""
    hidden_size: int = 192
    """Width of the model."""
    intermediate_size: int = 512
    """Width of the MLP."""
    layers: int = 4
    """Transformer layers."""
    q_heads: int = 4
    """Query heads per layer."""
    kv_heads: int = 2
    """KV heads per layer."""
    head_dim: int = 64
    """Dimensions of each head."""

    stage_steps: int = 300
    """Steps at each length from 64 tokens to the context, doubling."""
    text_steps: int = 3000
    """Steps at 512 tokens (or the context, if it is shorter) with more text."""
    final_steps: int = 900
    """Steps at the full context before those of far_steps."""
    far_steps: int = 1200
    """Steps at the full context at the end. Most of their rows ask for what was said once, far back."""
    batch_tokens: int = 4096
    """Tokens per step (half as many with rows of 64 tokens), but at least two rows."""
    learning_rate: float = 0.02
    """Muon's, for the matrices of the layers. It falls to zero from the rows of 512 tokens on; for
    far_steps it starts at a quarter and falls to zero again."""
    embedding_learning_rate: float = 0.003
    """Adam's, for embeddings, output and norms."""
    text_weight: float = 1.0
    """Weight of the mean loss of real text and lists; the mean loss of answers has weight 1."""
    seed: int = 0
    """Seed of the weights and of all rows."""
    checkpoint_every: int = 200
    """Steps between checkpoints. The last step always writes one, and so does a run that SIGTERM or Ctrl-C
    ends."""

    def __post_init__(self):
        sizes = "context", "vocab_size", "hidden_size", "intermediate_size", "layers", "head_dim"
        steps = "stage_steps", "text_steps", "final_steps", "far_steps", "checkpoint_every"
        require_integers(self, 1, *sizes, "q_heads", "kv_heads", *steps)
        require_integers(self, 2 * _SHORTEST, "batch_tokens")
        require_seed(self)
        require_numbers(self, "learning_rate", "embedding_learning_rate")
        require_numbers(self, "text_weight", allow_zero=True)
        times, rest = divmod(self.context, _SHORTEST)
        if rest or times & (times - 1):
            raise ValueError(f"context={self.context} must be {_SHORTEST} times a power of two")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Copies come first: a model that has learned to look back learns the rest as rows get longer."""
        rows = max(2, self.batch_tokens // (2 * _SHORTEST))
        stages = [Stage(self.stage_steps, _SHORTEST, rows, {"copy": 0.6, "recall": 0.4})]
        length = _SHORTEST
        while length < self.context:
            length *= 2
            mix = _MIX if length <= _TEXT_LENGTH else _LONG_MIX
            stages.append(self._stage(self.stage_steps, length, mix))
            if length == min(_TEXT_LENGTH, self.context):
                stages.append(self._stage(self.text_steps, length, _TEXT_MIX))
        stages.append(self._stage(self.final_steps, self.context, _LONG_MIX))
        return (*stages, self._stage(self.far_steps, self.context, _FAR_MIX))

    def _stage(self, steps: int, length: int, mix: Mapping[str, float]) -> Stage:
        need_room = "list", "passkeys"
        mix = {kind: part for kind, part in mix.items() if length > 128 or kind not in need_room}
        return Stage(steps, length, max(2, self.batch_tokens // length), mix)

    @property
    def steps(self) -> int:
        """The steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def data_files(self) -> tuple[Path, ...]:
        return as_paths(self.data) or standard_library_files(packages=True)[0]

    def model_config(self, eos_token_id: int) -> LlamaConfig:
        from jsparse.models.config import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.q_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            eos_token_ids=(eos_token_id,),
        )

    def optimizer(self) -> GradientTransformation:
        """Muon for the matrices of the layers, Adam for the rest, on clipped gradients.

        After 300 steps of the first stage, a model of two layers copied 94 % of the words; with Adam alone
        (at a rate of 0.003) it copied 2 %.
        """
        import optax

        falls_from = sum(stage.steps for stage in self.stages[:-2] if stage.length <= _SHORT)
        far_from = self.steps - self.far_steps

        def schedule(rate: float) -> Schedule:
            rising = optax.linear_schedule(0.0, rate, min(30, falls_from))
            falling = optax.linear_schedule(rate, 0.0, far_from - falls_from)
            again = optax.linear_schedule(_FAR_RATE * rate, 0.0, self.far_steps)
            return optax.join_schedules([rising, falling, again], [falls_from, far_from])

        muon = optax.contrib.muon(
            schedule(self.learning_rate),
            adam_b1=0.9,
            adam_b2=0.95,
            adam_learning_rate=schedule(self.embedding_learning_rate),
            muon_weight_dimension_numbers=_muon_matrices,
        )
        return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _muon_matrices(params: Any) -> Any:
    """The axes that Muon multiplies over; None for Adam's parameters."""

    import jax
    import optax

    from jsparse.train.step import is_table

    def axes(path, param):
        return None if is_table(path) or param.ndim != 2 else optax.contrib.MuonDimensionNumbers(0, 1)

    return jax.tree.map_with_path(axes, params)
