"""The peers' side of the rows of the CPU benchmark that run a whole model: transformers, and peft's LoRA."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cpu import inputs
from cpu.rows import Sizes, sizes
from cpu.workers import Ready, load, repeated

torch, transformers = load("torch"), load("transformers")


def make(spec: Mapping[str, Any]) -> Ready:
    of, length = sizes(spec["small"]), spec["length"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["folder"], dtype=torch.float32, attn_implementation="sdpa"
    )
    ids = torch.tensor(inputs.tokens(length, of), dtype=torch.int64)[None]
    return generation(model, ids, of) if spec["row"] == "generate" else training_step(model, ids)


class Arrivals:
    """A streamer that notes when each token came; the prompt comes first."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, _) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generation(model, ids, of: Sizes) -> Ready:
    model.eval()
    said: dict[str, Any] = {}

    def call(prompt, new_tokens: int) -> tuple[float, float]:
        """(seconds to the first token, seconds per token after it)."""
        arrivals, start = Arrivals(), time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=arrivals,
        )
        said["tokens"] = out[0, prompt.shape[1] :].tolist()
        first, *_, last = arrivals.times[1:]
        return first - start, (last - first) / (new_tokens - 1)

    def run(repeats: int) -> dict[str, float]:
        times = np.mean([call(ids, of.new_tokens) for _ in range(repeats)], axis=0)
        return {"prefill": float(times[0]), "token": float(times[1])}

    call(ids[:, :256], 3)  # a warm-up of a long prompt would take as long as what is timed

    @torch.no_grad()
    def outputs() -> dict[str, np.ndarray]:
        return {"logits": model(ids[:, :512]).logits.float()[:, :, None].numpy()}

    return Ready(run, outputs, lambda: dict(said))


def training_step(model, ids) -> Ready:
    """What ``jsparse finetune`` trains, by AdamW with its settings: LoRA of rank 8 on attention, embeddings
    and norms; full attention.
    """
    peft = load("peft")

    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "embed" in name or "norm" in name:
            parameter.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    about = {"trained": sum(parameter.numel() for parameter in trained)}

    def call() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    def outputs() -> dict[str, np.ndarray]:
        return {"loss": np.full((1, 1, 1, 1), call(), np.float32)}

    return Ready(repeated(call), outputs, lambda: about)
