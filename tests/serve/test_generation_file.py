"""The sampling of a generation_config.json, and what of it cannot be followed."""

import json

import pytest

from jsparse.serve import SamplingParams, generation_defaults


def defaults_of(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return generation_defaults(folder)


def test_without_a_file_generation_is_greedy(tmp_path):
    assert generation_defaults(tmp_path) == (SamplingParams(), None, ())


def test_the_file_of_an_instruct_model(tmp_path):
    """Llama 3's own fields."""
    found = defaults_of(
        tmp_path,
        bos_token_id=128000,
        do_sample=True,
        eos_token_id=[128001, 128008, 128009],
        temperature=0.6,
        top_p=0.9,
        transformers_version="4.40.0",
    )
    assert found == (SamplingParams(temperature=0.6, top_p=0.9), None, ())


def test_what_sampling_alone_needs_counts_with_do_sample_only(tmp_path):
    fields = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    assert defaults_of(tmp_path, **fields).sampling == SamplingParams(repetition_penalty=1.05)
    assert defaults_of(tmp_path, do_sample=False, **fields).sampling.temperature == 0
    assert defaults_of(tmp_path, do_sample=True, **fields).sampling == SamplingParams(**fields)


def test_fields_that_are_not_given_restrict_nothing(tmp_path):
    found = defaults_of(tmp_path, do_sample=True, top_k=None, max_new_tokens=200, min_new_tokens=3)
    assert found == (SamplingParams(temperature=1.0, min_tokens=3), 200, ())
    assert defaults_of(tmp_path, stop_strings="###").sampling.stop == ("###",)


def test_what_is_not_followed_is_named(tmp_path):
    found = defaults_of(
        tmp_path, num_beams=4, no_repeat_ngram_size=3, bad_words_ids=[[5]], typical_p=1.0, suppress_tokens=[]
    )
    assert found.notes == (
        "bad_words_ids=[[5]] of generation_config.json is not followed",
        "no_repeat_ngram_size=3 of generation_config.json is not followed",
        "num_beams=4 of generation_config.json is not followed",
    )
    assert not defaults_of(tmp_path, typical_p=0.9).notes  # which only sampling would need
    found = defaults_of(tmp_path, typical_p=0.9, do_sample=True)
    assert found.notes == ("typical_p=0.9 of generation_config.json is not followed",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"do_sample": True, "temperature": "1"}, "temperature must be 0"),
        ({"do_sample": True, "top_p": 2}, r"top_p must be a number in \(0, 1\], not 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, not 0"),
    ],
)
def test_values_out_of_range_name_the_file(unchecked_types, tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
        defaults_of(tmp_path, **fields)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json cannot be read"):
        generation_defaults(tmp_path)
