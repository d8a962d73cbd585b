"""Learned head patterns (DuoAttention): how much each KV head of a frozen model needs the whole context."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

import jsparse
from jsparse.checks import require_new_folder
from jsparse.hub import pinned_model
from jsparse.masks.head_pattern import PATTERN_FILE
from jsparse.models import Llama, LlamaConfig, load_config, load_tokenizer, text_encoder
from jsparse.models.end_token import end_token
from jsparse.models.positions import check_length
from jsparse.reports.console import write_json
from jsparse.reports.progress import progress_bar
from jsparse.texts.documents import read_documents
from jsparse.texts.files.data_files import Found, find_data
from jsparse.texts.passkeys import Passkeys, check_passkeys_fit, passkey_batch
from jsparse.texts.tokenizer import prompt_ids
from jsparse.train.head_gates import gate_loss
from jsparse.train.heads_config import HeadsConfig as HeadsConfig

_ADAM = optax.scale_by_adam()  # AdamW without decay; _step applies the learning rate


@dataclasses.dataclass(frozen=True)
class HeadsResult:
    """What learning leaves.

    - pattern: the gates, each in [0, 1].
    - losses: one per step, before its update.
    - output: the folder.
    """

    pattern: jsparse.HeadPattern
    losses: tuple[float, ...]
    output: Path


def learn_heads(config: HeadsConfig, *, progress: bool = True) -> HeadsResult:
    """Learn a gate for each KV head of ``config.model``, and write them to ``config.output`` as a pattern.

    The model itself is frozen. Each KV head's gate mixes full and streaming attention
    (``head_gates.mixed_attend``). The gates are trained to let the model answer questions about passkeys as
    it does with full attention, with as little full attention as possible (``head_gates.gate_loss``). Gates
    begin at 1, and AdamW updates them. They are clipped to [0, 1] after each step; the original clips before
    it, so the gates that it saves can lie slightly outside. A head whose gate stays high is a retrieval head.

    The passkeys are hidden in the text of ``config.data``, at least ``context`` tokens of it
    (``jsparse.texts.passkeys``).

    At the end, ``output`` gets full_attention_heads.tsv (``HeadPattern.load`` reads it), config.json with the
    settings (sink_size and recent_size, as DuoAttention calls them) and losses.tsv, with the two parts of
    each loss. The same settings give the same pattern.

    If a layer has a sliding window shorter than a sample, its full attention is that window. All heads of
    such a layer stream already, and ``serve`` accepts no streaming heads there.

    - config: the settings.
    - progress: show a progress bar, if stderr is a terminal.

    Returns the pattern and the losses.

    Raises, before anything is computed: ValueError or FileNotFoundError for a checkpoint or data file that is
    missing, cannot be used or does not fit the other settings; FileExistsError for an output folder that is
    not empty. While learning: FloatingPointError, naming the step, if the loss or its gradient is not finite;
    then nothing is written.

    Source: DuoAttention (arXiv 2410.10819).
    """
    data = find_data(config.data_files)
    require_new_folder(config.output_folder)
    config = dataclasses.replace(config, model=pinned_model(config.model))
    model_config = load_config(config.model)
    asked = f"context={config.context} tokens"
    check_length(model_config, config.context, asked, "finetune extends a model's context")
    passkeys = _passkeys(config, data, model_config)
    model = Llama.from_pretrained(config.model, dtype=config.dtype)
    if model.embed_tokens.embedding[...].dtype == jnp.float16:
        raise ValueError(
            f"dtype must be float32 or bfloat16, for {config.model} is stored as float16, which overflows"
        )
    config.output_folder.mkdir(parents=True, exist_ok=True)  # a path that cannot be written fails now

    gates, losses = _learn(config, model, passkeys, progress=progress)
    pattern = jsparse.HeadPattern(gates)
    _write(config, pattern, losses)
    return HeadsResult(pattern, tuple(loss for loss, _, _ in losses), config.output_folder)


def _learn(
    config: HeadsConfig, model: Llama, passkeys: Passkeys, *, progress: bool
) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
    """The gates after all steps, and for each step: loss, distance, mean gate."""
    graphdef, frozen = nnx.split(model)
    gates = jnp.ones((model.config.num_hidden_layers, model.config.num_key_value_heads), jnp.float32)
    opt_state = _ADAM.init(gates)
    losses = []
    with progress_bar(progress) as bar:
        task = bar.add_task("learning heads", total=config.steps, note="compiling")
        for step in range(config.steps):
            batch = passkey_batch(
                passkeys,
                config.sample_lengths,
                context=config.context,
                step=step,
                batch_size=config.batch_size,
                seed=config.seed,
            )
            mean_gate = float(gates.mean())
            gates, opt_state, *metrics = _step(
                graphdef,
                frozen,
                gates,
                opt_state,
                *batch,
                config.l1,
                config.learning_rate_at(step),
                sink=config.sink,
                window=config.window,
                remat=config.remat,
            )
            loss, distance, grad_norm = map(float, metrics)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"step {step + 1}: loss is {loss} and the gradient's norm {grad_norm}; "
                    f"nothing was written to {config.output}"
                )
            losses.append((loss, distance, mean_gate))
            bar.update(task, advance=1, note=f"distance {distance:.4g}, mean gate {mean_gate:.3f}")
    return np.asarray(gates), losses


@functools.partial(jax.jit, static_argnames=("graphdef", "sink", "window", "remat"))
def _step(
    graphdef, frozen, gates, opt_state, tokens, is_answer, l1, learning_rate, *, sink, window, remat
) -> tuple[Array, optax.OptState, Array, Array, Array]:
    """One update: gates and opt_state, then the loss before it, its distance and the gradient's norm."""

    def loss_fn(gates):
        model = nnx.merge(graphdef, frozen)
        return gate_loss(gates, model, tokens, is_answer, sink=sink, window=window, l1=l1, remat=remat)

    (loss, distance), gradient = jax.value_and_grad(loss_fn, has_aux=True)(gates)
    updates, opt_state = _ADAM.update(gradient, opt_state)
    gates = jnp.clip(gates - learning_rate * updates, 0.0, 1.0)
    return gates, opt_state, loss, distance, optax.tree.norm(gradient)


