"""Which fields of a config.json are refused."""

from typing import Any

import pytest

from jsparse.models import LlamaConfig

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PLAIN = LlamaConfig.from_hf(SIZES)

# What PretrainedConfig.to_dict wrote in transformers 4, beside fields that we read.
DUMP = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "torch_dtype": "bfloat16", "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tokenizer_class": None, "prefix": None,
    "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
}  # fmt: skip


def test_a_full_dump_of_the_base_class_changes_nothing():
    assert LlamaConfig.from_hf(SIZES | DUMP) == PLAIN


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}},
        {"internal_version": "7b-alpha-v2.33.0.30"},
        {"trained_by": "somebody", "license": "mit", "git_commit": "abc"},
        {"use_flash_attn": True, "_flash_attn_2_enabled": True, "attn_implementation": "sdpa"},
        {"model_max_length": 4096, "max_seq_len": 4096, "seq_length": 4096, "n_ctx": 4096},
        {"logits_soft_cap": None, "use_qk_norm": False, "layer_scale": {}, "expert_ids": []},
        {"resid_pdrop": 0.1, "output_router_logits": True, "router_aux_loss_coef": 0.001},
        {"unsloth_version": "2024.9", "transformers.js_config": {"dtype": "q4"}, "_commit_hash": "x"},
        {"rope_scaling": {"type": "default", "finetuned": True}},
        {"hidden_act": "swish"},
        {"sliding_window": 4096, "use_sliding_window": False},
    ],
)
def test_what_cannot_change_a_logit_is_ignored(fields):
    assert LlamaConfig.from_hf(SIZES | fields) == PLAIN


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_soft_cap", 30.0),
        ("final_logit_softcapping", 30.0),
        ("attention_multiplier", 0.015625),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("scale_emb", 12),
        ("scale_depth", 1.4),
        ("dim_model_base", 256),
        ("num_local_experts", 8),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("use_parallel_residual", True),
        ("alibi", True),
        ("use_qk_norm", True),
        ("clip_qkv", 8.0),
        ("is_causal", False),
        ("block_sparse_window", 4),
        ("mup_enabled_scalars", [1.0]),
        ("rotary_pct", 0.25),
        ("partial_rotary_factor", 0.5),
        ("pruned_heads", {"0": [1]}),
        ("attentionScale", 0.5),
        ("use_simple_norm", True),
        ("infinite_attention", True),
        ("max_attention_window", 512),
    ],
)
def test_what_can_change_a_logit_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*") as caught:
        LlamaConfig.from_hf(SIZES | {name: value})
    assert "\n" not in str(caught.value)


def test_several_problems_are_named_at_once():
    with pytest.raises(ValueError, match="logit_scale=2.0 is not known; hidden_act='gelu' is not supported"):
        LlamaConfig.from_hf(SIZES | {"logit_scale": 2.0, "hidden_act": "gelu"})
