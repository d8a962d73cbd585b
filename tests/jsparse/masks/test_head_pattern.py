"""Head patterns: the file, the cut, and what is refused."""

import numpy as np
import pytest

from jsparse.masks.head_pattern import HeadPattern, learned_sizes
from jsparse.serve.options import CacheOptions


def test_threshold_takes_the_lowest_scores_of_the_whole_model():
    pattern = HeadPattern([[0.9, 0.8, 0.7], [0.1, 0.2, 0.95]])
    assert pattern.threshold(0.5).tolist() == [[False, False, True], [True, True, False]]
    assert not pattern.threshold(0).any()
    assert pattern.threshold(1).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.74, 1.0])
def test_the_count_is_exact_with_and_without_ties(sparsity):
    rng = np.random.default_rng(0)
    for scores in (rng.random((32, 8)), np.full((32, 8), 0.5), rng.integers(0, 3, (32, 8)) / 2):
        assert HeadPattern(scores).threshold(sparsity).sum() == round(sparsity * 256)


def test_ties_stream_in_order_of_layer_and_head():
    assert HeadPattern(np.zeros((2, 2))).threshold(0.75).tolist() == [[True, True], [True, False]]


def test_scores_are_clipped_before_the_cut():
    # -0.3 and 0 are equal once clipped, as are 1.7 and 1: order decides.
    assert HeadPattern([[0.0, -0.3]]).threshold(0.5).tolist() == [[True, False]]
    assert HeadPattern([[1.0, 1.7, 0.9]]).threshold(2 / 3).tolist() == [[True, False, True]]


def test_save_and_load_keep_every_bit(tmp_path):
    scores = np.random.default_rng(0).normal(size=(4, 3))
    HeadPattern(scores).save(tmp_path / "full_attention_heads.tsv")
    assert np.array_equal(HeadPattern.load(tmp_path / "full_attention_heads.tsv").scores, scores)


def test_duo_attentions_number_format_loads(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    np.savetxt(path, [[1.0, 0.25], [-0.01, 0.5]], delimiter="\t")  # as DuoAttention writes it
    assert HeadPattern.load(path).scores.tolist() == [[1.0, 0.25], [-0.01, 0.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t0\n1\n", "line 2: 1 KV heads, but the first line has 2"),
        ("1\t0\n1\tmuch\n", "line 2: 'much' is not a finite number"),
        ("1\tnan\n", "line 1: 'nan' is not a finite number"),
        ("1\tinf\n", "line 1: 'inf' is not a finite number"),
        ("0.5\t1\n37\t0\n", "line 2: '37' is not a gate; gates lie in"),
        ("1 2\n", "line 1: '1 2' is not a finite number"),
        ("", "empty"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        HeadPattern.load(path)
    assert "heads.tsv" in str(error.value)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="heads.tsv"):
        HeadPattern.load(tmp_path / "heads.tsv")


@pytest.mark.parametrize("scores", [[1.0, 2.0], np.zeros((0, 2)), np.zeros((1, 2, 3))])
def test_scores_must_be_a_table(scores):
    with pytest.raises(ValueError, match="layers, kv_heads"):
        HeadPattern(scores)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="layer 1, KV head 0 is nan"):
        HeadPattern([[1.0, 2.0], [np.nan, 0.0]])


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), True])
def test_sparsity_must_be_a_fraction(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        HeadPattern([[1.0]]).threshold(sparsity)


def test_a_folder_as_duo_attention_publishes_it(tmp_path):
    pattern = HeadPattern([[0.1, 0.9], [1.0, 0.0]])
    pattern.save(tmp_path / "full_attention_heads.tsv")
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 512, "lr": 0.02}')
    np.testing.assert_array_equal(HeadPattern.load(tmp_path).scores, pattern.scores)
    assert learned_sizes(tmp_path) == {"sink": 64, "window": 512}
    options = CacheOptions(pattern=tmp_path)
    assert (options.cache().sink, options.cache().window) == (64, 512)
    assert CacheOptions(pattern=tmp_path, sink=32).cache().sink == 32
    assert CacheOptions(pattern=tmp_path / "full_attention_heads.tsv").cache().window == 256
    (tmp_path / "config.json").write_text('{"sink_size": "64"}')
    with pytest.raises(ValueError, match="config.json: the sink must be an integer >= 0, not '64'"):
        learned_sizes(tmp_path)
    (tmp_path / "full_attention_heads.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="full_attention_heads.tsv"):
        HeadPattern.load(tmp_path)
