"""Whole runs of each kind of attention and of trained set: what is saved says what was done."""

import numpy as np
import pytest

import jsparse
from jsparse.models import Llama
from jsparse.models.patterns import StridedBlocks
from jsparse.train import FinetuneConfig, MergeConfig, finetune, load_pattern, merge


@pytest.fixture(scope="module")
def small(save_checkpoint, tmp_path_factory):
    return save_checkpoint(
        tmp_path_factory.mktemp("kinds") / "small", num_hidden_layers=1, hidden_size=64, intermediate_size=64
    )


def run(small, text, output, **settings):
    config = FinetuneConfig(
        model=small, data=text, output=output, steps=2, batch_size=1, learning_rate=1e-2, **settings
    )
    result = finetune(config, progress=False)
    assert result.finished and all(np.isfinite(result.losses)) and len(result.losses) == 2
    return config


STREAMS = jsparse.streaming(4, 8)


@pytest.mark.parametrize(
    ("settings", "rules"),
    [
        # Strided blocks are lists, not token masks; in full_layers there are none here.
        (
            {"attention": "longgen", "stride": 2, "window": 128, "full_layers": (), "context": 384},
            (StridedBlocks(block=128, window=1, stride=2),) * 4,
        ),
        pytest.param(
            {"attention": "longgen", "sink": 4, "window": 8, "full_layers": (), "context": 64},
            (STREAMS,) * 4,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"attention": "streaming", "sink": 4, "window": 8, "head_pattern": "heads.tsv", "context": 64},
            (STREAMS, STREAMS, jsparse.causal(), jsparse.causal()),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"attention": "grouped", "group_ratio": 0.5, "context": 64},
            (jsparse.shifted_groups(32, 0),) * 4,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["strided", "sink and window", "streaming heads", "groups"],
)
def test_the_pattern_is_kept_with_the_model(small, text, tmp_path, settings, rules):
    if "head_pattern" in settings:
        jsparse.HeadPattern([[0.1, 0.9]]).save(tmp_path / "heads.tsv")
        settings = settings | {"head_pattern": tmp_path / "heads.tsv"}
    config = run(small, text, tmp_path / "output", **settings)
    assert load_pattern(config.output_folder).layers == (rules,)
    assert Llama.from_pretrained(config.output).config.max_position_embeddings == settings["context"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_frozen_base_of_few_bits_is_merged_as_it_was_trained(small, text, tmp_path, bits):
    pytest.importorskip("qwix", reason="needs the extra qlora")
    config = run(small, text, tmp_path / "output", context=64, base_bits=bits, micro_batches=1)
    before, after = Llama.from_pretrained(small), Llama.from_pretrained(config.output)
    kernels = [model.layers[0].mlp.up_proj.kernel[...] for model in (before, after)]  # without an adapter
    difference = np.linalg.norm(kernels[0] - kernels[1]) / np.linalg.norm(kernels[0])
    assert 0 < difference < {4: 0.12, 8: 0.01}[bits]
    merge(MergeConfig(run=config.output, output=tmp_path / "merged"))
    merged = Llama.from_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(
        merged.layers[0].self_attn.q_proj.kernel[...], after.layers[0].self_attn.q_proj.kernel[...]
    )
