"""What a model is, as one frozen dataclass."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jsparse.integers import require_integer
from jsparse.models.extend import check_composes, check_extension, extend_rope
from jsparse.models.hf_config import MAX_LAYERS, MODEL_TYPES, fields_from_hf, fields_to_hf, require_size
from jsparse.models.positions import describe, positions_of
from jsparse.models.rope import RopeConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes and the variant of one model of the Llama family.

    Field names are Hugging Face's. ``model_type`` decides what has no field of its own there: Qwen2 always
    has biases on q, k and v, Qwen3 always normalises queries and keys. ``sliding_windows`` has one entry per
    layer: None, or how many keys a query sees, its own included.

    ``max_sequence_length`` says how many positions the model has if its linear RoPE factor does not. See
    ``jsparse.models.positions``.

    By default ``num_key_value_heads`` is one for each head, ``head_dim`` is ``hidden_size /
    num_attention_heads``, and no layer has a window.

    Raises ValueError, naming the field, the value and what is allowed.

    >>> config = LlamaConfig(
    ...     vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> config.head_dim, config.num_key_value_heads, config.sliding_windows
    (16, 4, (None, None))
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore  # __post_init__ fills it in
    head_dim: int = None  # type: ignore
    max_position_embeddings: int = 2048
    rms_norm_eps: float | int = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_windows: tuple[int | None, ...] = None  # type: ignore
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    initializer_range: float | int = 0.02
    model_type: str = "llama"
    max_sequence_length: int | None = None

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; allowed are {', '.join(MODEL_TYPES)}"
            )
        for field in _SIZES:
            require_size(field, getattr(self, field))
        require_size("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by "
                    f"num_attention_heads={self.num_attention_heads}; give head_dim, or sizes that divide"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.sliding_windows is None:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_hidden_layers)
        require_size("num_key_value_heads", self.num_key_value_heads)
        require_size("head_dim", self.head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for RoPE rotates pairs, not {self.head_dim}")
        for field, most in (("rms_norm_eps", math.inf), ("initializer_range", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"{field} must be a positive number, at most {most}, not {value!r}")
        for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, not {getattr(self, field)!r}")
        if not isinstance(self.rope, RopeConfig):
            raise TypeError(f"rope must be a RopeConfig, not {self.rope!r}")
        if self.max_sequence_length is not None:
            require_size("max_sequence_length", self.max_sequence_length)
            if self.rope.kind != "linear":
                raise ValueError(
                    f"max_sequence_length={self.max_sequence_length} is for a linear RoPE, not for "
                    f"{self.rope.kind!r}, whose positions are known"
                )
        self._check_variant()
        self._check_token_ids()

    def _check_variant(self):
        """Refuse what Hugging Face's config of this model_type cannot say, so that to_hf loses nothing."""
        if self.attention_bias and self.model_type not in ("llama", "qwen3"):
            raise ValueError(f"attention_bias=True is for llama and qwen3, not for {self.model_type}")
        if self.mlp_bias and self.model_type != "llama":
            raise ValueError(f"mlp_bias=True is for llama, not for {self.model_type}")
        if self.model_type == "llama" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}; a llama needs that even with head_dim"
            )
        windows = self.sliding_windows
        if len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_windows has {len(windows)} entries for num_hidden_layers={self.num_hidden_layers}"
            )
        for window in windows:
            if window is not None:
                require_size("a sliding window", window)
        used = {window for window in windows if window is not None}
        if used and self.model_type == "llama":
            raise ValueError("sliding_windows are for mistral, qwen2 and qwen3, not for llama")
        if len(used) > 1:
            raise ValueError(f"sliding_windows must all have one size or be None, not {sorted(used)}")
        if used and None in windows and self.model_type == "mistral":
            raise ValueError("a mistral model has a sliding window in every layer or in none")

    def _check_token_ids(self):
        for field in ("bos_token_id", "pad_token_id"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{field} must be an integer or None, not {value!r}")
        for token in self.eos_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"eos_token_ids must be integers in [0, vocab_size={self.vocab_size}), not {token!r}"
                )

    @property
    def end_token(self) -> int | None:
        """The first of the end tokens, or None."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases: Qwen2 always, Llama and Qwen3 with ``attention_bias``."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key pass an RMS norm before RoPE: Qwen3 only."""
        return self.model_type == "qwen3"

    @classmethod
    def tiny(cls, **changes: Any) -> "LlamaConfig":
        """A config for examples and tests: two layers, four heads on two KV heads, a vocabulary of bytes.

        Its vocabulary is that of ``jsparse.models.byte_tokenizer``. ``changes`` replace fields.

        >>> LlamaConfig.tiny(num_hidden_layers=1).head_dim
        8
        """
        fields: dict[str, Any] = {
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return cls(**fields | changes)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """The config that the fields of a Hugging Face ``config.json`` describe.

        Both spellings of RoPE are read (``rope_scaling`` and ``rope_parameters``). ValueError names every
        field that is missing, unknown or asks for mathematics that is not here.
        """
        return cls(**fields_from_hf(fields))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that transformers 5 reads to the same mathematics."""
        return fields_to_hf({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def extend_context(
        self, length: int, method: str | None = None, *, positions: int | None = None
    ) -> "LlamaConfig":
        """A config for ``length`` positions, whose RoPE is extended by ``jsparse.models.extend.extend_rope``.

        With P, the positions that the model has (``jsparse.models.positions``), the factor grows by
        ``ceil(length / P)``, so the model may end with more than ``length``. A length that already fits
        changes nothing. Extending twice by 2 extends by 4.

        - method: "linear" (position interpolation, as in LongLoRA, arXiv 2309.12307), "ntk", "yarn" or
          "llama3". None is the checkpoint's own kind, and linear for one that was never extended.
        - positions: P, for a model with a linear factor that may be read in two ways. A length that the
          larger reading covers needs none, and changes nothing.

        Raises ValueError for a length below 1, for an unknown method, for positions that the config does not
        allow and for a length beyond both readings of a linear factor without ``positions``;
        NotImplementedError for a method that does not compose with the RoPE kind of the checkpoint.

        >>> config = LlamaConfig.tiny(max_position_embeddings=512)
        >>> longer = config.extend_context(1500)
        >>> longer.rope.kind, longer.rope.factor, longer.max_position_embeddings
        ('linear', 3.0, 1536)
        >>> longer.extend_context(3000).rope.factor
        6.0
        >>> config.extend_context(1500, "yarn").rope.original_max_position_embeddings
        512
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be an integer >= 1, not {length!r}")
        check_extension(method)
        settled = self._with_positions(positions)
        has = positions_of(settled)
        if method is not None and length > has.certain:
            check_composes(method, self.rope.kind)
        if length <= has.most:
            return settled
        if has.certain < has.most:
            raise ValueError(
                f"length={length} is more than the model's {describe(self)}, and config.json does not say "
                "if the factor is within max_position_embeddings or on top: give positions (--positions), "
                f"{has.certain} if it is within and {has.most} if it is on top"
            )
        growth = -(-length // has.certain)
        rope = extend_rope(
            self.rope,
            growth,
            head_dim=self.head_dim,
            max_position_embeddings=has.certain,
            method=method,
        )
        extended = has.certain * growth
        return dataclasses.replace(
            self,
            rope=rope,
            max_position_embeddings=extended,
            max_sequence_length=extended if rope.kind == "linear" else None,
        )

    def _with_positions(self, positions: int | None) -> "LlamaConfig":
        """The config with the count of its positions decided by the user; None leaves it as it is."""
        if positions is None:
            return self
        require_integer("positions", positions)
        has = positions_of(self)
        if not has.certain <= positions <= has.most:
            among = (
                f"from {has.certain} to {has.most}" if has.certain < has.most else f"{has.certain} or None"
            )
            raise ValueError(f"positions={positions}: by the model's config.json they must be {among}")
        if has.certain == has.most:
            return self
        return dataclasses.replace(self, max_sequence_length=positions)
