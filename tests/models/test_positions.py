"""How long a model is: readings of real configs, and what every door makes of them."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, RopeConfig, byte_tokenizer, load_config
from jsparse.models import positions as positions_room
from jsparse.models.positions import Positions, check_length, positions_of
from jsparse.serve import generate
from jsparse.train import FinetuneConfig, finetune
from jsparse.train.start import extended_config

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LINEAR = {"type": "linear", "factor": 8.0}


def from_hf(**fields):
    return LlamaConfig.from_hf(SIZES | fields)


@pytest.fixture
def notes(caplog):
    """The notes that are logged; those that an earlier test had logged come again."""
    positions_room.note.cache_clear()
    caplog.set_level(logging.WARNING, logger="jsparse")
    return caplog


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # LongLoRA's own: the base's length, and the factor on top or within
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR}, (4096, 32768)),
        # Together's: within, which nothing in the file says
        ({"max_position_embeddings": 32768, "rope_scaling": LINEAR}, (32768, 262144)),
        # Vicuna's and LongChat's say it
        (
            {
                "max_position_embeddings": 4096,
                "max_sequence_length": 16384,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            (16384, 16384),
        ),
        # a length left over from the base decides nothing
        (
            {"max_position_embeddings": 4096, "max_sequence_length": 2048, "rope_scaling": LINEAR},
            (4096, 32768),
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 1.0}}, (4096, 4096)),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.5}}, (4096, 10240)),
        # Qwen's recipe sets the factor alone, NousResearch's files include it
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            (131072, 131072),
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 32.0,
                    "original_max_position_embeddings": 4096,
                    "finetuned": True,
                },
            },
            (131072, 131072),
        ),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            (131072, 131072),
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            (131072, 131072),
        ),
        ({"max_position_embeddings": 2048}, (2048, 2048)),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 1010000,
                "num_key_value_heads": 4,
                "dual_chunk_attention_config": {
                    "chunk_size": 262144,
                    "local_size": 8192,
                    "original_max_position_embeddings": 262144,
                },
            },
            (262144, 262144),
        ),
    ],
)
def test_published_configs(fields, expected):
    config = from_hf(**fields)
    assert dataclasses.astuple(positions_of(config)) == expected
    assert positions_of(LlamaConfig.from_hf(config.to_hf())) == Positions(*expected)


def test_dual_chunk_attention_needs_its_original_length():
    with pytest.raises(ValueError, match="dual_chunk_attention_config.*original_max_position_embeddings"):
        from_hf(dual_chunk_attention_config={"chunk_size": 8})


def test_a_condense_ratio_must_say_what_the_rope_says():
    from_hf(rope_condense_ratio=8, rope_scaling=LINEAR)
    with pytest.raises(ValueError, match='rope_condense_ratio=4.*factor 8.0.*"factor": 4'):
        from_hf(rope_condense_ratio=4, rope_scaling=LINEAR)
    with pytest.raises(ValueError, match='rope_condense_ratio=8.*set rope_scaling to .*"linear"'):
        from_hf(rope_condense_ratio=8)


def test_what_the_larger_reading_covers_changes_no_factor():
    config = from_hf(max_position_embeddings=64, rope_scaling=LINEAR)
    assert config.extend_context(512) is config
    with pytest.raises(ValueError, match=r"length=513.*512 positions.*--positions.*64 if.*512 if"):
        config.extend_context(513)
    within, on_top = (config.extend_context(1024, positions=positions) for positions in (64, 512))
    assert (within.rope.factor, positions_of(within)) == (128.0, Positions(1024, 1024))
    assert (on_top.rope.factor, positions_of(on_top)) == (16.0, Positions(1024, 1024))
    assert positions_of(config.extend_context(256, positions=512)) == Positions(512, 512)
    with pytest.raises(ValueError, match="positions=1000.*from 64 to 512"):
        config.extend_context(2000, positions=1000)
    with pytest.raises(ValueError, match="positions=100.*2048 or None"):
        LlamaConfig(**SIZES).extend_context(4096, positions=100)


def test_what_we_extend_leaves_nothing_open(tmp_path):
    extended = LlamaConfig.tiny(max_position_embeddings=64).extend_context(256)
    Llama(extended, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    stored = load_config(tmp_path)
    assert positions_of(stored) == Positions(256, 256)
    assert stored.extend_context(512).rope.factor == 8.0


def test_yarn_counts_from_its_original_length():
    config = from_hf(
        max_position_embeddings=64,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    )
    assert config.extend_context(256) is config
    longer = config.extend_context(512)
    assert (longer.rope.factor, longer.max_position_embeddings) == (8.0, 512)


def test_a_length_is_checked_with_a_note_where_readings_differ(notes):
    config = from_hf(max_position_embeddings=64, rope_scaling=LINEAR)
    check_length(config, 64, "64 tokens", "shorten")
    assert not notes.messages
    for _ in range(2):  # said once
        check_length(config, 100, "100 tokens", "shorten")
    assert notes.messages == [
        "note: 100 tokens: more than 64, but within the model's 512 positions "
        "(max_position_embeddings=64 x linear factor 8)"
    ]
    with pytest.raises(ValueError, match=r"^513 tokens: more than the model's 512 positions.*; shorten$"):
        check_length(config, 513, "513 tokens", "shorten")


@pytest.mark.parametrize(
    ("rope", "has"),
    [
        (RopeConfig(kind="linear", factor=8.0), 512),
        (RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64), 256),
    ],
)
def test_training_at_the_length_a_model_has_leaves_its_rope(tmp_path, notes, rope, has):
    config = LlamaConfig.tiny(max_position_embeddings=64, rope=rope, initializer_range=0.3)
    model = Llama(config, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save(str(tmp_path / "base/tokenizer.json"))
    (tmp_path / "text.txt").write_text("some words in a line\n" * 100)
    finetune(
        FinetuneConfig(
            model=tmp_path / "base",
            data=[tmp_path / "text.txt"],
            output=tmp_path / "out",
            context=has,
            steps=1,
            batch_size=1,
            learning_rate=1e-12,
            warmup_steps=0,
        ),
        progress=False,
    )
    after = Llama.from_pretrained(tmp_path / "out")
    assert after.config.rope == rope
    tokens = np.arange(200, dtype=np.int32)[None] % 256
    np.testing.assert_allclose(np.asarray(model(tokens)), np.asarray(after(tokens)), atol=1e-5)
    assert any("RoPE stays as it is" in note for note in notes.messages) == (rope.kind == "linear")
    assert generate(after, [[1] * 100], 4).finish_reasons == ["length"]
    with pytest.raises(ValueError, match=f"more than the model's {has} positions \\("):
        generate(after, [[1] * has], 4)


def test_fine_tuning_beyond_both_readings_needs_to_be_told():
    config = from_hf(max_position_embeddings=64, rope_scaling=LINEAR)
    run = FinetuneConfig(model="a", data=["b"], output="c", context=1024)
    with pytest.raises(ValueError, match="--positions"):
        extended_config(run, config)
    told = dataclasses.replace(run, positions=512)
    assert extended_config(told, config).rope.factor == 16.0


def test_evaluation_says_when_it_goes_beyond(notes):
    positions_room.note_length(LlamaConfig.tiny(), 65)
    assert "65 tokens are more than the model's max_position_embeddings=64" in notes.messages[0]


def test_dual_chunk_attention_is_for_an_ordinary_rope():
    """Else the limit would be lost: YaRN does not count from max_position_embeddings."""
    with pytest.raises(ValueError, match="dual_chunk_attention_config beside a RoPE of type 'linear'"):
        from_hf(dual_chunk_attention_config={"original_max_position_embeddings": 64}, rope_scaling=LINEAR)
