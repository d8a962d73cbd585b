"""What a fine-tuning run is about to do, in words, for the one who has started it."""

import jax
from flax import nnx

from jsparse import causal
from jsparse.models import Llama, LlamaConfig
from jsparse.models.patterns import AttentionPattern
from jsparse.models.positions import describe
from jsparse.plan.compile_only import bytes_a_device
from jsparse.train.config import FinetuneConfig
from jsparse.train.config_checks import BLOCK
from jsparse.train.step import SplitModel, TrainState


def summarize(
    config: FinetuneConfig,
    before: LlamaConfig,
    after: LlamaConfig,
    pattern: AttentionPattern,
    *,
    trained: int,
    windows: int,
    start: int = 0,
    chosen: bool = False,
) -> dict[str, str]:
    """A run by what matters of it: the model, what is trained, positions, attention, batch, steps, optimizer.

    - before, after: the model's config, and that which it is trained with.
    - pattern: what heads see.
    - trained: how many parameters are trained.
    - windows: how many windows of ``config.context`` tokens the data gives.
    - start: how many steps were taken earlier.
    - chosen: whether the attention follows from the context, because none was given.
    """
    layers, tokens = after.num_hidden_layers, config.batch_size * config.context
    resumed = f", going on after step {start}" if start else ""
    return {
        "model": f"{config.model}, {count_parameters(after):,} parameters in {_count(layers, 'layer')}",
        "trained": f"{_trained(config)}: {trained:,} parameters",
        "context": f"{config.context} tokens",
        "RoPE": _rope(before) if before == after else f"{_rope(before)}, becomes {_rope(after)}",
        "attention": _attention(config, pattern) + _own_windows(after) + (_why(config) if chosen else ""),
        "batch": f"{_count(config.batch_size, 'window')}, {_count(tokens, 'token')} per step{_parts(config)}",
        "steps": f"{config.total_steps:,}, {config.total_steps * config.batch_size / windows:.2f} epochs of "
        f"{_count(windows, 'window')}{resumed}",
        "optimizer": _optimizer(config),
        **({} if config.dpo_beta is None else {"objective": _objective(config.dpo_beta)}),
    }


def memory_line(compiled: jax.stages.Compiled, state: TrainState, split: SplitModel) -> str:
    """What the compiler says that a step takes on each device."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return "memory: the compiler says nothing of it"
    kept = bytes_a_device((state, split.frozen))
    beside = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (
        f"memory: about {size_in_words(kept + beside)} per device, {size_in_words(kept)} for the model and "
        f"the optimizer and {size_in_words(beside)} while a step is computed"
    )


def count_parameters(config: LlamaConfig) -> int:
    """The parameters of a model, however they are stored and without adapters."""
    # jax's eval_shape: that of nnx takes the names of parameters' axes for those of a mesh in the context.
    shapes = jax.eval_shape(lambda: nnx.state(Llama(config, rngs=nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def size_in_words(count: int) -> str:
    """Bytes as GB, or MB below one.

    >>> size_in_words(8_030_000_000), size_in_words(640_000)
    ('8.03 GB', '0.6 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _trained(config: FinetuneConfig) -> str:
    if config.lora_rank is None:
        return "everything"
    beside = ", embeddings and norms" if config.train_embeddings_and_norms else ""
    base = f" (the rest is frozen in {config.base_bits} bits)" if config.base_bits else ""
    if config.modules_to_save:
        beside += f", {', '.join(config.modules_to_save)} whole"
    scale = "rsLoRA" if config.rslora else "LoRA"
    layers = "" if config.lora_layers is None else f" of layers {', '.join(map(str, config.lora_layers))}"
    return f"{scale} of {_ranks(config)} on {', '.join(config.lora_targets)}{layers}{beside}{base}"


def _ranks(config: FinetuneConfig) -> str:
    others = (f", {rank} on {name}" for name, rank in config.lora_rank_pattern.items())
    return f"rank {config.lora_rank}{''.join(others)}"


def _rope(config: LlamaConfig) -> str:
    rope = config.rope
    factor = f", factor {rope.factor:g}" if rope.factor else ""
    return f"{rope.kind}{factor}, theta {rope.theta:,.0f} ({describe(config)})"


def _attention(config: FinetuneConfig, pattern: AttentionPattern) -> str:
    seen = f"the first {_count(config.sink, 'token')} and the last {config.window}"
    if config.attention == "full":
        return "every head sees all earlier tokens"
    if config.groups is not None:
        shifted = f", half of the heads shifted by {config.groups // 2}" * (config.attention == "shifted")
        return f"groups of {config.groups} tokens{shifted}"
    if config.attention == "streaming":
        rules = [rule for layer in pattern.layers for rule in layer]
        few = sum(rule != causal() for rule in rules)
        return f"{few} of {len(rules)} query heads see {seen}, the others all earlier tokens"
    full = [str(number) for number, layer in enumerate(pattern.layers) if set(layer) == {causal()}]
    if config.stride is not None:
        seen = (
            f"blocks of {BLOCK} tokens: the last {config.window // BLOCK}, and one of every {config.stride}"
        )
    return f"layers {', '.join(full) or 'none'} see all earlier tokens, the others {seen}"


def _why(config: FinetuneConfig) -> str:
    where = "within" if config.attention == "full" else "beyond"
    return f" (by default: the context is {where} the model's own)"


def _own_windows(config: LlamaConfig) -> str:
    windows = [window for window in config.sliding_windows if window is not None]
    if not windows:
        return ""
    return f", and {_count(len(windows), 'layer')} no more than the model's own window of {windows[0]}"


def _parts(config: FinetuneConfig) -> str:
    parts = f", in {config.micro_batches} parts one after another" if config.micro_batches > 1 else ""
    return parts + (f", on a mesh of {config.mesh}" if config.mesh.devices > 1 else "")


def _objective(beta: float) -> str:
    return f"DPO with beta {beta:g}: the chosen of two answers, against the model before the run"


def _optimizer(config: FinetuneConfig) -> str:
    then = "constant" if config.schedule == "constant" else f"falling to a tenth ({config.schedule})"
    warmup = _count(config.warmup, "step")
    ends = ", which the run does not reach the end of" if config.warmup >= config.total_steps else ""
    return (
        f"AdamW, learning rate {config.peak_learning_rate:g} after {warmup} of warm-up{ends}, then {then}; "
        f"weight decay {config.weight_decay:g}, gradients clipped at norm {config.max_grad_norm:g}"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
