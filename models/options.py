"""The options that say which model a command takes. Nothing here imports jax."""

import dataclasses

from jsparse.models.choices import Dtype
from jsparse.models.shipped import shipped_model
from jsparse.reports.console import DefaultsToShipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model."""

    model: DefaultsToShipped = shipped_model()
    """A Hugging Face folder with config.json, safetensors and tokenizer.json, or an id on the Hub:
    org/name or org/name@revision."""
    dtype: Dtype | None = None
    """Dtype of the weights; what the model's config.json says unless given."""
