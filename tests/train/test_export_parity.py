"""transformers reads an exported folder: tokenizer and settings as the base's, and the model as ours."""

import json

import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, byte_tokenizer
from jsparse.train import FinetuneConfig, MergeConfig, finetune, merge

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers, from the extra `parity`"
)

transformers.utils.logging.disable_progress_bar()

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
GENERATION = {
    "bos_token_id": 7,
    "do_sample": True,
    "eos_token_id": 256,
    "pad_token_id": 255,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
}
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|eot|>",
    "model_max_length": 64,
    "clean_up_tokenization_spaces": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and what is exported from it."""
    folder = tmp_path_factory.mktemp("export")
    base = folder / "base"
    Llama(LlamaConfig.tiny(vocab_size=258, eos_token_ids=(256,)), rngs=nnx.Rngs(0)).save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|eot|>"])  # 257
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("rag" + TEMPLATE)
    data = folder / "text.txt"
    data.write_text("some words in a line\n" * 40)
    finetune(
        FinetuneConfig(
            model=base, data=[data], output=folder / "run", context=128, steps=1, batch_size=1, lora_rank=1
        ),
        progress=False,
    )
    merge(MergeConfig(run=folder / "run", output=folder / "adapter", adapter=True))
    merge(MergeConfig(run=folder / "adapter", output=folder / "merged"))
    return base, (folder / "run", folder / "merged")


def test_tokenizer_and_templates(folders):
    base, exported = folders
    expected = transformers.AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "Héllo <|eot|>"}]
    for folder in exported:
        found = transformers.AutoTokenizer.from_pretrained(folder)
        assert found.get_vocab() == expected.get_vocab()
        assert found.special_tokens_map == expected.special_tokens_map
        assert found("Héllo <|eot|>")["input_ids"] == expected("Héllo <|eot|>")["input_ids"]
        assert found.model_max_length == 64
        for options in ({}, {"chat_template": "rag"}):
            rendered = found.apply_chat_template(messages, tokenize=False, **options)
            assert rendered == expected.apply_chat_template(messages, tokenize=False, **options)
            assert rendered.endswith("<|user|>Héllo <|eot|>")


def test_settings_of_generation(folders):
    base, exported = folders
    expected = transformers.GenerationConfig.from_pretrained(base).to_dict()
    for folder in exported:
        found = transformers.GenerationConfig.from_pretrained(folder).to_dict()
        assert found == expected | {"eos_token_id": [256, 257]}


def test_config_and_model(folders):
    _, exported = folders
    tokens = np.random.default_rng(0).integers(0, 257, (2, 100)).astype(np.int32)
    for folder in exported:
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.max_position_embeddings == 128 and config.rope_parameters["factor"] == 2.0
        assert config.eos_token_id == [256, 257]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert theirs.generation_config.temperature == 0.6
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        np.testing.assert_allclose(Llama.from_pretrained(folder)(tokens), expected, atol=1e-4)
