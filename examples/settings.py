"""The settings of the demos."""

import dataclasses
from pathlib import Path

from jsparse.evaluate.methods import PAGE
from jsparse.models.choices import Dtype
from jsparse.models.shipped import shipped_model
from jsparse.reports.console import DefaultsToShipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShippedDemoConfig:
    """What attention patterns and sparse caches do to the small model that ships with jsparse.

    Nothing is trained; it takes a minute or two on two CPU cores. `jsparse demo --train` takes the whole path
    instead, from a random model to a longer context; `jsparse demo --train --help` lists its options.
    """

    model: DefaultsToShipped = shipped_model()
    """A Hugging Face folder or an id on the Hub; its full_attention_heads.tsv, if there is one, says which
    heads stream."""
    dtype: Dtype | None = None
    """Dtype of the weights; what the model's config.json says unless given."""
    output: Path | None = None
    """Write every number and a plot into this folder (needs the extra plot). An earlier demo's files
    there are replaced; any other folder is refused."""
    evaluation_tokens: int = 8192
    """Held-out tokens that perplexity is measured on."""
    prompt_tokens: int = 1500
    """Length of the prompts to generate from."""
    new_tokens: int = 96
    """Tokens to generate."""
    budget: int = 256
    """Tokens that a head reads per step: the pages that it chooses, or sink and window together."""
    samples: int = 8
    """Texts for each recall task."""

    def __post_init__(self):
        if self.budget % PAGE or self.budget < 2 * PAGE:
            raise ValueError(
                f"budget={self.budget} must be a multiple of {PAGE}, the tokens of a page, "
                f"and {2 * PAGE} at least"
            )
        for name in ("evaluation_tokens", "prompt_tokens", "new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The sizes of the demo. The defaults take about five minutes on two CPU cores."""

    output: Path = Path("demo")
    """Where everything goes. An earlier demo's files there are replaced; any other folder is refused."""
    hidden_size: int = 128
    """Width of the model, which has 4 heads on 2 KV heads."""
    layers: int = 4
    """Transformer layers."""
    context: int = 256
    """Tokens per window for the base model."""
    growth: int = 4
    """How many times longer the context becomes."""
    base_steps: int = 1500
    """Training steps of the base model."""
    extension_steps: int = 300
    """LongLoRA steps at the long context."""
    batch_tokens: int = 1024
    """Tokens per training step, at either context."""
    evaluation_tokens: int = 32768
    """Held-out tokens that perplexity is measured on."""
    prompt_tokens: int = 900
    """Length of the prompt to generate from."""
    new_tokens: int = 96
    """Tokens to generate."""
    budget: int = 256
    """Tokens of the cache that a retrieval head of the sparse cache reads per step."""
    sink: int = 16
    """First tokens that a streaming head keeps."""
    window: int = 128
    """Recent tokens that a streaming head keeps."""
    seed: int = 0
    """Seed of the weights and of the order of the text."""

    def __post_init__(self):
        object.__setattr__(self, "output", Path(self.output))
        if self.prompt_tokens + self.new_tokens > self.long_context:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} do not fit "
                f"{self.long_context} tokens (context times growth)"
            )

    @property
    def long_context(self) -> int:
        return self.context * self.growth

    @property
    def group_size(self) -> int:
        """Half the long context, LongLoRA's larger choice: few steps teach little about farther tokens."""
        return self.long_context // 2

    @property
    def contexts(self) -> list[int]:
        """Where perplexity is measured: the context, doubled until the long one."""
        contexts = [self.context]
        while contexts[-1] * 2 < self.long_context:
            contexts.append(contexts[-1] * 2)
        return [*contexts, self.long_context]
