"""Hugging Face's config.json: every spelling that is read, every field that is refused, what is written."""

from typing import Any

import pytest

from jsparse.models import LlamaConfig, RopeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LINEAR = RopeConfig(kind="linear", theta=10000.0, factor=4.0)
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


pytestmark = pytest.mark.usefixtures("unchecked_types")


def from_hf(model_type="llama", **fields):
    return LlamaConfig.from_hf({"model_type": model_type} | SIZES | fields)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, RopeConfig(theta=10000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 10000}, LINEAR),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, LINEAR),
        (  # one entry a layer type, all equal
            {
                "rope_parameters": dict.fromkeys(
                    ("full_attention", "sliding_attention"), {"type": "linear", "factor": 4.0}
                )
            },
            LINEAR,
        ),
        ({"rope_scaling": {"type": "yarn", **YARN}}, RopeConfig(kind="yarn", **YARN)),
        (  # no original length: the config's own; no factor: the ratio of the two
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            RopeConfig(kind="yarn", factor=2.0, original_max_position_embeddings=512),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 128}},
            RopeConfig(kind="yarn", **YARN),
        ),
        (  # Phi's and others' place for it
            {"rope_scaling": {"type": "llama3", **LLAMA3}, "original_max_position_embeddings": 256},
            RopeConfig(kind="llama3", **LLAMA3, original_max_position_embeddings=256),
        ),
    ],
)
def test_rope_spellings(fields, rope):
    assert from_hf(**fields).rope == rope


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'.*default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs the field factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor.*>= 1.*0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor.*number.*'4'"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor.*nan"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor.*1000"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e308}, "max_sequence_length": 64},
            "factor.*1e[+]308",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "'linear' does not read.*beta_fast",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            "rope_type 'yarn' and a type 'linear', which disagree",
        ),
        ({"rope_scaling": {"mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": ["linear"]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta=500000.0 disagrees"),
        ({"rope_theta": -1}, "rope_theta.*-1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters disagree",
        ),
        (
            {"rope_parameters": {"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e5}}},
            "differs between layer types",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3' needs the field low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "low_freq_factor < high_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": 0.5}}, "beta_fast > beta_slow"),
        ({"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 64}, "disagrees"),
    ],
)
def test_rope_refusals(fields, named):
    with pytest.raises(ValueError, match=named):
        from_hf(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"logit_softcapping": 30.0}, "logit_softcapping=30.0 is not known"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"sliding_window": 128}, "sliding_window=128 is not supported"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size=64.*num_attention_heads=3"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size=64.*num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4.*num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim must be even.*15"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings.*'no'"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"eos_token_id": "2"}, "eos_token_id.*'2'"),
        ({"eos_token_id": [1, 100]}, "eos_token_ids.*vocab_size=100.*100"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding window.*0"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias=True"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
    ],
)
def test_refusals(fields, named):
    with pytest.raises(ValueError, match=named):
        from_hf(**fields)


def test_several_problems_in_one_message():
    with pytest.raises(ValueError, match="first_layer=1.*second_norm=2"):
        from_hf(first_layer=1, second_norm=2)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "8", True, [], {}, float("nan")])
@pytest.mark.parametrize("field", SIZES)
def test_sizes_must_be_positive_integers(field, bad):
    with pytest.raises(ValueError, match=field):
        from_hf(**{field: bad})


BAD_VALUES: list[Any] = [
    None,
    -1,
    0,
    1.5,
    float("nan"),
    10**30,
    True,
    "x",
    "",
    [],
    [None],
    {},
    {"type": []},
    {"a": {}},
]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_bad_value_is_a_value_error_or_means_something(model_type):
    """No field lets another exception out, and what is accepted can be written and read again."""
    whole = {"model_type": model_type} | SIZES | from_hf(model_type).to_hf()
    refusals = 0
    for field in [
        *whole,
        "rope_scaling",
        "rope_theta",
        "max_window_layers",
        "original_max_position_embeddings",
    ]:
        for value in BAD_VALUES:
            try:
                config = LlamaConfig.from_hf(whole | {field: value})
            except ValueError:
                refusals += 1
            else:
                assert LlamaConfig.from_hf(config.to_hf()) == config, (field, value)
    for key in (
        "type",
        "factor",
        "rope_theta",
        "original_max_position_embeddings",
        "beta_fast",
        "truncate",
        "mscale",
    ):
        for value in BAD_VALUES:
            try:
                from_hf(model_type, rope_scaling={"type": "yarn", **YARN, key: value})
            except ValueError:
                refusals += 1
    assert refusals > 200


# As published, less the fields that only name things.
PUBLISHED = {
    "Llama-2-7b": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "vocab_size": 32000,
    },
    "Llama-3.2-1B": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen2.5-0.5B": {
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
        "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    config = LlamaConfig.from_hf(PUBLISHED[name])
    windows = set(config.sliding_windows)
    assert windows == ({4096} if name == "Mistral-7B-v0.1" else {None})
    assert config.head_dim == {"Llama-3.2-1B": 64, "Qwen2.5-0.5B": 64}.get(name, 128)
    assert config.rope.kind == ("llama3" if name == "Llama-3.2-1B" else "default")
    assert config.qkv_bias == (name == "Qwen2.5-0.5B")
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_null_and_absent():
    bare = {"model_type": "llama"} | {name: SIZES[name] for name in list(SIZES)[:5]}
    for fields in (bare, bare | {"head_dim": None, "num_key_value_heads": None}):
        config = LlamaConfig.from_hf(fields)
        assert (config.head_dim, config.num_key_value_heads) == (16, 4)
        assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    # what transformers assumes for an absent field differs between model types, and null is not absent
    assert LlamaConfig.from_hf(bare | {"model_type": "qwen3", "num_key_value_heads": 4}).head_dim == 128
    assert from_hf("mistral").sliding_windows == (4096,) * 4
    assert from_hf("mistral", sliding_window=None).sliding_windows == (None,) * 4


def test_biases_and_norms_of_each_type():
    assert [from_hf(kind).qkv_bias for kind in ("llama", "mistral", "qwen2", "qwen3")] == [
        False,
        False,
        True,
        False,
    ]
    assert [from_hf(kind).qk_norm for kind in ("llama", "mistral", "qwen2", "qwen3")] == [
        False,
        False,
        False,
        True,
    ]
    assert from_hf(attention_bias=True).qkv_bias


def test_sliding_windows_of_each_layer():
    on = {"use_sliding_window": True, "sliding_window": 8}
    assert from_hf("qwen2", sliding_window=8).sliding_windows == (None,) * 4
    assert from_hf("qwen2", **on, max_window_layers=3).sliding_windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    assert from_hf("qwen3", **on, layer_types=types).sliding_windows == (8, None, 8, None)


def test_stop_tokens():
    assert from_hf(eos_token_id=7).eos_token_ids == (7,)
    assert from_hf(eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert from_hf(eos_token_id=None).eos_token_ids == ()
    assert from_hf().eos_token_ids == (2,)  # what transformers assumes for an absent field of a llama
    assert from_hf("qwen2").eos_token_ids == ()


def test_fields_that_cannot_matter_are_passed_over():
    harmless = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "pretraining_tp": 2,
        "use_cache": True,
        "attention_dropout": 0.0,
        "quantization_config": None,
        "rope_interleaved": False,
    }
    assert from_hf(**harmless) == from_hf()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "eos_token_id": [3, 4], "bos_token_id": None}),
        ("llama", {"rope_scaling": {"type": "llama3", **LLAMA3}, "tie_word_embeddings": True}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}, "pad_token_id": 0}),
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None, "rope_scaling": {"type": "yarn", **YARN, "truncate": False}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True, "head_dim": 32, "rope_theta": 1e6}),
    ],
)
def test_what_is_written_is_read_again(model_type, fields):
    config = from_hf(model_type, **fields)
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"sliding_windows": (8,) * 4}, "not for llama"),
        ({"model_type": "mistral", "sliding_windows": (8, None, 8, 8)}, "every layer or in none"),
        ({"model_type": "qwen2", "sliding_windows": (8, 16, None, None)}, "one size"),
        ({"model_type": "qwen2", "sliding_windows": (8,)}, "1 entries for num_hidden_layers=4"),
        ({"pad_token_id": 1.5}, "pad_token_id"),
    ],
)
def test_a_config_that_hugging_face_cannot_say_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        LlamaConfig(**(SIZES | arguments))


def test_extend_context_rounds_the_factor_up_and_compounds():
    config = LlamaConfig(**SIZES)
    assert config.extend_context(512) is config
    assert config.extend_context(100) is config
    longer = config.extend_context(1025)
    assert longer.rope == RopeConfig(kind="linear", factor=3.0)
    assert longer.max_position_embeddings == 1536
    assert longer.extend_context(1536) is longer
    assert longer.extend_context(6144).rope.factor == 12.0


def test_extend_context_refuses_what_is_no_length():
    bad: list[Any] = [0, -1, 1.5, True]
    for length in bad:
        with pytest.raises(ValueError, match="length"):
            LlamaConfig(**SIZES).extend_context(length)
