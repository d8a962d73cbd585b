"""Nothing from a checkpoint is executed: what is opened and run while one is loaded and talked to."""

import json
import os
import pickle
import subprocess
import sys

from flax import nnx

from jsparse.models import Llama, LlamaConfig, byte_tokenizer

LOAD = """
import json, sys
folder = sys.argv[1]
import jsparse.models, jsparse.serve
from jsparse.models import Llama, load_chat_template, load_config, load_tokenizer
from jsparse.serve import generate, generation_defaults

seen = []
def watch(event, arguments):
    if event.startswith(("os.system", "os.exec", "os.posix_spawn", "subprocess", "pickle", "socket")):
        seen.append([event, str(arguments)])
    elif event == "open" and str(arguments[0]).startswith(folder):
        seen.append([event, str(arguments[0])[len(folder) + 1:]])
    elif event in ("exec", "compile") and folder in str(arguments):
        seen.append([event, str(arguments)])

sys.addaudithook(watch)
config, tokenizer, model = load_config(folder), load_tokenizer(folder), Llama.from_pretrained(folder)
generation_defaults(folder)
answers = []
for name in ("default", "hostile"):
    try:
        answers.append(load_chat_template(folder).render([{"role": "user", "content": "hi"}], name=name))
    except ValueError as error:
        answers.append("refused: " + str(error))
generate(model, [[1, 2]], 2)
print(json.dumps([seen, answers]))
"""


class Runs:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_from_a_checkpoint_runs(tmp_path):
    folder, proof = tmp_path / "model", tmp_path / "it-ran"
    Llama(LlamaConfig.tiny(), rngs=nnx.Rngs(0)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for name in ("pytorch_model.bin", "tokenizer.pkl", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Runs(f"touch {proof}")))
    for name in ("configuration_evil.py", "modeling_evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(proof)!r}, 'w')\n")
    hostile = "{{ cycler.__init__.__globals__.os.system('touch " + str(proof) + "') }}"
    templates = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "hostile", "template": hostile},
    ]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": templates, "auto_map": auto_map})
    )

    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True
    )
    seen, answers = json.loads(done.stdout)
    assert answers[0] == "hi" and answers[1].startswith("refused: ") and "__init__" in answers[1]
    assert {event for event, _ in seen} == {"open"}
    opened = {name for _, name in seen}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= opened
    assert not [name for name in opened if not name.endswith((".json", ".safetensors"))]
    assert not proof.exists()
