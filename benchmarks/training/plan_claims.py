"""Whether LongLoRA's own claims fit: Llama-2 7B at 100k, 13B at 64k and 70B at 32k tokens on eight 80 GB
GPUs.

    python benchmarks/training/plan_claims.py [--models 7b ...] [--devices h100-80gb ...] [--layers N]

Compiles each run's real training step (jsparse plan) and writes benchmarks/results/plan/claims.json and
claims.md: bytes per device and FLOPs per step. No GPU is needed, but the extra `gpu-compile` is.
``--layers N`` keeps N layers of each model, to see how compiling and memory grow with them; such results are
printed and not written.

Source of the claims: LongLoRA (arXiv 2309.12307), abstract and table 3.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from jsparse.models import LlamaConfig
from jsparse.models.sharding import MeshConfig
from jsparse.plan.compile_only import prepare_process
from jsparse.plan.program import Plan, print_plan
from jsparse.reports.console import write_json
from jsparse.reports.machine import today
from jsparse.train import FinetuneConfig
from jsparse.train.plan import plan_finetune

RESULTS = Path(__file__).parents[1] / "results" / "plan"
# More than JAX takes by default: runs need XLA_CLIENT_MEM_FRACTION=0.92.
MEMORY_FRACTION = 0.92

_LLAMA_2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
MODELS = {
    "7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        **_LLAMA_2,
    ),
    "13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        **_LLAMA_2,
    ),
    "70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        **_LLAMA_2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A model at a context, and the settings with which it is planned on eight devices."""

    model: str
    context: int
    settings: Mapping[str, Any]


# Eight windows per step, one per device, and every matrix in eight parts, as LongLoRA with ZeRO-3. Each
# layer's input is kept, and everything else is computed again.
_ONE_WINDOW_PER_DEVICE = {"batch_size": 8, "mesh": MeshConfig(fsdp=8), "remat": "layers"}
CLAIMS = (
    Claim("7b", 100_000, _ONE_WINDOW_PER_DEVICE),
    Claim("13b", 65_536, _ONE_WINDOW_PER_DEVICE),
    Claim("70b", 32_768, _ONE_WINDOW_PER_DEVICE),
)


def plan_claim(claim: Claim, device: str, layers: int | None) -> Plan:
    model = MODELS[claim.model]
    if layers is not None:
        model = dataclasses.replace(model, num_hidden_layers=layers, sliding_windows=(None,) * layers)
    config = FinetuneConfig(model="-", data="-", output="-", context=claim.context, **claim.settings)
    return plan_finetune(config, model, device=device, memory_fraction=MEMORY_FRACTION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanClaims:
    """Which claims are planned."""

    models: tuple[Literal["7b", "13b", "70b"], ...] = ("7b", "13b", "70b")
    """Llama 2 models."""
    devices: tuple[Literal["a100-80gb", "h100-80gb"], ...] = ("a100-80gb", "h100-80gb")
    """Devices to compile for, eight of each."""
    layers: int | None = None
    """Layers of each model (default: its own)."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(PlanClaims, description=__doc__, args=arguments)
    prepare_process()
    for claim in CLAIMS:
        for device in options.devices if claim.model in options.models else ():
            plan = plan_claim(claim, device, options.layers)
            print_plan(plan)
            if options.layers is None:
                write(claim, plan)


def write(claim: Claim, plan: Plan) -> None:
    """Add one plan to those that were written before, and write the table of all of them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "claims.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    new = {"model": claim.model, "context": claim.context, "jax": jax.__version__}
    new |= {"date": today(), "plan": plan.to_json()}
    rows = [row for row in rows if _key(row) != _key(new)] + [new]
    rows.sort(key=_key)
    write_json(path, rows)
    (RESULTS / "claims.md").write_text(table(rows))


def _key(row: dict[str, Any]) -> tuple:
    return list(MODELS).index(row["model"]), row["context"], row["plan"]["device"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All plans as Markdown."""
    titles = (
        "Llama 2",
        "context",
        "devices",
        "mesh",
        "windows per step",
        "remat",
        "arguments GB",
        "temporary GB",
        "peak GB",
        "of GB",
        "fits",
        "TFLOP per step",
        "saved",
        "compiled in s",
    )
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        plan = row["plan"]
        (program,) = plan["programs"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        cells = (
            row["model"].upper(),
            f"{row['context']:,}",
            f"{plan['devices']} x {plan['device']}",
            mesh,
            plan["settings"]["batch_size"],
            plan["settings"]["remat"],
            f"{sum(program['arguments'].values()) / 1e9:.1f}",
            f"{program['temporary'] / 1e9:.1f}",
            f"{plan['peak'] / 1e9:.1f}",
            f"{plan['memory_bytes'] / 1e9:.1f}",
            _verdict(plan),
            f"{plan['flops']['total'] / 1e12:,.0f}",
            f"{plan['flops']['saved']:.1%}",
            f"{program['compile_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = ", ".join(sorted({f"jax {row['jax']}" for row in rows}))
    dates = ", ".join(sorted({row["date"] for row in rows}))
    about = f"""# LongLoRA's claims, planned

The training step of each run, compiled for devices that this machine does not have: bytes per device as the
compiler lays them out, FLOPs counted over the blocks that are visited, and the part of them that this saves
compared with plain causal attention. Nothing was run.

`python benchmarks/training/plan_claims.py`, {versions}, {dates}.

"""
    return about + "\n".join(lines) + "\n"


def short_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per model in Markdown: the peak on each device, FLOPs, and what the groups save of them."""
    lines = [
        "| Llama 2 | context | GB per device: H100 80GB | A100 80GB | TFLOP per step | saved by the groups |"
    ]
    lines.append("|---" * 6 + "|")
    plans = {(row["model"], row["plan"]["device"]): row["plan"] for row in rows}
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        h100, a100 = plans[model, "h100-80gb"], plans[model, "a100-80gb"]
        flops = f"{h100['flops']['total'] / 1e12:,.0f} | {h100['flops']['saved']:.1%}"
        peaks = f"{h100['peak'] / 1e9:.1f} | {a100['peak'] / 1e9:.1f}"
        lines.append(f"| {model.upper()} | {context:,} | {peaks} | {flops} |")
    return "\n".join(lines)


def _verdict(plan: dict[str, Any]) -> str:
    if not plan["fits"]:
        return "no"
    return f"yes, with XLA_CLIENT_MEM_FRACTION={plan['needed_fraction']:g} or more"


if __name__ == "__main__":
    main()
