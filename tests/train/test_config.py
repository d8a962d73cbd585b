import dataclasses
import re
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest

import jsparse
from jsparse import HeadPattern
from jsparse.models import LlamaConfig, RopeConfig
from jsparse.models.patterns import StridedBlocks
from jsparse.models.sharding import MeshConfig
from jsparse.reports.console import parse
from jsparse.train import FinetuneConfig

CONFIG = FinetuneConfig(model=Path("base"), data=(Path("text"),), output=Path("out"), context=64)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("data", (), "at least one"),
        ("context", 1, ">= 2"),
        ("steps", 0, ">= 1"),
        ("batch_size", True, ">= 1"),
        ("checkpoint_every", 0, ">= 1"),
        ("lora_rank", 0, ">= 1"),
        ("warmup_steps", -1, ">= 0"),
        ("seed", -1, ">= 0"),
        ("seed", 2**32, "from 0 to"),
        ("learning_rate", 0.0, "> 0"),
        ("learning_rate", float("nan"), "> 0"),
        ("max_grad_norm", -1.0, "> 0"),
        ("lora_alpha", float("inf"), "> 0"),
        ("weight_decay", -0.1, ">= 0"),
        ("attention", "sparse", "None, 'shifted', 'grouped', 'full'"),
        ("schedule", "steps", "'constant', 'cosine', 'linear'"),
        ("rope", "dynamic", "None, 'linear', 'ntk', 'yarn', 'llama3'"),
        ("base_bits", 2, "None, 4, 8"),
        ("remat", "full", "'none', 'layers', 'attention', 'dots'"),
        ("micro_batches", 0, ">= 1"),
        ("max_skipped", 0, ">= 1"),
        ("lora_dropout", 1.0, r"in \[0, 1\)"),
        ("group_ratio", 0.0, r"in \(0, 1\]"),
        ("dtype", "float16", "None, 'float32', 'bfloat16'"),
        ("epochs", 0.0, "> 0"),
        ("warmup_ratio", -0.1, ">= 0"),
        ("warmup_ratio", 1.0, r"in \[0, 1\)"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} .*{allowed}"):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("context", "group_size"),
    [(64, 24), (64, 128), (36, None), (6, None), (30, 15), (2, None)],
    ids=["no divisor", "too long", "9 by default", "1 by default", "odd", "0 by default"],
)
def test_groups_that_do_not_fit_the_context(context, group_size):
    with pytest.raises(ValueError, match=f"does not fit context={context}: it must be even and divide"):
        dataclasses.replace(CONFIG, context=context, attention="shifted", group_size=group_size)
    dataclasses.replace(CONFIG, context=context, attention="full")  # which has no groups to fit
    if group_size is None:  # found out where the model is known
        undecided = dataclasses.replace(CONFIG, context=context)
        assert undecided.for_model(LlamaConfig.tiny()).attention == "full"
        with pytest.raises(ValueError, match=f"does not fit context={context}.* it is 'shifted' beyond"):
            undecided.for_model(LlamaConfig.tiny(max_position_embeddings=1))


def test_group_size_is_a_quarter_of_the_context_unless_given():
    shifted = dataclasses.replace(CONFIG, attention="shifted")
    assert shifted.groups == 16
    assert dataclasses.replace(shifted, context=128).groups == 32
    assert dataclasses.replace(shifted, group_size=32).groups == 32
    assert dataclasses.replace(shifted, group_ratio=0.5).groups == 32
    assert dataclasses.replace(CONFIG, attention="full").groups is None
    assert CONFIG.groups is None  # not chosen yet


LINEAR_8 = RopeConfig(kind="linear", factor=8.0)


@pytest.mark.parametrize(
    ("settings", "model", "chosen"),
    [
        ({}, {"max_position_embeddings": 64}, "full"),
        ({}, {"max_position_embeddings": 63}, "shifted"),
        ({"rope": "ntk"}, {"max_position_embeddings": 64}, "full"),
        ({"rope": "ntk"}, {"max_position_embeddings": 32}, "shifted"),
        # Where a linear factor may be on top of max_position_embeddings, RoPE stays up to the larger reading.
        ({}, {"max_position_embeddings": 8, "rope": LINEAR_8}, "full"),
        ({"positions": 8}, {"max_position_embeddings": 8, "rope": LINEAR_8}, "shifted"),
        ({"attention": "shifted"}, {"max_position_embeddings": 64}, "shifted"),
        ({"attention": "full"}, {"max_position_embeddings": 32}, "full"),
        ({"attention": "grouped"}, {"max_position_embeddings": 32}, "grouped"),
        ({"group_size": 32}, {"max_position_embeddings": 64}, "shifted"),
        ({"group_ratio": 0.5}, {"max_position_embeddings": 64}, "shifted"),
    ],
)
def test_attention_is_full_within_the_models_context_and_shifted_beyond(settings, model, chosen):
    undecided = dataclasses.replace(CONFIG, **settings)
    known = LlamaConfig.tiny(**model)
    config = undecided.for_model(known)
    assert config == dataclasses.replace(undecided, attention=chosen, learning_rate=2e-4)
    assert config.for_model(known) == config and config.pattern(known).kind == chosen


