"""Pretraining a small model from scratch: it writes some Python, and needs its whole context."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, PyTree

from jsparse.checks import require_integers, require_numbers
from jsparse.models import Llama, LlamaConfig, train_tokenizer
from jsparse.reports.console import write_json
from jsparse.texts.corpus import standard_library_files
from jsparse.texts.documents import check_files, read_documents
from jsparse.texts.passkeys import WORDS as PASSKEY_WORDS
from jsparse.texts.tasks import WORDS
from jsparse.texts.tokenizer import END_OF_TEXT
from jsparse.train.data.batches import digest_data
from jsparse.train.data.curriculum import KINDS, LISTED, TEXT, Lessons, Stage
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.run.identity import checkpoint_folder, steps_in
from jsparse.train.run.loop import run_steps
from jsparse.train.run.paths import as_paths
from jsparse.train.step import SplitModel, TrainState, is_table, new_state, split_model

RECORD = "pretrain.json"
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
    """Steps between checkpoints. The last step always writes one, and so does a run that SIGTERM ends."""

    def __post_init__(self):
        sizes = "context", "vocab_size", "hidden_size", "intermediate_size", "layers", "head_dim"
        steps = "stage_steps", "text_steps", "final_steps", "far_steps", "checkpoint_every"
        require_integers(self, 1, *sizes, "q_heads", "kv_heads", *steps)
        require_integers(self, 2 * _SHORTEST, "batch_tokens")
        require_integers(self, 0, "seed")
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

    def optimizer(self) -> optax.GradientTransformation:
        """Muon for the matrices of the layers, Adam for the rest, on clipped gradients.

        After 300 steps of the first stage, a model of two layers copied 94 % of the words; with Adam alone
        (at a rate of 0.003) it copied 2 %.
        """
        falls_from = sum(stage.steps for stage in self.stages[:-2] if stage.length <= _SHORT)
        far_from = self.steps - self.far_steps

        def schedule(rate: float) -> optax.Schedule:
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


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a run leaves.

    - output: the Hugging Face folder.
    - metrics: one line per step.
    - finished: whether all steps were taken. A run that SIGTERM ended has written no model.
    """

    output: Path
    metrics: tuple[dict[str, Any], ...]
    finished: bool


def pretrain(config: PretrainConfig, *, command: str | None = None, progress: bool = True) -> PretrainResult:
    """Train a Llama and its tokenizer from scratch, and write a Hugging Face folder in bfloat16.

    The rows are those of :class:`jsparse.train.data.curriculum.Lessons`; they get longer from stage to stage.
    The loss is ``text_weight`` times the mean over the tokens of real text and lists, plus the mean over the
    kinds of answers, each weighted by the square root of its number of tokens in the step.

    During the run, ``output`` holds ``metrics.jsonl`` (one line per step: step, length, loss, and for each
    kind of token in the step its loss and the fraction predicted right) and ``checkpoints/``. The tokenizer,
    the model and ``pretrain.json``, which says how it was made, are written at the end. After an
    interruption, the same call resumes from the last checkpoint, bit for bit as if nothing had happened.

    - config: the settings of the run.
    - command: the command to name in pretrain.json.
    - progress: show a progress bar, if stderr is a terminal.

    Returns the lines of metrics.jsonl, and whether the run has finished.

    Raises, before anything is computed: ValueError or FileNotFoundError for data that is missing or too
    short, a vocabulary without room for the tasks, or an output folder that holds another run;
    FileExistsError for an output folder with other files. While training: FloatingPointError if a loss is not
    finite.
    """
    files = config.data_files
    check_files(files)
    tokenizer = train_tokenizer(
        (file.read_text(encoding="utf-8") for file in files), config.vocab_size, (*WORDS, *PASSKEY_WORDS)
    )
    eos = tokenizer.token_to_id(END_OF_TEXT)
    assert eos is not None  # train_tokenizer adds it
    digest = digest_data(files, tokenizer, context=config.context, eos_token_id=eos)
    run = _describe_run(config, digest)
    start = steps_in(config.output_folder, config.steps, run)
    documents = read_documents(files, tokenizer, eos_token_id=eos, vocab_size=config.vocab_size)
    text = np.concatenate(documents)
    if len(text) < config.context:
        raise ValueError(f"data has {len(text)} tokens, less than a row of context={config.context}")
    lessons = Lessons(tokenizer, text)
    state, split = _start(config, eos)
    with open_checkpoints(checkpoint_folder(config.output_folder), writable=True) as checkpoints:
        if start:
            state = checkpoints.restore(start, state)

        def save(step: int, state: TrainState) -> None:
            checkpoints.save(step, state, run)

        state, metrics = run_steps(
            state,
            _step_taker(config, split, lessons),
            output=config.output_folder,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            save=save,
            name="pretraining",
            note=_note,
            progress=progress,
        )
    finished = int(state.step) == config.steps
    if finished:
        record = {
            "command": command,
            "settings": run["config"],
            "data": {"sha256": digest, "files": len(files), "tokens": len(text)},
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
            "last_steps": _mean_of_last(metrics),
        }
        _export(config, split, state, tokenizer, record)
    return PretrainResult(config.output_folder, tuple(metrics), finished)


def _describe_run(config: PretrainConfig, digest: str) -> dict[str, Any]:
    """What two runs must share to be the same, as JSON."""
    fields = dataclasses.asdict(config)
    described = {name: fields[name] for name in fields if name not in ("output", "data", "checkpoint_every")}
    return json.loads(json.dumps(described | {"data": digest, "config": fields}, default=str))


