"""The options that commands share which generate text: what the cache keeps, and how tokens are chosen.

What needs jax is imported late: the command line lists these options without it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import jsparse
from jsparse.masks.head_pattern import learned_sizes
from jsparse.serve.config import CacheConfig, Policy

if TYPE_CHECKING:
    from jsparse.serve.sampling import SamplingParams
else:
    SamplingParams = Any

_DRAWN = ("top_k", "top_p", "min_p")  # without effect at temperature 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What the cache keeps and reads. It is dense unless --budget, --pattern or --policy makes it sparse."""

    budget: int | None = None
    """Tokens of the cache that a retrieval head reads per step, in whole pages; all of them by default."""
    policy: Policy = "lserve"
    """What chooses those tokens; with "streaming" every head streams, with "quest" none."""
    page_size: int | None = None
    """Tokens per page of the cache: 64 by default, and 16 for Quest."""
    kv_bits: Literal[8, 4] | None = None
    """Keep pages as codes of this many bits; by default in the model's dtype."""
    pattern: Path | None = None
    """A head pattern, DuoAttention's full_attention_heads.tsv or the folder that has it: the heads with its
    lowest scores stream."""
    sparsity: float | None = None
    """With --pattern: the fraction of the KV heads that stream; half of them unless given."""
    sink: int | None = None
    """First tokens that a streaming head keeps. Unless given: what a config.json beside --pattern
    says if that is a folder, or 128."""
    window: int | None = None
    """Recent tokens that a streaming head keeps. Unless given: what a config.json beside --pattern
    says if that is a folder, or 256."""
    prefill_window: int | None = None
    """Recent tokens that a streaming head sees within the prompt; those of --window unless given."""

    def __post_init__(self):
        if self.pattern is None and self.sparsity is not None:
            raise ValueError("--sparsity says how many heads of a --pattern stream, and none is given")
        for name in ("sink", "window", "prefill_window"):
            if self.pattern is None and self.policy != "streaming" and getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is for streaming heads: give a --pattern, or --policy streaming"
                )
        if self.pattern is not None and self.policy in ("dense", "streaming", "quest"):
            raise ValueError(f"--policy {self.policy} does not ask which heads of a --pattern stream")
        if self.policy in ("dense", "streaming") and self.budget is not None:
            raise ValueError(f"--policy {self.policy} chooses no pages, so a --budget means nothing to it")
        if self.policy in ("quest", "mean", "oracle", "random") and self.budget is None:
            raise ValueError(
                f"--policy {self.policy} chooses what is read within a --budget, and none is given"
            )

    def cache(self) -> CacheConfig:
        """The cache that the options describe. Raises ValueError, before any model is loaded."""
        names = ("policy", "budget", "page_size", "kv_bits", "prefill_window")
        given = {name: getattr(self, name) for name in names}
        if self.pattern is not None and self.pattern.is_dir():
            given |= learned_sizes(self.pattern)
        given |= {name: getattr(self, name) for name in ("sink", "window") if getattr(self, name) is not None}
        if self.pattern is not None:
            sparsity = 0.5 if self.sparsity is None else self.sparsity
            given["streaming_heads"] = jsparse.HeadPattern.load(self.pattern).threshold(sparsity)
        return CacheConfig(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. What is not given is what the model's generation_config.json says, or greedy."""

    temperature: float | None = None
    """0 takes the most likely token."""
    top_k: int | None = None
    """Sample among the k most likely tokens only; 0 for all."""
    top_p: float | None = None
    """Sample among the fewest most likely tokens whose probabilities sum to at least this."""
    min_p: float | None = None
    """Sample only among tokens that are at least this times as likely as the most likely one."""
    repetition_penalty: float | None = None
    """More than 1 makes what the prompt or the text has already less likely."""
    presence_penalty: float | None = None
    """Taken from the logits of tokens that were generated, once."""
    frequency_penalty: float | None = None
    """Taken from the logits of tokens that were generated, as often as they were."""
    min_tokens: int | None = None
    """Generate at least this many tokens."""
    stop: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Strings that end the text, which is cut before them, taken as they are: $'\\n' is a newline in bash."""
    max_new_tokens: int | None = None
    """Stop after this many tokens, if the model does not stop before; 64 unless the model says otherwise."""
    seed: int = 0
    """Seed of the sampling."""
    generation_config: Literal["auto", "none"] = "auto"
    """Whether the model's generation_config.json says what is not given. Its stop tokens count either way."""

    def sampling(self, model: str | Path, most: int = 64) -> tuple[SamplingParams, int, list[str]]:
        """The parameters, the most new tokens, and notes for the user on where they come from.

        - most: new tokens where neither options nor the model say so.
        """
        from jsparse.serve.generation_file import generation_defaults
        from jsparse.serve.sampling import SamplingParams

        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(SamplingParams)
            if getattr(self, field.name, None) not in (None, ())
        }
        if self.stop:
            given["stop"] = tuple(string for strings in self.stop for string in strings)
        base, said, notes = SamplingParams(), None, []
        if self.generation_config == "auto":
            try:
                base, said, unfollowed = generation_defaults(model)
            except ValueError as error:
                raise ValueError(f"{error} (--generation-config none leaves the file aside)") from error
            notes += unfollowed
        sampling = dataclasses.replace(base, **given)
        if given_by_file := _shown(base, given):
            notes.append(
                f"{given_by_file} from generation_config.json, which --generation-config none ignores"
            )
        unused = [name for name in _DRAWN if name in given and not sampling.temperature]
        if unused:
            notes.append(f"without effect at temperature 0: {', '.join(unused)}")
        if self.max_new_tokens is not None:
            return sampling, self.max_new_tokens, notes
        return sampling, said or max(most, sampling.min_tokens), notes


def _shown(base: SamplingParams, given: dict[str, Any]) -> str:
    """The parameters that a file sets, that no option replaces, and that have an effect."""
    without = {*given, *(_DRAWN if not given.get("temperature", base.temperature) else ())}
    fields = [field for field in dataclasses.fields(base) if field.name not in without]
    plain = type(base)()
    return ", ".join(
        f"{field.name} {getattr(base, field.name)}"
        for field in fields
        if getattr(base, field.name) != getattr(plain, field.name)
    )
