"""Pretraining a small model from scratch: it writes some Python, and needs its whole context."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from jsparse.models import Llama, train_tokenizer
from jsparse.reports.console import write_json
from jsparse.texts.documents import read_documents, read_texts
from jsparse.texts.files.data_files import find_data
from jsparse.texts.passkeys import WORDS as PASSKEY_WORDS
from jsparse.texts.tasks import WORDS
from jsparse.texts.tokenizer import END_OF_TEXT
from jsparse.train.data.batches import digest_data
from jsparse.train.data.curriculum import KINDS, LISTED, TEXT, Lessons, Stage
from jsparse.train.pretrain_config import PretrainConfig as PretrainConfig
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.run.identity import checkpoint_folder, steps_in
from jsparse.train.run.loop import run_steps
from jsparse.train.step import SplitModel, TrainState, new_state, split_model

RECORD = "pretrain.json"


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a run leaves.

    - output: the Hugging Face folder.
    - metrics: one line per step.
    - finished: whether all steps were taken. A run that SIGTERM or Ctrl-C ended has written no model.
    - stopped_by: the number of the signal that ended a run that has not finished.
    """

    output: Path
    metrics: tuple[dict[str, Any], ...]
    finished: bool
    stopped_by: int | None = None


def pretrain(config: PretrainConfig, *, command: str | None = None, progress: bool = True) -> PretrainResult:
    """Train a Llama and its tokenizer from scratch, and write a Hugging Face folder in bfloat16.

    The rows are those of :class:`jsparse.train.data.curriculum.Lessons`; they get longer from stage to stage.
    The loss is ``text_weight`` times the mean over the tokens of real text and lists, plus the mean over the
    kinds of answers, each weighted by the square root of its number of tokens in the step.

    During the run, ``output`` holds ``metrics.jsonl`` (one line per step: step, length, loss, and for each
    kind of token in the step its loss and the fraction predicted right) and ``checkpoints/``. The tokenizer,
    the model and ``pretrain.json``, which says how it was made, are written at the end. After an
    interruption, the same call resumes from the last checkpoint, bit for bit as if nothing had happened.
    SIGTERM or Ctrl-C ends a run after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    - config: the settings of the run.
    - command: the command to name in pretrain.json.
    - progress: show on stderr how far the run is: as a bar in a terminal, elsewhere as a line now and then.

    Returns the lines of metrics.jsonl, and whether the run has finished.

    Raises, before anything is computed: ValueError or FileNotFoundError for data that is missing or too
    short, a vocabulary without room for the tasks, or an output folder that holds another run;
    FileExistsError for an output folder with other files. While training: FloatingPointError if a loss is not
    finite.
    """
    data = find_data(config.data_files)
    tokenizer = train_tokenizer(read_texts(data), config.vocab_size, (*WORDS, *PASSKEY_WORDS))
    eos = tokenizer.token_to_id(END_OF_TEXT)
    assert eos is not None  # train_tokenizer adds it
    digest = digest_data(data, tokenizer, context=config.context, eos_token_id=eos)
    run = _describe_run(config, digest)
    start = steps_in(config.output_folder, config.steps, run)
    documents = read_documents(data, tokenizer, eos_token_id=eos, vocab_size=config.vocab_size)
    text = np.concatenate(documents)
    if len(text) < config.context:
        raise ValueError(f"data has {len(text)} tokens, less than a row of context={config.context}")
    lessons = Lessons(tokenizer, text)
    state, split = _start(config, eos)
    with open_checkpoints(checkpoint_folder(config.output_folder), writable=True) as checkpoints:
        if start:
            state = checkpoints.restore(start, state)

        def save(step: int, state: TrainState, best: int | None) -> None:
            checkpoints.save(step, state, run, keep=best)

        state, metrics, stopped_by = run_steps(
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
            "data": {"sha256": digest, "files": len(data.files), "tokens": len(text)},
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
            "last_steps": _mean_of_last(metrics),
        }
        _export(config, split, state, tokenizer, record)
    return PretrainResult(config.output_folder, tuple(metrics), finished, stopped_by)


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
