"""The oracle: Hugging Face's transformers in torch float64, on random weights that hide nothing.

Default initialisation hides most mistakes (norms are one, biases zero, logits tiny), so weights are drawn
with ``initializer_range`` 0.12 and norms and biases are perturbed. 700 tokens against an original context of
256 make every RoPE scaling bite. Run with ``-s`` for the table.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jsparse.models.layers
from jsparse.models import Llama, LlamaConfig, load_tokenizer, shipped_model

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers, from the extra `parity`"
)

transformers.utils.logging.disable_progress_bar()

LENGTH = 700
TOLERANCE = 1e-3
SMALL = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.12,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
WINDOWS = {"use_sliding_window": True, "sliding_window": 150, "max_window_layers": 2}
CONFIGURATIONS = {
    "llama, default": ("llama", {}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama, own head_dim": ("llama", {"head_dim": 40, "num_key_value_heads": 3}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    "mistral, sliding window": ("mistral", {"sliding_window": 200}),
    "qwen2, windows in two layers": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


def extended(method, *lengths):
    """The fields of a llama of 256 positions after it was extended to one length after another."""
    config = LlamaConfig.from_hf(SMALL | {"model_type": "llama", "max_position_embeddings": 256})
    for length in lengths:
        config = config.extend_context(length, method)
    fields = config.to_hf()
    return {name: fields[name] for name in ("max_position_embeddings", "rope_parameters")}


CONFIGURATIONS |= {
    "llama, extended by ntk": ("llama", extended("ntk", 1024)),
    "llama, extended by yarn twice": ("llama", extended("yarn", 512, 1024)),
    "llama, extended by llama3 twice": ("llama", extended("llama3", 512, 1024)),
}


def make_oracle(kind, fields):
    """A random transformers model, float32, with norms and biases that are not their identity."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_tokens():
    return np.random.default_rng(0).integers(0, SMALL["vocab_size"], (1, LENGTH)).astype(np.int32)


def oracle_logits(model, tokens):
    with torch.no_grad():
        return model.double()(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def largest_difference(ours, theirs):
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_those_of_transformers(name, tmp_path, record_property):
    tokens = make_tokens()
    oracle = make_oracle(*CONFIGURATIONS[name])
    oracle.save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(tmp_path / "theirs")
    ours = model(jnp.asarray(tokens))
    imported = largest_difference(ours, oracle_logits(oracle, tokens))

    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    exported = largest_difference(ours, oracle_logits(again.eval(), tokens))

    record_property("largest logit difference, imported", imported)
    record_property("largest logit difference, exported", exported)
    spread = float(np.asarray(ours).std())
    print(
        f"\n{name:30s} imported {imported:.1e}  exported {exported:.1e}  (logits' deviation {spread:.2f})",
        end="",
    )
    assert imported < TOLERANCE
    assert exported < TOLERANCE
    assert spread > 0.5  # logits of nothing would agree too


def test_rope_scaling_spelling_of_older_checkpoints(tmp_path):
    tokens = make_tokens()
    oracle = make_oracle("llama", {"rope_parameters": YARN})
    oracle.save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    )
    ours = Llama.from_pretrained(tmp_path)(jnp.asarray(tokens))
    assert largest_difference(ours, oracle_logits(oracle, tokens)) < TOLERANCE


# What the oracle must catch, or it proves nothing. The first is the smallest mistake we know of.
MISTAKES = {
    "eps": ("llama", {}, {"rms_norm_eps": 1e-6}),
    "theta": ("llama", {"rope_parameters": LLAMA3}, {"rope_parameters": LLAMA3 | {"rope_theta": 400000.0}}),
    "scaling ignored": ("llama", {"rope_parameters": LLAMA3}, {"rope_parameters": {"rope_theta": 500000.0}}),
    "yarn's factor on cosines": (
        "llama",
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"attention_factor": 1.0}},
    ),
    "window off by one": ("mistral", {"sliding_window": 200}, {"sliding_window": 201}),
    "windows in other layers": (
        "qwen2",
        WINDOWS,
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_config_is_seen(name, tmp_path):
    kind, right, wrong = MISTAKES[name]
    tokens = make_tokens()
    oracle = make_oracle(kind, right)
    oracle.save_pretrained(tmp_path)
    edit_config(tmp_path, **wrong)
    ours = Llama.from_pretrained(tmp_path)(jnp.asarray(tokens))
    assert largest_difference(ours, oracle_logits(oracle, tokens)) > 3 * TOLERANCE


def test_interleaved_rope_is_seen(tmp_path, monkeypatch):
    def interleaved(x, cos, sin):
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, :, None, :], sin[:, :, None, :]
        return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)

    tokens = make_tokens()
    oracle = make_oracle("llama", {})
    oracle.save_pretrained(tmp_path)
    monkeypatch.setattr(jsparse.models.layers, "apply_rope", interleaved)
    ours = Llama.from_pretrained(tmp_path)(jnp.asarray(tokens))
    assert largest_difference(ours, oracle_logits(oracle, tokens)) > 3 * TOLERANCE


def edit_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_shipped_model_and_its_tokenizer_are_read_by_transformers():
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped_model())
    text = "import os\n\n# amber is tulip. 123\n# What is amber? amber is"
    ids = load_tokenizer(shipped_model()).encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    tokens = np.array([ids], np.int32)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float64)
    ours = Llama.from_pretrained(shipped_model(), dtype=jnp.dtype("float32"))(jnp.asarray(tokens))
    assert largest_difference(ours, oracle_logits(oracle.eval(), tokens)) < TOLERANCE
