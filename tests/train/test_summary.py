"""What a run says before its first step is what it then does."""

import dataclasses
import json
import re

import jax
import pytest
from safetensors import safe_open

from jsparse import HeadPattern
from jsparse.models import Llama, LlamaConfig, RopeConfig
from jsparse.train import FinetuneConfig, finetune
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.start import extended_config, load_start
from jsparse.train.summary import count_parameters, summarize


@pytest.fixture
def config(base, text, tmp_path):
    return FinetuneConfig(
        model=base,
        data=text,
        output=tmp_path / "out",
        context=64,
        attention="shifted",
        lora_rank=4,
        steps=5,
        batch_size=2,
        checkpoint_every=3,
    )


def facts_of(err):
    """The named lines of stderr, and what comes after them."""
    lines = err.splitlines()
    named = [line for line in lines if re.match(r"[A-Za-z]+: ", line)]
    return dict(line.split(": ", 1) for line in named), [line for line in lines if line.startswith("step ")]


def test_a_run_says_what_it_is_about_to_do(config, capsys):
    with safe_open(config.model / "model.safetensors", "numpy") as stored:
        parameters = sum(stored.get_tensor(name).size for name in stored.keys())
        tables = sum(
            stored.get_tensor(name).size for name in stored.keys() if "norm" in name or "emb" in name
        )
        projections = [
            stored.get_tensor(name).shape for name in stored.keys() if re.search("[qkvo]_proj", name)
        ]
    trained = tables + sum(4 * sum(shape) for shape in projections)

    finetune(config)
    out, err = capsys.readouterr()
    facts, steps = facts_of(err)
    assert out == "" and err.index("optimizer: ") < err.index("memory: ") < err.index("step 1/5")
    assert facts["model"] == f"{config.model}, {parameters:,} parameters in 2 layers"
    assert facts["trained"] == (
        f"LoRA of rank 4 on q_proj, k_proj, v_proj, o_proj, embeddings and norms: {trained:,} parameters"
    )
    assert facts["context"] == "64 tokens"
    assert facts["RoPE"] == (
        "default, theta 10,000 (max_position_embeddings=32), becomes "
        "linear, factor 2, theta 10,000 (max_position_embeddings=64)"
    )
    assert facts["attention"] == "groups of 16 tokens, half of the heads shifted by 8"
    assert facts["batch"] == "2 windows, 128 tokens per step"
    assert facts["steps"] == "5, 0.62 epochs of 16 windows"  # 982 tokens
    assert facts["optimizer"].startswith(
        "AdamW, learning rate 0.0002 after 20 steps of warm-up, which the run does not reach the end of, then"
    )

    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    for line, shown in zip(lines, steps, strict=True):
        assert shown.startswith(f"step {line['step']}/5: loss {line['loss']:.4f}, ")
    assert facts["time"].endswith("for 5 steps")


@pytest.mark.parametrize(
    ("context", "words", "where"),
    [
        (32, "every head sees all earlier tokens", "within"),
        (64, "groups of 16 tokens, half of the heads shifted by 8", "beyond"),
    ],
)
def test_a_run_says_which_attention_it_takes_if_none_is_given(config, capsys, context, words, where):
    finetune(dataclasses.replace(config, attention=None, context=context, steps=1))
    told = facts_of(capsys.readouterr().err)[0]["attention"]
    assert told == f"{words} (by default: the context is {where} the model's own)"


def test_the_memory_is_that_of_the_compiled_step(config, capsys):
    """The model and the optimizer, which are known, and what the compiler lays out beside them."""
    finetune(dataclasses.replace(config, steps=1))
    memory = facts_of(capsys.readouterr().err)[0]["memory"]
    model = extended_config(config, Llama.from_pretrained(config.model).config)
    state, split = load_start(config, model, mesh=None)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((state, split.frozen)))
    sizes = [float(size) for size in re.findall(r"([\d.]+) MB", memory)]
    assert sizes[1] == round(kept / 1e6, 1)
    assert sizes[0] == pytest.approx(sizes[1] + sizes[2], abs=0.11) and sizes[2] > 0


def test_a_resumed_run_says_so_and_a_finished_one_nothing(config, capsys):
    finetune(dataclasses.replace(config, steps=3), progress=False)
    assert capsys.readouterr() == ("", "")
    finetune(config)
    facts, steps = facts_of(capsys.readouterr().err)
    assert facts["steps"] == "5, 0.62 epochs of 16 windows, going on after step 3"
    assert [line.split(":")[0] for line in steps] == ["step 4/5", "step 5/5"]
    with open_checkpoints(config.output / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == 5
    finetune(config)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"attention": "full"}, "attention", "every head sees all earlier tokens"),
        ({"attention": "grouped", "group_size": 32}, "attention", "groups of 32 tokens"),
        (
            {"attention": "longgen", "sink": 1, "window": 8},
            "attention",
            "layers 1 see all earlier tokens, the others the first 1 token and the last 8",
        ),
        (
            {"attention": "longgen", "full_layers": (0, 2), "stride": 4},
            "attention",
            "layers 0, 2 see all earlier tokens, the others blocks of 128 tokens: the last 2, "
            "and one of every 4",
        ),
        (
            {
                "attention": "streaming",
                "head_pattern": "pattern.tsv",
                "sparsity": 0.5,
                "sink": 2,
                "window": 8,
            },
            "attention",
            "6 of 12 query heads see the first 2 tokens and the last 8, the others all earlier tokens",
        ),
        ({"lora_rank": None}, "trained", "everything: 7 parameters"),
        (
            {
                "lora_rank": 2,
                "lora_targets": ("q_proj",),
                "train_embeddings_and_norms": False,
                "base_bits": 4,
            },
            "trained",
            "LoRA of rank 2 on q_proj (the rest is frozen in 4 bits): 7 parameters",
        ),
        (
            {"micro_batches": 4, "batch_size": 4},
            "batch",
            "4 windows, 256 tokens per step, in 4 parts one after another",
        ),
        (
            {"schedule": "cosine", "warmup_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.1},
            "optimizer",
            "AdamW, learning rate 0.001 after 1 step of warm-up, then falling to a tenth (cosine); "
            "weight decay 0.1, gradients clipped at norm 1",
        ),
    ],
)
def test_other_runs_in_words(config, tmp_path, monkeypatch, changes, name, words):
    monkeypatch.chdir(tmp_path)
    HeadPattern([[0.1, 0.9]] * 3).save("pattern.tsv")
    model = LlamaConfig.tiny(num_hidden_layers=3, max_position_embeddings=64)
    config = dataclasses.replace(config, **changes)
    facts = summarize(config, model, model, config.pattern(model), trained=7, windows=16)
    assert facts[name] == words
    assert facts["RoPE"] == "default, theta 10,000 (max_position_embeddings=64)"


def test_parameters_are_counted_once():
    tied = LlamaConfig.tiny(tie_word_embeddings=True, rope=RopeConfig())
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == tied.vocab_size * tied.hidden_size


def test_the_models_own_windows_are_said(config):
    model = LlamaConfig.tiny(model_type="mistral", sliding_windows=(16, 16), max_position_embeddings=64)
    facts = summarize(config, model, model, config.pattern(model), trained=7, windows=1)
    assert facts["attention"].endswith(", and 2 layers no more than the model's own window of 16")
