"""Adapters that PEFT wrote, merged by weight: PEFT's own sum of them gives the same model."""

import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig
from jsparse.models.merge_adapters import merge_adapters

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers, from the extra `parity`"
)
peft = pytest.importorskip("peft", reason="the oracle needs peft, from the extra `parity`")

transformers.utils.logging.disable_progress_bar()
# PEFT asks transformers in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

CONFIG = LlamaConfig.tiny(vocab_size=61, intermediate_size=48, initializer_range=0.2, eos_token_ids=(2,))
SETTINGS = (
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]},
)


def make_theirs(base, adapter, seed, **fields):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    peft.get_peft_model(model, config).save_pretrained(adapter)


def named(model):
    """Our kernels, by their names in transformers."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    found = {".".join(map(str, path[:-1])): np.asarray(parameter[...]) for path, parameter in parameters}
    return {
        name if name == "lm_head" else f"model.{name}": array.T if array.ndim == 2 else array
        for name, array in found.items()
        if name != "embed_tokens"
    }


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.5), (2.0, 0.5)])
def test_the_sum_is_pefts(weights, tmp_path):
    Llama(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "base")
    for number, fields in enumerate(SETTINGS):
        make_theirs(tmp_path / "base", tmp_path / str(number), number, **fields)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "0", adapter_name="0")
    theirs.load_adapter(tmp_path / "1", adapter_name="1")
    theirs.add_weighted_adapter(["0", "1"], list(weights), "sum", combination_type="cat")
    theirs.set_adapter("sum")
    merged = {
        name.removesuffix(".weight"): tensor.numpy()
        for name, tensor in theirs.merge_and_unload().state_dict().items()
    }
    model = Llama.from_pretrained(tmp_path / "base")
    base = named(model)
    merge_adapters(model, [(tmp_path / "0", weights[0]), (tmp_path / "1", weights[1])])
    for name, array in named(model).items():
        np.testing.assert_allclose(array, merged[name], rtol=0, atol=1e-5, err_msg=name)
    changed = "model.layers.0.self_attn.q_proj"
    assert np.abs(merged[changed] - base[changed]).max() > 0.1
