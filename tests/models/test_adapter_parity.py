"""The oracle of adapters: PEFT reads our folders to our logits, and we read its folders to its logits."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, merge_lora
from jsparse.models.adapter_config import AdapterConfig
from jsparse.models.adapter_loading import load_adapter
from jsparse.models.adapter_saving import save_adapter
from jsparse.models.convert import ConvertConfig, convert
from jsparse.models.peft_names import pattern_value

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers, from the extra `parity`"
)
peft = pytest.importorskip("peft", reason="the oracle needs peft, from the extra `parity`")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")

transformers.utils.logging.disable_progress_bar()
# PEFT asks transformers in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 90)).astype(np.int32)
SMALL = LlamaConfig.tiny(vocab_size=61, intermediate_size=48, initializer_range=0.2, eos_token_ids=(2,))
VARIANTS = {
    "llama": {},
    "llama, tied embeddings": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
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


def perturb_ours(model, trained=is_trained):
    rng = np.random.default_rng(1)
    state = dict(nnx.to_flat_state(nnx.state(model, trained)))
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
            ({"bias": "lora_only"}, "bias=.lora_only"),
            ({"trainable_token_indices": [3]}, "trainable_token_indices"),
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


MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 10, 11) for name in "qkvo"),
    *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1, 10, 11) for name in ("gate", "up", "down")),
    "lm_head",
]
ENDS = [
    "q_proj",
    "v_proj",
    "proj",
    "mlp.up_proj",
    "layers.1.mlp.up_proj",
    "model.layers.0.mlp.up_proj",
    "lm_head",
]
EXPRESSIONS = [
    "q_proj",
    r"layers\.1\..*",
    ".*",
    "(k|v)_proj",
    r"^model\.layers\.0.*",
    "1.mlp.up_proj",
    "lm_head",
    "head",
]


@hypothesis.given(st.data())
def test_modules_are_named_as_in_peft(data):
    def some(values):
        return st.lists(st.sampled_from(values), max_size=3, unique=True)

    listed = data.draw(st.booleans())
    fields = {
        "target_modules": data.draw(some(ENDS).filter(bool) if listed else st.sampled_from(EXPRESSIONS)),
        "layers_to_transform": data.draw(st.none() | st.integers(0, 2) | some([0, 1, 10]))
        if listed
        else None,
        "exclude_modules": data.draw(st.none() | some(ENDS) | st.sampled_from(EXPRESSIONS)),
        "modules_to_save": data.draw(st.none() | some(["lm_head", "q_proj", "layers.1.mlp.up_proj"])),
    }
    if fields["layers_to_transform"] is not None:
        fields["layers_pattern"] = data.draw(st.sampled_from([None, "layers", ["h", "layers"], ["mlp"]]))
    values = st.dictionaries(st.sampled_from(EXPRESSIONS), st.integers(1, 9), max_size=3)
    fields |= {name: data.draw(values) for name in ("rank_pattern", "alpha_pattern")}
    theirs = peft.LoraConfig(r=3, lora_alpha=5, **fields)
    expected = [name for name in MODULES if tuners_utils.check_target_module_exists(theirs, name)]
    ours = AdapterConfig.from_peft({"peft_type": "LORA", "r": 3, "lora_alpha": 5, **fields})
    try:
        adapted, saved = ours.find(MODULES, MODULES)
    except ValueError as error:
        # PEFT ignores a name that means nothing if another means something.
        assert not expected or "target_modules ['proj'] name no module" in str(error)
        return
    assert adapted == expected
    assert saved == [name for name in MODULES if name.endswith(tuple(fields["modules_to_save"] or ()))]
    for name in MODULES:
        for pattern, default in ((theirs.rank_pattern, 3), (theirs.alpha_pattern, 5)):
            key = peft.utils.other.get_pattern_key(pattern.keys(), name)
            assert pattern_value(pattern, name, default) == pattern.get(key, default)


# What an adapter may say beside one rank for some layers: the same model as PEFT, within 1e-5 of its norm.

PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\..*": 2, "v_proj": 5, "down_proj": 1},
    "alpha_pattern": {"q_proj": 3.5, r"^model.layers.0.mlp.down_proj": 1, "v_proj": 2, "nothing": 1},
}
LAYERS = ["q_proj", "layers.1.mlp.up_proj"]
ONE_LAYER = {
    "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],  # the second named in full
    "layers_to_transform": 1,
    "layers_pattern": "layers",
}
SAVED = ["embed_tokens", "lm_head", "norm"]
QV = ["q_proj", "v_proj"]
THEIRS = {
    "rsLoRA": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], **PATTERNS}),
    "patterns and rsLoRA": ("qwen3", {"target_modules": [*QV, "down_proj"], "use_rslora": True} | PATTERNS),
    "layers": ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
    "one layer": ("llama", ONE_LAYER),
    "excluded": ("llama", {"target_modules": QV, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded by expression": ("llama", {"target_modules": QV, "exclude_modules": r".*\.1\..*_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear, tied": ("llama, tied embeddings", {"target_modules": "all-linear"}),
    "lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 6}}),
    "lm_head, tied": ("llama, tied embeddings", {"target_modules": ["q_proj", "lm_head"]}),
    "saved whole": ("llama", {"target_modules": "all-linear", "modules_to_save": SAVED}),
    "layers saved whole": ("qwen2", {"target_modules": "all-linear", "modules_to_save": LAYERS}),
}


def assert_same_logits(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # merging would change both
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("case", THEIRS)
def test_we_read_all_that_pefts_may_say(case, tmp_path):
    variant, fields = THEIRS[case]
    model = make_base(tmp_path / "base", **VARIANTS[variant])
    base = np.asarray(model(TOKENS))
    theirs = make_theirs(tmp_path / "base", tmp_path / "adapter", **fields)
    expected = logits(theirs)
    assert np.linalg.norm(expected - base) > 0.1 * np.linalg.norm(base)
    load_adapter(model, tmp_path / "adapter")
    assert_same_logits(model(TOKENS), expected)
    # Written again, it is still PEFT's.
    save_adapter(model, tmp_path / "again", base="base", trained=saved_by_theirs(tmp_path / "adapter"))
    assert_same_logits(logits(load_theirs(tmp_path / "base", tmp_path / "again")), expected)
    merge_lora(model)
    assert_same_logits(model(TOKENS), expected)
    model.save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_same_logits(logits(merged), expected)


def saved_by_theirs(adapter):
    """A filter for what an adapter has whole."""
    names = json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] or []

    def is_saved(path, variable):
        module = ".".join(map(str, path[:-1]))
        return isinstance(variable, LoRAParam) or module.endswith(tuple(names))

    return is_saved


OURS = {
    "rsLoRA": ("llama", {"rslora": True}, LoRAParam),
    "patterns": (
        "llama",
        {
            "targets": ("q_proj", "v_proj", "down_proj"),
            "rank_pattern": {"layers.1.self_attn.*": 2, "down_proj": 7},
            "alpha_pattern": {"v_proj": 1.25, "layers.0.mlp.*": 2},
        },
        is_trained,
    ),
    "patterns and rsLoRA": (
        "qwen3",
        {"rslora": True, "rank_pattern": {"o_proj": 6}, "alpha_pattern": {"q_proj": 1}},
        LoRAParam,
    ),
    "layers": ("llama", {"targets": ("q_proj", "up_proj", "lm_head"), "layers": (1,)}, is_trained),
    "all-linear": ("qwen2", {"targets": ("all-linear",)}, LoRAParam),
    "lm_head": ("llama", {"targets": ("q_proj", "lm_head"), "rank_pattern": {"lm_head": 5}}, is_trained),
    "lm_head, tied": ("llama, tied embeddings", {"targets": ("q_proj", "lm_head")}, LoRAParam),
    "lm_head, tied, on a trained embedding": (
        "llama, tied embeddings",
        {"targets": ("lm_head",)},
        is_trained,
    ),
    "saved whole": (
        "llama",
        {"targets": ("all-linear",)},
        lambda path, variable: is_trained(path, variable) or path[0] == "lm_head",
    ),
    "layers saved whole": (
        "qwen2",
        {"targets": ("v_proj", "q_proj"), "exclude": ("layers.1.self_attn.q_proj",)},
        lambda path, variable: isinstance(variable, LoRAParam) or {1, "q_proj"}.issubset(path),
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", OURS)
def test_peft_reads_all_that_ours_may_say(case, tmp_path):
    variant, options, trained = OURS[case]
    model = make_base(tmp_path / "base", **VARIANTS[variant])
    base = np.asarray(model(TOKENS))
    add_lora(model, **({"rank": 3, "alpha": 5, "rngs": nnx.Rngs(1)} | options))
    perturb_ours(model, trained)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base", trained=trained)
    ours = np.asarray(model(TOKENS))
    assert np.linalg.norm(ours - base) > 0.1 * np.linalg.norm(base)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "adapter")
    theirs = load_theirs(tmp_path / "base", tmp_path / "adapter", config)
    assert_same_logits(ours, logits(theirs))
    assert theirs.peft_config["default"].use_rslora == options.get("rslora", False)
    again = Llama.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert_same_logits(again(TOKENS), ours)


@pytest.mark.filterwarnings("ignore")  # PEFT warns of it
def test_merged_in_peft_an_adapter_on_a_tied_head_is_another_model(tmp_path):
    """What the guide says, and why ``merge_lora`` unties the head."""
    make_base(tmp_path / "base", tie_word_embeddings=True)
    theirs = make_theirs(tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head"])
    before = logits(theirs)
    assert np.abs(logits(theirs.merge_and_unload()) - before).max() > 1
