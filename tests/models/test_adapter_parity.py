"""The oracle of adapters: PEFT reads our folders to our logits, and we read its folders to its logits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, merge_lora
from jsparse.models.adapter import load_adapter, save_adapter
from jsparse.models.convert import ConvertConfig, convert

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers, from the extra `parity`"
)
peft = pytest.importorskip("peft", reason="the oracle needs peft, from the extra `parity`")

transformers.utils.logging.disable_progress_bar()
# PEFT asks transformers in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 90)).astype(np.int32)
SMALL = LlamaConfig.tiny(vocab_size=61, intermediate_size=48, initializer_range=0.2, eos_token_ids=(2,))
VARIANTS = {
    "llama": {},
    "llama, tied embeddings": {"tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def is_trained(path, variable):
    """LongLoRA's choice, as the trainer's filter makes it."""
    return isinstance(variable, LoRAParam) or any("embed" in str(key) or "norm" in str(key) for key in path)


def make_base(directory, **variant):
    """A random model in a Hugging Face folder."""
    model = Llama(dataclasses.replace(SMALL, **variant), rngs=nnx.Rngs(0))
    model.save_pretrained(directory)
    return model


def perturb_ours(model):
    rng = np.random.default_rng(1)
    state = dict(nnx.to_flat_state(nnx.state(model, is_trained)))
    for path, variable in state.items():
        noise = 0.2 * rng.standard_normal(variable.shape).astype(np.float32)
        state[path] = variable.replace(jnp.asarray(np.asarray(variable[...]) + noise))
    nnx.update(model, nnx.from_flat_state(state))


def load_theirs(base, adapter, config=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long(), use_cache=False).logits.numpy()


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_ours(variant, tmp_path):
    model = make_base(tmp_path / "base", **VARIANTS[variant])
    base = np.asarray(model(TOKENS))
    model.config = model.config.extend_context(100)
    add_lora(
        model, rank=3, alpha=5, rngs=nnx.Rngs(1), targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")
    )
    perturb_ours(model)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base", trained=is_trained)
    ours = np.asarray(model(TOKENS))
    assert ours.std() > 0.5 and np.abs(ours - base).max() > 1  # logits of nothing would agree too

    config = transformers.AutoConfig.from_pretrained(tmp_path / "adapter")
    theirs = load_theirs(tmp_path / "base", tmp_path / "adapter", config)
    assert_close(ours, logits(theirs))
    merged = theirs.merge_and_unload()
    assert_close(ours, logits(merged))
    merge_lora(model)
    assert_close(model(TOKENS), logits(merged))

    # Without its config, the adapter runs on the context of the base: what AutoConfig is for.
    assert np.abs(ours - logits(load_theirs(tmp_path / "base", tmp_path / "adapter"))).max() > 0.1


def test_transformers_alone_refuses_ours(tmp_path):
    """It would not extend the context."""
    model = make_base(tmp_path / "base")
    model.config = model.config.extend_context(100)
    add_lora(model, rank=3, alpha=5, rngs=nnx.Rngs(1))
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base", trained=LoRAParam)
    with pytest.raises(OSError, match="model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def make_theirs(base, adapter, **fields):
    """An adapter of PEFT's, with random values in all that it trains."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    return model


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("llama", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "norm", "lm_head"]}),
        ("llama", {"target_modules": r".*\.1\.self_attn\.[qv]_proj"}),
        ("llama, tied embeddings", {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}),
        (
            "llama, tied embeddings",
            {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        ("qwen3", {"target_modules": ["v_proj"], "modules_to_save": ["model.norm", "q_norm"]}),
    ],
)
def test_we_read_pefts(variant, fields, tmp_path):
    model = make_base(tmp_path / "base", **VARIANTS[variant])
    base = np.asarray(model(TOKENS))
    theirs = make_theirs(tmp_path / "base", tmp_path / "adapter", **fields)
    load_adapter(model, tmp_path / "adapter")
    ours = model(TOKENS)
    assert np.abs(np.asarray(ours) - base).max() > 0.3
    assert_close(ours, logits(theirs))
    merge_lora(model)
    assert_close(model(TOKENS), logits(theirs.merge_and_unload()))


def test_a_pickle_of_pefts_converts(tmp_path):
    model = make_base(tmp_path / "base")
    theirs = make_theirs(tmp_path / "base", tmp_path / "new", target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").is_file()
    convert(ConvertConfig(model=tmp_path / "old", output=tmp_path / "adapter"))
    load_adapter(model, tmp_path / "adapter")
    assert_close(model(TOKENS), logits(theirs))


def test_we_refuse_what_would_compute_something_else(tmp_path):
    model = make_base(tmp_path / "base")
    for number, (fields, named) in enumerate(
        [
            ({"use_dora": True}, "use_dora=True"),
            ({"use_rslora": True}, "use_rslora=True"),
            ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
            ({"layers_to_transform": [0]}, "layers_to_transform=\\[0\\]"),
        ]
    ):
        adapter = tmp_path / f"adapter{number}"
        make_theirs(tmp_path / "base", adapter, target_modules=["q_proj"], **fields)
        with pytest.raises(ValueError, match=named):
            load_adapter(model, adapter)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_we_refuse_a_head_that_peft_unties(tmp_path):
    """Without ensure_weight_tying, PEFT trains the embedding and keeps the base's as lm_head."""
    model = make_base(tmp_path / "base", tie_word_embeddings=True)
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    make_theirs(tmp_path / "base", tmp_path / "adapter", **fields)
    with pytest.raises(ValueError, match="lm_head"):
        load_adapter(model, tmp_path / "adapter")
