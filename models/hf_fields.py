"""Which fields of a ``config.json`` beside those that we read can change the mathematics.

transformers' classes of our model types ignore a field that they do not know. A model whose own code reads it
would then be another one, silently. So a field is refused if it is switched on and named after a part of the
computation. Everything else only says where a model comes from and how it was stored, trained or sampled.
"""

import re
from collections.abc import Mapping
from typing import Any

# Fields that would change the mathematics, and the values with which they do not.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
    "is_causal": (True, None),
    "pruned_heads": ({}, None),
    "per_layer_config": (None,),
}

# Named after a part of the computation, but without effect on a logit: how attention is computed, other
# dropouts and auxiliary losses, which our model types do not have, lengths, initial values, settings of
# sampling, and how the weights are stored. pretraining_tp only reorders a sum.
_INERT = frozenset(
    """
    max_window_layers pretraining_tp chunk_size_feed_forward
    n_positions n_ctx original_max_position_embeddings tie_encoder_decoder cross_attention_hidden_size
    output_attentions output_hidden_states output_logits output_router_logits prefill_chunk_size
    num_beam_groups no_repeat_ngram_size encoder_no_repeat_ngram_size epsilon_cutoff penalty_alpha
    remove_invalid_values sequence_bias top_k
    """.split()
)
_INERT_NAME = re.compile(
    r"^_|flash|dropout|pdrop|drop_rate|(^|_)init(ializer)?(_|$)|aux_loss|loss_coef|token_id|_implementation|_fp32"
    r"|^max_(position|seq|len|new_tokens|batch|window_layers)|(model|context|seq|sequence)_.*len"
)

# The parts of the computation, as words of a field's name.
_PARTS = frozenset(
    """
    abs act activation adapter alibi alpha attention attn base beta bias block blocks bounds cap causal
    chunk clamp clip cond conv cross d depth dim dims divisor dual emb embed embedding embeddings eps
    epsilon expert experts factor ff ffn freq frequency gate gated gating glu head heads hidden index
    indexer inner interleave interleaved intermediate k key kv latent layer layernorm layers layerscale
    limit limits linear local logit logits lora mamba mask mla mlp moe mrope multiplier multipliers mup n
    nope norm normalization parallel pos position positional positions post pre proj q qk qkv query ratio
    recurrent rel residual rms rmsnorm rope rotary router scalar scale scales scaling shared sink sinks
    size sliding softcap softcapping softmax sparse sparsity ssm stride swiglu theta tie tied topk tuning
    v value values width window windows yarn
    """.split()
)


def check_unread(fields: Mapping[str, Any], known: set[str], model_type: str) -> None:
    """Raise ValueError that names every field outside ``known`` that may change the mathematics."""
    problems = []
    for name, value in fields.items():
        if name in known:
            continue
        if name in _INERT_VALUES:
            switched_off = name == "sliding_window" and fields.get("use_sliding_window") is False
            if value not in _INERT_VALUES[name] and not switched_off:
                allowed = " or ".join(repr(allowed) for allowed in _INERT_VALUES[name])
                problems.append(f"{name}={value!r} is not supported (allowed: {allowed})")
        elif may_matter(name, value):
            problems.append(f"{name}={value!r} is not known")
    if problems:
        raise ValueError(
            f"the {model_type} config has fields that may change the mathematics: {'; '.join(problems)}. "
            f"transformers' own {model_type} model does not read fields that are not known; if this model is "
            "one of those, remove them from its config.json"
        )


def may_matter(name: str, value: Any) -> bool:
    """Whether a field that we do not know is switched on and named after a part of the computation.

    >>> may_matter("logits_soft_cap", 30.0), may_matter("logits_soft_cap", None)
    (True, False)
    >>> may_matter("auto_map", {"AutoModel": "modeling.Model"}), may_matter("use_flash_attention", True)
    (False, False)
    """
    if value is None or value is False or value in ("", [], {}):
        return False
    if name in _INERT or _INERT_NAME.search(name):
        return False
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_")
    return not _PARTS.isdisjoint(words)
