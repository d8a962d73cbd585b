"""What finetune refuses before it writes anything."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from jsparse.models import Llama, MeshConfig
from jsparse.train import FinetuneConfig, finetune


@pytest.fixture
def config(base, text, tmp_path):
    return FinetuneConfig(model=base, data=text, output=tmp_path / "output", context=64, steps=1)


def check_refused(config, error, message):
    with pytest.raises(error, match=message):
        finetune(config, progress=False)
    assert not config.output.exists()


def test_data_that_cannot_be_used(config, tmp_path):
    check_refused(dataclasses.replace(config, data=(tmp_path / "no.txt",)), FileNotFoundError, "no.txt")
    (tmp_path / "short.txt").write_text("short")
    check_refused(
        dataclasses.replace(config, data=(tmp_path / "short.txt",)), ValueError, "6 tokens .* context=64"
    )


def test_two_shapes_in_one_file(config, tmp_path):
    rows = [{"text": "the cat sat. " * 20}, {"prompt": "who? ", "completion": "the cat"}, {"text": "it ran"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = (
        r"data: .*rows.jsonl holds documents \(from line 1 on\), prompts with completions \(from line 2 "
        r"on\); put rows of one shape in a file of their own"
    )
    check_refused(dataclasses.replace(config, data=(file,)), ValueError, message)


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_an_output_that_a_resumed_run_would_read(config, tmp_path, pattern):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 30)
    inside = dataclasses.replace(config, data=(tmp_path / pattern,))
    check_refused(inside, ValueError, "output=.*output is in data=.* when it is resumed; choose")
    held_out = dataclasses.replace(config, eval_data=(tmp_path / pattern,))
    check_refused(held_out, ValueError, "is in eval_data=")


def test_a_model_that_cannot_be_used(config, tmp_path):
    check_refused(dataclasses.replace(config, model=tmp_path), FileNotFoundError, "config.json")
    other = copy_of(config.model, tmp_path / "other")
    (other / "tokenizer.json").unlink()
    check_refused(dataclasses.replace(config, model=other), FileNotFoundError, "tokenizer.json")


def test_a_tokenizer_of_another_model(config, save_checkpoint, tmp_path):
    other = save_checkpoint(tmp_path / "other", vocab_size=100, eos_token_ids=())
    check_refused(dataclasses.replace(config, model=other), ValueError, "a.txt has token id .* 100 entries")


def test_heads_that_cannot_be_halved(config, tmp_path):
    other = copy_of(
        config.model, tmp_path / "other", num_attention_heads=1, num_key_value_heads=1, head_dim=32
    )
    check_refused(
        dataclasses.replace(config, model=other), ValueError, "num_heads must be at least 2.* not 1"
    )


def test_a_rope_that_does_not_compound(config, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    other = copy_of(config.model, tmp_path / "other", rope_parameters=yarn)
    changes = {"model": other, "rope": "linear"}
    check_refused(dataclasses.replace(config, **changes), NotImplementedError, "yarn")


def test_float16_weights(config, tmp_path):
    other = copy_of(config.model, tmp_path / "other")
    Llama.from_pretrained(config.model, dtype=jnp.float16).save_pretrained(other)
    check_refused(dataclasses.replace(config, model=other), ValueError, "dtype must be float32 or bfloat16")


def test_an_output_that_would_overwrite_something(config, tmp_path):
    model = copy_of(config.model, tmp_path / "model")
    for output in (model, model / "inside"):
        with pytest.raises(ValueError, match="output=.* must not lie in the folder of the model"):
            finetune(dataclasses.replace(config, model=model, output=output), progress=False)
    assert not (model / "inside").exists()

    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file"):
        finetune(dataclasses.replace(config, output=tmp_path / "file"), progress=False)

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files .notes.txt."):
        finetune(dataclasses.replace(config, output=tmp_path / "used"), progress=False)
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def copy_of(model, folder, **changes):
    """A copy of a checkpoint with other fields in its config.json."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_targets_that_match_nothing(config):
    changes = {"lora_targets": ("q_proj", "layers.*.attention.*")}
    check_refused(dataclasses.replace(config, **changes), ValueError, r"layers\.\*\.attention\.\*.*match no")


def test_a_mesh_of_other_devices_than_there_are(config):
    mesh = MeshConfig(fsdp=2, sequence=2)
    changes = {"mesh": mesh, "batch_size": 2}
    check_refused(
        dataclasses.replace(config, **changes),
        ValueError,
        r"mesh is for 4 devices \(fsdp=2, sequence=2\), but there are 1",
    )


def test_a_layer_that_the_model_does_not_have(config):
    changes = {"attention": "longgen", "full_layers": (0, 2)}
    check_refused(dataclasses.replace(config, **changes), ValueError, "full_layers must be .* 0 to 1")