def test_no_pattern_follows_from_attention_that_is_not_chosen():
    with pytest.raises(ValueError, match=r"attention=None depends on the model: take for_model\(model\)"):
        CONFIG.pattern(LlamaConfig.tiny())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "full", "group_size": 16}, "group_size=16 is for attention='shifted' or 'grouped'"),
        ({"window": 64}, "window=64 is for attention='longgen' or 'streaming', which must be given"),
        ({"stride": 4}, "stride=4 is for attention='longgen', which must be given"),
        (
            {"group_size": 16, "window": 64},
            "window=64 is for attention='longgen' or 'streaming', not for 'shifted'",
        ),
        ({"attention": "streaming", "stride": 4}, "stride=4 is for attention='longgen'"),
        ({"attention": "streaming"}, "needs a head_pattern"),
        ({"attention": "longgen", "stride": 4, "window": 100}, "window=100 must be a multiple of 128"),
        ({"attention": "longgen", "stride": 4, "sink": 4}, "sink=4 is for sink and window"),
        (
            {"attention": "longgen", "stride": 4, "mesh": MeshConfig(sequence=2)},
            "not split over the mesh's sequence=2 devices",
        ),
        ({"attention": "longgen", "head_pattern": "heads.tsv"}, "head_pattern=heads.tsv is for"),
        ({"lora_rank": None, "base_bits": 4}, "base_bits=4 keeps the base frozen"),
        ({"lora_rank": None, "rslora": True}, "rslora=True is for LoRA, but lora_rank=None"),
        ({"lora_rank": None, "lora_rank_pattern": {"q_proj": 4}}, "lora_rank_pattern={'q_proj': 4} is for"),
        ({"lora_rank": None, "lora_layers": (0,)}, r"lora_layers=\(0,\) is for LoRA"),
        ({"lora_rank": None, "modules_to_save": ("norm",)}, r"modules_to_save=\('norm',\) is for LoRA"),
        ({"lora_rank": None, "lora_alpha": 8.0}, "lora_alpha=8.0 is for LoRA"),
        ({"lora_rank": None, "lora_dropout": 0.1}, "lora_dropout=0.1 is for LoRA"),
        ({"lora_rank": None, "lora_targets": ("q_proj",)}, r"lora_targets=\('q_proj',\) is for LoRA"),
        (
            {"lora_rank": None, "train_embeddings_and_norms": False},
            "train_embeddings_and_norms=False is for LoRA, but lora_rank=None trains every parameter",
        ),
        ({"lora_layers": ()}, r"lora_layers must be None or numbers of layers, from 0, not \(\)"),
        ({"lora_layers": (-1,)}, r"lora_layers must be .*, not \(-1,\)"),
        (
            {"lora_rank_pattern": {"q_proj": 0}},
            r"lora_rank_pattern\['q_proj'\] must be an integer >= 1, not 0",
        ),
        ({"lora_rank_pattern": {"(": 4}}, r"lora_rank_pattern '\(' is no regular expression"),
        ({"lora_alpha_pattern": {"q": -1.0}}, r"lora_alpha_pattern\['q'\] must be a number > 0, not -1.0"),
        ({"batch_size": 8, "micro_batches": 3}, "micro_batches=3 must divide batch_size=8"),
        ({"batch_size": 6, "mesh": MeshConfig(data=2, fsdp=2)}, "6 windows at a time, which 4 devices"),
        ({"mesh": MeshConfig(sequence=3)}, "context=64 must be a multiple of the mesh's sequence=3"),
        ({"epochs": 2.0, "steps": 10}, "epochs=2.0 and steps=10 say the same in two ways; give one of them"),
        (
            {"group_size": 16, "group_ratio": 0.5},
            "group_ratio=0.5 and group_size=16 say the same in two ways; give one of them",
        ),
        ({"attention": "full", "group_ratio": 0.25}, "group_ratio=0.25 is for attention='shifted'"),
        ({"epochs": 2.0, "steps": 1000}, "epochs=2.0 and steps=1000 say the same"),  # the default, but given
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio=0.1 and warmup_steps=5 say the same"),
        ({"warmup_ratio": 0.1, "warmup_steps": 20}, "warmup_ratio=0.1 and warmup_steps=20 say the same"),
        ({"schedule": "cosine", "warmup_steps": 1000}, "warmup_steps=1000 must be less than steps=1000"),
        ({"schedule": "cosine", "steps": 20}, "warmup_steps=20 must be less than steps=20"),
        ({"eval_every": 5}, "eval_every=5 is for a run with eval_data, and none is given"),
        ({"patience": 5}, "patience=5 is for a run with eval_data"),
        ({"export_last": True}, "export_last=True is for a run with eval_data"),
        ({"eval_data": ("a",), "eval_every": 0}, "eval_every must be an integer >= 1"),
        ({"eval_data": ("a",), "patience": 0}, "patience must be an integer >= 1"),
    ],
)
def test_settings_that_do_not_fit_one_another(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("field", ["lora_targets", "modules_to_save"])
def test_one_name_is_not_taken_for_its_letters(field):
    jaxtyping.config.update("jaxtyping_disable", True)  # only tests check types
    try:
        with pytest.raises(ValueError, match=f"{field} must be a tuple of names, not the string 'norm'"):
            dataclasses.replace(CONFIG, **{field: "norm"})
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_settings_of_lora_on_the_command_line():
    options = "--model base --data text --output out --context 64 --rslora --lora-layers 0 2"
    options += " --lora-rank-pattern down_proj 16 layers.0.* 4 --lora-alpha-pattern q_proj 8"
    options += " --lora-targets all-linear lm_head --modules-to-save norm lm_head"
    config = parse(FinetuneConfig, "finetune", [*options.split()])
    assert config.rslora and config.lora_layers == (0, 2)
    assert config.lora_rank_pattern == {"down_proj": 16, "layers.0.*": 4}
    assert config.lora_alpha_pattern == {"q_proj": 8.0}
    assert config.lora_targets == ("all-linear", "lm_head")
    assert config.modules_to_save == ("norm", "lm_head")


def test_each_kind_of_attention_becomes_its_pattern(tmp_path):
    model = LlamaConfig.tiny(
        vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    scores = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    HeadPattern(scores).save(tmp_path / "heads.tsv")
    full, streams = jsparse.causal(), jsparse.streaming(128, 256)
    plain, shifted = jsparse.shifted_groups(16, 0), jsparse.shifted_groups(16, 8)
    expected = {
        "full": [(full, full)] * 3,
        "shifted": [(plain, shifted)] * 3,
        "grouped": [(plain, plain)] * 3,
        "longgen": [(streams, streams), (full, full), (streams, streams)],
        "streaming": [(streams, full)] * 3,
    }
    for attention, layers in expected.items():
        config = dataclasses.replace(
            CONFIG,
            attention=attention,
            head_pattern=tmp_path / "heads.tsv" if attention == "streaming" else None,
        )
        assert list(config.pattern(model).layers) == layers
    strided = dataclasses.replace(CONFIG, attention="longgen", stride=8, full_layers=(0,)).pattern(model)
    assert strided.layers[0] == (full, full)
    assert strided.layers[2] == (StridedBlocks(block=128, window=2, stride=8),) * 2


def test_learning_rate_rises_then_stays_or_falls_to_a_tenth():
    config = dataclasses.replace(CONFIG, learning_rate=1.0, warmup_steps=4, steps=14)
    constant = [config.learning_rate_at(step) for step in range(14)]
    np.testing.assert_allclose(constant, [0.25, 0.5, 0.75, 1.0] + [1.0] * 10)

    falling = dataclasses.replace(config, schedule="cosine")
    expected = [0.1 + 0.9 * (1 + np.cos(np.pi * step / 10)) / 2 for step in range(11)]
    np.testing.assert_allclose(
        [falling.learning_rate_at(4 + step) for step in range(11)], expected, rtol=1e-5
    )

    straight = dataclasses.replace(config, schedule="linear")
    np.testing.assert_allclose(
        [straight.learning_rate_at(4 + step) for step in range(11)], 1 - 0.9 * np.arange(11) / 10, rtol=1e-5
    )

    assert dataclasses.replace(config, warmup_steps=0).learning_rate_at(0) == 1.0
    with pytest.raises(ValueError, match="warmup_steps=4 must be less than steps=4"):
        dataclasses.replace(config, schedule="cosine", steps=4)


def test_the_learning_rate_depends_on_what_is_trained_unless_it_is_given():
    def rates(**changes):
        config = dataclasses.replace(CONFIG, warmup_steps=0, **changes)
        known = config.for_model(LlamaConfig.tiny())
        assert known.learning_rate == known.peak_learning_rate == config.peak_learning_rate
        assert config.learning_rate_at(0) == pytest.approx(known.learning_rate)
        return known.learning_rate

    assert (rates(), rates(train_embeddings_and_norms=False)) == (2e-4, 2e-4)
    assert rates(lora_rank=None) == 2e-5
    assert rates(learning_rate=0.5) == rates(learning_rate=0.5, lora_rank=None) == 0.5


def test_the_optimizer_clips_and_decays_matrices_only():
    config = dataclasses.replace(CONFIG, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    optimizer = config.optimizer()
    params = {"matrix": np.ones((2, 2), np.float32), "norm": np.ones(2, np.float32)}
    zero = {name: np.zeros_like(value) for name, value in params.items()}
    updates: Any = optimizer.update(zero, optimizer.init(params), params)[0]
    np.testing.assert_allclose(updates["matrix"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["norm"], 0.0)

    # A gradient of norm 20 is scaled to 1; Adam's averages after one step are (1 - b1) g and (1 - b2) g².
    large = {"matrix": np.full((2, 2), 10.0, np.float32), "norm": np.zeros(2, np.float32)}
    state: Any = optimizer.update(large, optimizer.init(params), params)[1]
    adam = state[1][0]
    np.testing.assert_allclose(adam.mu["matrix"], 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(adam.nu["matrix"], 0.05 * 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "windows", "steps", "warmup"),
    [
        ({}, 100, 1000, 20),  # as they are
        ({"epochs": 3.0}, 100, 38, 20),  # 300 windows in batches of 8
        ({"epochs": 0.5}, 100, 7, 20),
        ({"epochs": 0.29}, 8 * 100, 29, 20),  # 0.29 * 100 is 28.99...
        ({"epochs": 1.1}, 8 * 10, 11, 20),  # and 1.1 * 10 is 11.00...02
        ({"epochs": 1e-9}, 3, 1, 20),
        ({"warmup_ratio": 0.03}, 100, 1000, 30),
        ({"epochs": 3.0, "warmup_ratio": 0.1}, 100, 38, 4),
        ({"warmup_ratio": 0.1, "steps": 30}, 100, 30, 3),  # 0.1 * 30 is 3.00...04
        ({"warmup_ratio": 0.1, "steps": 1, "schedule": "cosine"}, 100, 1, 0),
        ({"warmup_ratio": 0.0, "steps": 10, "schedule": "cosine"}, 100, 10, 0),
    ],
)
def test_epochs_and_ratios_become_steps(settings, windows, steps, warmup):
    config = dataclasses.replace(CONFIG, **settings)
    config.optimizer()  # a plan makes it without windows
    resolved = config.for_windows(windows)
    assert (resolved.steps, resolved.warmup_steps) == (steps, warmup)
    assert resolved.epochs is None and resolved.warmup_ratio is None
    assert resolved.for_windows(17) == resolved
    as_given = {name: value for name, value in settings.items() if name in ("steps", "schedule")}
    assert resolved == dataclasses.replace(CONFIG, **as_given | {"steps": steps, "warmup_steps": warmup})


def test_a_warm_up_that_is_longer_than_the_epochs_is_refused_once_their_steps_are_known():
    config = dataclasses.replace(CONFIG, epochs=1.0, schedule="cosine", warmup_steps=50)
    config.optimizer()
    assert config.for_windows(8 * 51).steps == 51
    with pytest.raises(ValueError, match="warmup_steps=50 must be less than steps=50"):
        config.for_windows(8 * 50)


@pytest.mark.parametrize("field", ["data", "eval_data"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "{} has an empty name; the current folder is '.'"),
        ("https://here.org/a.jsonl", "{}=https://here.org/a.jsonl is an address; download it"),
    ],
)
def test_names_that_a_path_would_change(field, name, why):
    for names in (name, ["a.txt", name]):
        settings: dict[str, Any] = {"model": "a", "data": "b", "output": "c", "context": 32}
        settings[field] = names
        with pytest.raises(ValueError, match="^" + re.escape(why.format(field))):
            FinetuneConfig(**settings)