def _start(config: PretrainConfig, eos_token_id: int) -> tuple[TrainState, SplitModel]:
    """The model before its first step.

    Embeddings are as large as what the layers add to them, and share a common direction: without biases, only
    this lets a head look at a position whatever its token is. With small, centred embeddings, a model of two
    layers copied 13 % of the words after 300 steps of the first stage; with large ones it copied 40 %, and
    with the shared direction 94 %.
    """
    model = Llama(config.model_config(eos_token_id), rngs=nnx.Rngs(config.seed))
    table = model.embed_tokens.embedding
    shared = jax.random.normal(jax.random.key(config.seed + 1), (1, config.hidden_size))
    table[...] = table[...] / model.config.initializer_range + shared
    params, split = split_model(model, nnx.Param)
    return new_state(params, config.optimizer()), split


def _muon_matrices(params: PyTree) -> PyTree:
    """The axes that Muon multiplies over; None for Adam's parameters."""

    def axes(path, param):
        return None if is_table(path) or param.ndim != 2 else optax.contrib.MuonDimensionNumbers(0, 1)

    return jax.tree.map_with_path(axes, params)


class _Counts(NamedTuple):
    """Counts for each kind of token."""

    tokens: Int[Array, " K"]
    nll: Float[Array, " K"]
    right: Int[Array, " K"]


def _pretrain_step(
    split: SplitModel, config: PretrainConfig
) -> Callable[..., tuple[TrainState, Array, _Counts]]:
    """The jitted ``step(state, tokens, kinds) -> state, loss, counts``, donating ``state``."""
    optimizer = config.optimizer()

    def loss_fn(params, tokens, kinds):
        model = split.join(params, split.frozen)
        hidden = model.hidden(tokens, None, model.attend(None), trained=nnx.Param)[:, :-1]
        targets, kinds = tokens[:, 1:], kinds[:, 1:]
        logits = model.logits(hidden)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        of_kind = kinds[..., None] == jnp.arange(len(KINDS))
        right = (logits.argmax(axis=-1) == targets)[..., None] & of_kind
        counts = _Counts(
            of_kind.sum((0, 1)), jnp.where(of_kind, nll[..., None], 0).sum((0, 1)), right.sum((0, 1))
        )
        is_text = jnp.isin(jnp.arange(len(KINDS)), jnp.array([TEXT, LISTED]))
        text = (counts.nll * is_text).sum() / jnp.maximum((counts.tokens * is_text).sum(), 1)
        # By the root of their number: copies are most of them, and would leave little weight for the others.
        weights = jnp.sqrt(counts.tokens * ~is_text)
        means = counts.nll / jnp.maximum(counts.tokens, 1)
        answers = (weights * means).sum() / jnp.maximum(weights.sum(), 1)
        return config.text_weight * text + answers, counts

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, tokens: Int32[Array, "B T"], kinds: Int32[Array, "B T"]):
        (loss, counts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, kinds)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state, step=state.step + 1), loss, counts

    return step


def _step_taker(
    config: PretrainConfig, split: SplitModel, lessons: Lessons
) -> Callable[[int, TrainState], tuple[TrainState, dict[str, Any]]]:
    """``take_step(step, state) -> state, line of metrics.jsonl``; steps count through all stages."""
    stage_of_step = [stage for stage in config.stages for _ in range(stage.steps)]
    jitted = _pretrain_step(split, config)

    def take_step(step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        stage = stage_of_step[step]
        tokens, kinds = lessons.batch(stage, step, config.seed)
        state, loss, counts = jitted(state, tokens, kinds)
        return state, _metrics_line(step + 1, stage, float(loss), counts)

    return take_step


def _note(line: dict[str, Any]) -> str:
    return f"{line['length']} tokens, loss {line['loss']:.3f}"


def _metrics_line(step: int, stage: Stage, loss: float, counts: _Counts) -> dict[str, Any]:
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: loss is {loss}; earlier checkpoints are kept. A lower learning_rate may help, in "
            "a new output folder"
        )
    tokens, nll, right = map(np.asarray, counts)
    line: dict[str, Any] = {"step": step, "length": stage.length, "loss": loss}
    for kind, name in enumerate(KINDS):
        if tokens[kind]:
            line[name] = {"nll": float(nll[kind] / tokens[kind]), "right": float(right[kind] / tokens[kind])}
    return line


def _mean_of_last(metrics: list[dict[str, Any]], steps: int = 100) -> dict[str, dict[str, float]]:
    """The loss and the fraction predicted right of each kind of token, over the last steps."""
    lines = metrics[-steps:]
    return {
        kind: {
            name: float(np.mean([line[kind][name] for line in lines if kind in line]))
            for name in ("nll", "right")
        }
        for kind in KINDS
        if any(kind in line for line in lines)
    }


def _export(
    config: PretrainConfig, split: SplitModel, state: TrainState, tokenizer: Any, record: dict[str, Any]
) -> None:
    """Write the tokenizer and the record first: config.json, written last, makes the folder a model."""
    tokenizer.save(str(config.output_folder / "tokenizer.json"))
    # For transformers, which would otherwise choose another tokenizer for a Llama.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": config.context,
    }
    write_json(config.output_folder / "tokenizer_config.json", settings)
    write_json(config.output_folder / RECORD, record)
    rounded = jax.tree.map(lambda param: param.astype(jnp.bfloat16), state.params)
    nnx.merge(split.graphdef, rounded, split.frozen).save_pretrained(config.output_folder)
