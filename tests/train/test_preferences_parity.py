"""The oracle of learning from pairs: trl's DPOTrainer, on the same models and the same pairs."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, byte_tokenizer
from jsparse.texts.reading import Reading
from jsparse.train import FinetuneConfig, write_windows
from jsparse.train.preferences import held_out_preferences
from jsparse.train.start import load_start

trl = pytest.importorskip("trl", reason="the oracle is in the extra `parity`")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

END = 256
ROWS = [
    {"prompt": "the cat ", "chosen": "sat on the mat", "rejected": "ran"},
    {"prompt": "é? ", "chosen": "yes", "rejected": "no, it is not so"},
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
]


def make_model(folder, seed):
    model = Llama(
        LlamaConfig.tiny(vocab_size=257, initializer_range=0.2, eos_token_ids=(END,)), rngs=nnx.Rngs(seed)
    )
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.filterwarnings("ignore")  # trl is younger than the names that it uses
def test_loss_and_rewards_are_those_of_trl(tmp_path):
    before, after = make_model(tmp_path / "before", 0), make_model(tmp_path / "after", 1)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        per_device_eval_batch_size=3,
        use_cpu=True,
        report_to=[],
        max_length=None,
        bf16=False,
    )
    theirs = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        for folder in (after, before)
    ]
    trainer = trl.DPOTrainer(
        model=theirs[0],
        ref_model=theirs[1],
        args=args,
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(after),
    )
    expected = trainer.evaluate()

    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = FinetuneConfig(
        model=before,
        data=[file],
        output=tmp_path / "o",
        context=64,
        lora_rank=None,
        dpo_beta=0.3,
        batch_size=2,
    )
    windows = write_windows(
        [file],
        byte_tokenizer(),
        tmp_path / "windows",
        context=64,
        eos_token_id=END,
        vocab_size=257,
        reading=Reading(pairs=True),
    )
    start, split = load_start(config, Llama.from_pretrained(before).config, mesh=None)
    measure = held_out_preferences(config, split, None, windows, start)
    other = nnx.state(Llama.from_pretrained(after), nnx.Param)
    found = measure(start._replace(params=jax.tree.map(lambda x: x.astype(np.float32), other)))
    assert found["loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["margin"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert found["accuracy"] == pytest.approx(expected["eval_rewards/accuracies"])