def _passkeys(config: HeadsConfig, data: Found, model_config: LlamaConfig) -> Passkeys:
    """The haystack and the settings of the samples, once they are known to fit the sample lengths."""
    tokenizer = load_tokenizer(config.model)
    encode = text_encoder(tokenizer, model_config.vocab_size)
    documents = read_documents(
        data,
        tokenizer,
        eos_token_id=end_token(config.model, tokenizer, model_config),
        vocab_size=model_config.vocab_size,
    )
    haystack = np.concatenate(documents)
    if len(haystack) < config.context:
        raise ValueError(
            f"data: {len(documents)} file(s) with {len(haystack)} tokens in all do not fill one sample of "
            f"context={config.context} tokens; give more text or a shorter context"
        )
    start = tuple(prompt_ids(tokenizer, ""))  # what it puts before every text
    passkeys = Passkeys(haystack, encode, config.needles, config.words, start)
    check_passkeys_fit(passkeys, config.shortest)
    return passkeys


def _write(
    config: HeadsConfig, pattern: jsparse.HeadPattern, losses: list[tuple[float, float, float]]
) -> None:
    """Write the pattern last: if it exists, the rest does too."""
    settings = {"sink_size": config.sink, "recent_size": config.window} | dataclasses.asdict(config)
    settings |= {"model": str(config.model), "data": [str(file) for file in config.data_files]}
    settings["min_context"] = config.shortest
    for field in ("sink", "window", "output"):
        del settings[field]
    folder = config.output_folder
    write_json(folder / "config.json", settings)
    lines = ["step\tloss\tdistance\tmean_gate\n"]
    lines += [f"{step}\t{a:.6g}\t{b:.6g}\t{c:.6g}\n" for step, (a, b, c) in enumerate(losses, start=1)]
    (folder / "losses.tsv").write_text("".join(lines), encoding="utf-8")
    pattern.save(folder / PATTERN_FILE)
