"""The files beside config.json and weights: which are kept, and from where."""

import json

import pytest

from jsparse.models import LlamaConfig, byte_tokenizer
from jsparse.models.checkpoint import generation_fields
from jsparse.models.companions import companions, companions_of_merged, copy_files

KEPT = """
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
tokenizer.model tokenizer.model.v3 tekken.json spiece.model sentencepiece.bpe.model qwen.tiktoken
chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja
additional_chat_templates/rag.jinja generation_config.json LICENSE LICENSE.txt license.md NOTICE USE_POLICY.md
""".split()
LEFT = """
README.md config.json model.safetensors pytorch_model.bin consolidated.00.pth tokenizer.pkl
tokenization_mine.py tokenizer.py original/tokenizer.model original/params.json hf_quant_config.json
additional_chat_templates/run.py model.safetensors.index.json trainer_state.json
""".split()


def write(folder, names, content: str | None = "{}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {folder.name}" if content is None else content)
    return folder


def test_what_is_copied(tmp_path):
    base = write(tmp_path / "base", [*KEPT, *LEFT], content=None)
    copy_files(companions(base), tmp_path / "new" / "copy")
    copied = {
        file.relative_to(tmp_path / "new" / "copy").as_posix(): file.read_text()
        for file in (tmp_path / "new" / "copy").rglob("*")
        if file.is_file()
    }
    assert copied == {name: f"{name} of base" for name in KEPT}


def save_tokenizer(folder, *tokens, **settings):
    folder.mkdir(exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


BASE = """special_tokens_map.json added_tokens.json tokenizer.model chat_template.jinja generation_config.json
LICENSE additional_chat_templates/rag.jinja""".split()


@pytest.mark.parametrize(
    ("tokens", "settings", "own", "expected"),
    [
        # The same tokenizer: all that the adapter lacks.
        ([], {}, [], {*BASE, "tokenizer_config.json"}),
        # Its own settings, which the base's special_tokens_map.json could contradict.
        ([], {"eos_token": "x"}, [], {*BASE} - {"special_tokens_map.json"}),
        # Its own template, in either place.
        (
            [],
            {"chat_template": "x"},
            [],
            {"added_tokens.json", "tokenizer.model", "generation_config.json", "LICENSE"},
        ),
        (
            [],
            {},
            ["chat_template.jinja"],
            {*BASE, "tokenizer_config.json"} - {"chat_template.jinja", "additional_chat_templates/rag.jinja"},
        ),
        # Other tokens: a tokenizer.model would be of another tokenizer.
        (
            ["new"],
            {"eos_token": "x"},
            ["generation_config.json", "LICENSE"],
            {"chat_template.jinja", "additional_chat_templates/rag.jinja", "LICENSE"},
        ),
    ],
)
def test_an_adapter_with_a_tokenizer_of_its_own(tokens, settings, own, expected, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tokenizer(base, pad_token="y")
    write(base, BASE)
    save_tokenizer(adapter, *tokens, **settings)
    write(adapter, own)
    files = companions_of_merged(base, adapter)
    assert {name for name, file in files.items() if base in file.parents} == expected
    assert "tokenizer.json" in files and set(files) == expected | set(companions(adapter))


def test_generation_fields(tmp_path):
    config = LlamaConfig.tiny(bos_token_id=1, eos_token_ids=(2,), pad_token_id=None)
    assert generation_fields(tmp_path, config) == {"bos_token_id": 1, "eos_token_id": 2}
    file = tmp_path / "generation_config.json"
    for given, expected in (
        ({"eos_token_id": 2}, 2),
        ({"eos_token_id": [2]}, [2]),
        ({"eos_token_id": 5}, 2),
        ({"eos_token_id": None}, 2),
        ({}, 2),
    ):
        given = {"bos_token_id": 7, "top_p": 0.9, "custom": {"a": [1]}} | given
        file.write_text(json.dumps(given))
        assert generation_fields(tmp_path, config) == given | {"eos_token_id": expected}
    more = LlamaConfig.tiny(eos_token_ids=(2, 3))
    assert generation_fields(tmp_path, more)["eos_token_id"] == [2, 3]
    assert generation_fields(tmp_path, LlamaConfig.tiny(eos_token_ids=())) == given
    file.write_text('{"eos_token_id": "two"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be an integer"):
        generation_fields(tmp_path, config)
