"""Folders with a small tokenizer and a chat template, as a checkpoint has them."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
TEXT = """Hello, what is the weather in Paris? The user, the assistant, the system and a tool.
<a> [b] {c} | d: 1, 2.

"""


@pytest.fixture
def save_chat_model():
    """``save(folder, template, special, ...)`` writes tokenizer.json, tokenizer_config.json and the template.

    - template: a name in tests/data/chat_templates, or a template.
    - special: the special tokens; the first is ``bos_token``, the second ``eos_token``.
    - others: added tokens that are not special.
    - spaces: as SentencePiece writes them, with one before the first word; otherwise bytes.
    - rstrip: whether special tokens take the space after them.
    """

    def save(folder, template, special, *, others=(), spaces=False, rstrip=False) -> Path:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        if spaces:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        alphabet = [chr(n) for n in range(32, 127)] if spaces else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=alphabet, special_tokens=["<unk>"], show_progress=False
        )
        tokenizer.train_from_iterator([TEXT] * 3, trainer)
        tokenizer.add_special_tokens([AddedToken(t, rstrip=rstrip, normalized=False) for t in special])
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in others])
        folder = Path(folder)
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[1],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        path = TEMPLATES / f"{template}.jinja"
        source = path.read_text(encoding="utf-8") if "{" not in template else template
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        return folder

    return save
