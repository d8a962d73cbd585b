"""Runs with every setting of LoRA: what is trained, what is written, and what is refused before that."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, LoRAParam, has_lora, load_adapter, load_config
from jsparse.train import FinetuneConfig, MergeConfig, finetune, merge
from jsparse.train.run import identity
from jsparse.train.start import is_trained, prepare
from jsparse.train.step import split_model

TOKENS = np.random.default_rng(0).integers(0, 257, (2, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(save_checkpoint, tmp_path_factory):
    """Bases with a head of their own and with a tied one."""
    root = tmp_path_factory.mktemp("bases")
    return {
        tied: save_checkpoint(
            root / str(tied), intermediate_size=64, hidden_size=64, tie_word_embeddings=tied
        )
        for tied in (False, True)
    }


def settings(model, text, output, **changes):
    fields = {"context": 64, "steps": 2, "batch_size": 1, "learning_rate": 1e-2, "warmup_steps": 0}
    return FinetuneConfig(model=model, data=text, output=output, **(fields | changes))


def values(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def changed(before, after):
    before, after = (values(Llama.from_pretrained(folder)) for folder in (before, after))
    return {name for name, array in after.items() if name not in before or (array != before[name]).any()}


def logits(model):
    return np.asarray(jax.jit(lambda: model(TOKENS))())


NORMS = {"norm.scale"} | {
    f"layers.{layer}.{name}.scale"
    for layer in (0, 1)
    for name in ("input_layernorm", "post_attention_layernorm")
}


@pytest.mark.parametrize(
    ("tied", "options", "expected", "written"),
    [
        (
            False,
            {
                "rslora": True,
                "lora_targets": ("q_proj", "up_proj", "lm_head"),
                "lora_rank_pattern": {"lm_head": 2, r"layers\.1.*\.up_proj": 3},
                "lora_alpha_pattern": {"q_proj": 4.0},
                "lora_layers": (1,),
                "lora_dropout": 0.1,
                "train_embeddings_and_norms": False,
                "modules_to_save": ("embed_tokens", "layers.0.mlp.down_proj"),
            },
            {
                *("embed_tokens.embedding", "lm_head.kernel", "layers.0.mlp.down_proj.kernel"),
                *("layers.1.self_attn.q_proj.kernel", "layers.1.mlp.up_proj.kernel"),
            },
            {
                "r": 3,
                "lora_alpha": 16,
                "use_rslora": True,
                "rank_pattern": {"q_proj": 8, "lm_head": 2},
                "alpha_pattern": {"q_proj": 4},
                "layers_to_transform": [1],
                "target_modules": ["lm_head", "q_proj", "up_proj"],
                "modules_to_save": ["embed_tokens", "model.layers.0.mlp.down_proj"],
            },
        ),
        (
            True,
            {"lora_targets": ("v_proj", "lm_head")},
            NORMS
            | {"embed_tokens.embedding", "lm_head.kernel"}
            | {f"layers.{layer}.self_attn.v_proj.kernel" for layer in (0, 1)},
            {"target_modules": ["lm_head", "v_proj"]},
        ),
    ],
    ids=["untied", "tied"],
)
def test_what_was_asked_for_is_trained_and_written(folders, text, tmp_path, tied, options, expected, written):
    config = settings(folders[tied], text, tmp_path / "run", **options)
    assert finetune(config, progress=False).finished
    assert changed(config.model, config.output) == expected
    assert not load_config(config.output).tie_word_embeddings
    merge(MergeConfig(run=config.output, output=tmp_path / "adapter", adapter=True))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {name: fields[name] for name in written} == written
    model = Llama.from_pretrained(config.model)
    load_adapter(model, tmp_path / "adapter")
    assert model.config.tie_word_embeddings == tied
    np.testing.assert_allclose(logits(model), logits(Llama.from_pretrained(config.output)), atol=2e-5)


def test_a_run_is_defined_by_them_and_one_from_before_them_goes_on(folders, text, tmp_path, monkeypatch):
    new = ("rslora", "lora_rank_pattern", "lora_alpha_pattern", "lora_layers", "modules_to_save")
    config = settings(folders[False], text, tmp_path / "run", checkpoint_every=1)
    with monkeypatch.context() as before:
        before.setattr(identity, "_FIELDS", [name for name in identity._FIELDS if name not in new])
        finetune(config, progress=False)
    changes = {
        "rslora": True,
        "lora_rank_pattern": {"q_proj": 2},
        "lora_alpha_pattern": {"q_proj": 2.0},
        "lora_layers": (0,),
        "modules_to_save": ("lm_head",),
    }
    for name, value in changes.items():
        shown = list(value) if isinstance(value, tuple) else value
        with pytest.raises(ValueError) as caught:
            finetune(dataclasses.replace(config, steps=3, **{name: value}), progress=False)
        assert "belongs to another run: its " + name in str(caught.value)
        assert f", here {shown!r}. Choose" in str(caught.value)
    for path in (tmp_path / "run").iterdir():  # what is left of an interrupted run
        if path.name.startswith(("model", "config", "tokenizer", "attention")):
            path.unlink()
    assert finetune(dataclasses.replace(config, steps=3), progress=False).finished


@pytest.mark.parametrize(
    ("tied", "options", "message"),
    [
        (False, {"lora_targets": ("c_attn",)}, r"targets \['c_attn'\] match no linear layer"),
        (False, {"lora_layers": (2,)}, r"layers must be .* the model's layers, 0 to 1, not \(2,\)"),
        (
            False,
            {"lora_rank_pattern": {"up_proj": 4}},
            r"rank_pattern \['up_proj'\] match no layer with an adapter",
        ),
        (False, {"lora_alpha_pattern": {"lm_head": 4.0}}, r"alpha_pattern \['lm_head'\] match no layer"),
        (False, {"modules_to_save": ("wte",)}, r"modules_to_save \['wte'\] name no module of the model"),
        (
            False,
            {"modules_to_save": ("lm_head",), "lora_targets": ("q_proj", "lm_head")},
            r"targets \['lm_head'\] match no linear layer among .*exclude=\['lm_head'\]",
        ),
        (
            True,
            {"modules_to_save": ("lm_head",)},
            "lm_head, which the model ties .*; embed_tokens trains both",
        ),
        (
            False,
            {"base_bits": 8, "modules_to_save": ("norm", "up_proj")},
            "trains model.layers.0.mlp.up_proj, .*which base_bits=8 keeps frozen",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_anything_is_written(
    folders, text, tmp_path, tied, options, message
):
    with pytest.raises(ValueError, match=message):
        finetune(settings(folders[tied], text, tmp_path / "run", **options), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("embeddings_and_norms", [False, True])
def test_modules_to_save_are_added_to_what_is_trained(embeddings_and_norms):
    config = settings(
        *("-", "-", "-"),
        lora_targets=("all-linear",),
        train_embeddings_and_norms=embeddings_and_norms,
        modules_to_save=("lm_head", "layers.1.mlp.up_proj", "model.norm"),
    )
    model = prepare(config, Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0)))
    params = nnx.to_flat_state(split_model(model, is_trained(config))[0])
    names = {".".join(map(str, path)) for path, _ in params if path[-1] not in ("lora_a", "lora_b")}
    added = {"lm_head.kernel", "layers.1.mlp.up_proj.kernel", "norm.scale"}
    assert names == (added | NORMS | {"embed_tokens.embedding"} if embeddings_and_norms else added)
    up_projs = [layer.mlp.up_proj for layer in model.layers]
    assert [linear.lora_a is None for linear in up_projs] == [False, True]


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_base_of_few_bits_takes_an_adapter_on_the_head(folders, text, tmp_path, tied):
    pytest.importorskip("qwix", reason="needs the extra qlora")
    options = {"lora_targets": ("o_proj", "lm_head"), "modules_to_save": ("embed_tokens",), "base_bits": 4}
    options |= {"train_embeddings_and_norms": False}
    config = settings(folders[tied], text, tmp_path / "run", **options)
    model = prepare(config, Llama.from_pretrained(folders[tied]))
    assert has_lora(model) and model.layers[0].mlp.up_proj.codes is not None
    trained = nnx.to_flat_state(nnx.state(model, is_trained(config)))
    assert sum(isinstance(variable, LoRAParam) for _, variable in trained) == len(trained) - 1 == 6
    assert finetune(config, progress=False).finished
    assert {"embed_tokens.embedding", "lm_head.kernel"} <= changed(config.model, config.output)
