"""Plans: what they refuse, what follows from what the compiler says, and that they plan what runs."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.console import Console

import jsparse.device
import jsparse.plan
import jsparse.plan.compile_only
import jsparse.plan.program
from jsparse.extras import MissingExtra
from jsparse.models import Llama, LlamaConfig
from jsparse.models.checkpoint import load_config
from jsparse.models.sharding import MeshConfig
from jsparse.plan.compile_only import DEVICES, Memory, bytes_a_device, compile_only_devices, memory_of
from jsparse.plan.flops import Passes, StepFlops
from jsparse.plan.program import Plan, Program, ProgramPlan, plan_program, print_plan
from jsparse.serve import Batch, CacheConfig
from jsparse.serve.layout import plan_cache
from jsparse.serve.plan import generation_programs, plan_generate
from jsparse.serve.state import with_pool
from jsparse.train import FinetuneConfig
from jsparse.train.plan import plan_finetune, step_program
from jsparse.train.start import extended_config, load_start

CONFIG = LlamaConfig.tiny()
FINETUNE = FinetuneConfig(model="-", data="-", output="-", context=64, attention="shifted", batch_size=2)
ONE_DEVICE = MeshConfig().make(jax.devices()[:1])
FLOPS = StepFlops(Passes(1, 3, 1), Passes(2, 6, 2), Passes(10, 20), Passes(30, 60), Passes(4, 8, 4))


@pytest.fixture
def no_compiler(monkeypatch):
    """A jax that could compile, without the plugin that does."""
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jsparse.plan.compile_only.importlib.util, "find_spec", lambda name: None)


# --- devices ---


def test_only_hopper_devices_take_the_kernels(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    taken = {}
    for name, device in DEVICES.items():
        monkeypatch.setattr(jsparse.device, "device_kind", lambda kind=device.kind: kind)
        taken[name] = jsparse.device.hopper()
    assert taken == {"h200": True, "h100-80gb": True, "a100-80gb": False}


def test_cuda_offers_a_little_less_than_nvidia_smi_shows():
    shown_mib = {"h200": 143771, "h100-80gb": 81559, "a100-80gb": 81920}
    for name, mib in shown_mib.items():
        assert 0.99 * mib * 2**20 < DEVICES[name].memory_bytes < mib * 2**20


@pytest.mark.parametrize(("count", "hosts"), [(0, 1), (8, 3), (8, 0), (True, 1)])
def test_devices_of_impossible_numbers(count, hosts):
    with pytest.raises(ValueError, match="count|hosts"):
        compile_only_devices(DEVICES["h200"], count, hosts=hosts)


# --- refusals ---


def plan_either(run: str, **changes) -> Plan:
    options: dict[str, Any] = {"device": "h200"} | changes
    if run == "finetune":
        return plan_finetune(FINETUNE, CONFIG, **options)
    options = {"prompt_tokens": 32, "max_new_tokens": 1} | options
    return plan_generate(CONFIG, CacheConfig(), **options)


@pytest.mark.parametrize("run", ["finetune", "generate"])
def test_nothing_is_estimated_where_nothing_compiles(run, no_compiler, monkeypatch):
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[gpu-compile\]'"):
        plan_either(run)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"jax >= 0\.11\.2 can"):
        plan_either(run)


@pytest.mark.parametrize("run", ["finetune", "generate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "b200"}, "device must be one of h200, h100-80gb, a100-80gb, not 'b200'"),
        ({"memory_fraction": 0.99}, r"memory_fraction must be a number in \(0, 0.95\], not 0.99"),
        ({"memory_fraction": 0}, "memory_fraction .* not 0"),
    ],
)
def test_arguments_out_of_range(run, options, message):
    with pytest.raises(ValueError, match=message):
        plan_either(run, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be an integer >= 1, not 0"),
        ({"batch": 0}, "batch must be an integer >= 1, not 0"),
        ({"prompt_tokens": 60, "max_new_tokens": 5}, "max_position_embeddings=64"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, not 'int8'"),
        (
            {"max_new_tokens": 1, "mesh": MeshConfig(sequence=2)},
            "mesh: sequence must be 1 for generation, not 2",
        ),
        (
            {"max_new_tokens": 1, "mesh": MeshConfig(data=2)},
            "data .* fsdp = 2 does not divide the cache's 1 rows",
        ),
        (
            {"max_new_tokens": 1, "mesh": MeshConfig(tensor=4)},
            "tensor=4 does not divide the 2 other KV heads",
        ),
    ],
)
def test_generations_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        plan_either("generate", **options)


def test_a_run_that_the_model_refuses():
    with pytest.raises(NotImplementedError, match="llama3"):
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}
        fields = CONFIG.to_hf() | {"rope_parameters": rope, "max_position_embeddings": 32}
        config = FinetuneConfig(model="-", data="-", output="-", context=64, rope="linear")
        plan_finetune(config, LlamaConfig.from_hf(fields), device="h200")


@pytest.mark.parametrize(("context", "attention", "group_size"), [(64, "full", None), (128, "shifted", 32)])
def test_a_run_is_planned_with_the_attention_that_it_will_take(monkeypatch, context, attention, group_size):
    config = FinetuneConfig(model="-", data="-", output="-", context=context, batch_size=1)
    monkeypatch.setattr("jsparse.train.plan.compile_only_devices", lambda *_, **__: jax.devices()[:1])
    monkeypatch.setattr("jsparse.train.plan.plan_program", lambda *_: peak_of(100))
    settings = plan_finetune(config, CONFIG, device="h200").settings
    assert (settings["attention"], settings.get("group_size")) == (attention, group_size)


# --- what follows from what the compiler says ---


def array(*shape: int, spec: PartitionSpec = PartitionSpec(), dtype=jnp.float32):  # noqa: B008
    mesh = AbstractMesh((2, 4), ("data", "tensor"))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def test_bytes_are_those_of_one_device():
    split = array(4, 8, spec=PartitionSpec("data", "tensor"), dtype=jnp.bfloat16)
    tree = {"whole": array(3, 5), "split": [split]}
    assert bytes_a_device(tree) == 3 * 5 * 4 + (4 // 2) * (8 // 4) * 2


def test_memory_of_a_program():
    compiled = jax.jit(lambda x, y: x @ y).lower(jnp.zeros((64, 32)), jnp.zeros((32, 16))).compile()
    memory = memory_of(compiled)
    assert (memory.arguments, memory.results) == (4 * (64 * 32 + 32 * 16), 4 * 64 * 16)
    assert memory.peak == memory.arguments + memory.results + memory.temporary


def program(**changes) -> Program:
    shapes = array(128), array(256)
    parts = {"weights": shapes[0], "batch": [shapes[1]]}
    return Program("step", None, shapes, **{"parts": parts, "beside": array(64)} | changes)


def compiles_to(monkeypatch, result):
    """Every program compiles to one with two calls of kernels, of this Memory, in 7.5 s, or raises."""

    def compile_for(mesh, call, *shapes):
        if isinstance(result, Exception):
            raise result
        return None, 7.5

    monkeypatch.setattr(jsparse.plan.program, "compile_for", compile_for)
    monkeypatch.setattr(jsparse.plan.program, "memory_of", lambda compiled: result)
    monkeypatch.setattr(jsparse.plan.program, "kernel_calls", lambda compiled: 2)


def test_a_program_is_what_the_compiler_says(monkeypatch):
    compiles_to(monkeypatch, Memory(arguments=1536, results=100, temporary=5000))
    plan = plan_program(program(), ONE_DEVICE)
    assert plan == ProgramPlan("step", {"weights": 512, "batch": 1024}, 100, 5000, 256, 2, 7.5)
    assert plan.peak == 1536 + 100 + 5000 + 256


def test_arguments_that_nobody_named(monkeypatch):
    compiles_to(monkeypatch, Memory(arguments=1536 + 2 * 256 + 1, results=0, temporary=0))
    with pytest.raises(RuntimeError, match="step: the compiler counts 2049 bytes of arguments"):
        plan_program(program(), ONE_DEVICE)


def test_no_room_is_an_answer_and_another_failure_is_an_error(monkeypatch):
    compiles_to(monkeypatch, RuntimeError("RESOURCE_EXHAUSTED: 900 GiB"))
    refused = plan_program(program(), ONE_DEVICE)
    assert refused.refusal == "RESOURCE_EXHAUSTED: 900 GiB"
    plan = plan_of(refused, memory_bytes=10**12)
    assert not plan.fits and plan.to_json()["needed_fraction"] is None
    assert "the compiler found no room" in printed(plan)
    compiles_to(monkeypatch, RuntimeError("UNIMPLEMENTED: wgmma"))
    with pytest.raises(RuntimeError, match="wgmma"):
        plan_program(program(), ONE_DEVICE)


def plan_of(*programs: ProgramPlan, memory_bytes: int = 10_000, **changes) -> Plan:
    fields = {"run": "finetune", "settings": {"context": 64, "full_layers": (0, 1)}, "device": "h200"}
    fields |= {"mesh": {"data": 1, "fsdp": 8}, "memory_fraction": 0.75, "flops": FLOPS}
    return Plan(memory_bytes=memory_bytes, programs=programs, **fields | changes)


def peak_of(size: int) -> ProgramPlan:
    return ProgramPlan("step", {"weights": size - 30}, 10, 15, 5, 4, 1.0)


@pytest.mark.parametrize(
    ("peak", "fits", "needed"),
    [(7500, True, 0.75), (7501, False, 0.76), (9500, False, 0.95), (10_001, False, 1.01)],
)
def test_a_plan_fits_where_its_largest_program_does(peak, fits, needed):
    plan = plan_of(peak_of(100), peak_of(peak))
    assert (plan.peak, plan.fits, plan.needed_fraction) == (peak, fits, needed)


def printed(plan: Plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(width=200, file=text))
    return text.getvalue()


def test_print_says_what_is_where_and_how_to_run_it():
    text = printed(
        plan_of(ProgramPlan("step", {"weights": 5 * 10**9}, 0, 10**9, 0, 4, 1.0), memory_bytes=10**10)
    )
    assert "8 x h200 (fsdp 8): context 64" in text
    assert "weights" in text and "5.00" in text and "6.00" in text
    assert f"saves {FLOPS.saved:.1%}" in text
    assert "Fits: 6.00 GB of 7.5 GB (0.75 of 10.0 GB)" in text and "XLA_CLIENT_MEM_FRACTION" not in text
    assert "With XLA_CLIENT_MEM_FRACTION=0.8 or more it would" in printed(plan_of(peak_of(8000)))
    assert "XLA_CLIENT_MEM_FRACTION" not in printed(plan_of(peak_of(9999)))
    assert "Run it with XLA_CLIENT_MEM_FRACTION=0.9" in printed(plan_of(peak_of(8000), memory_fraction=0.9))


def test_json_has_every_field_and_what_follows():
    plan = plan_of(peak_of(100), peak_of(200))
    fields = json.loads(json.dumps(plan.to_json()))
    assert [one["peak"] for one in fields["programs"]] == [100, 200]
    assert (fields["peak"], fields["devices"], fields["usable_bytes"], fields["fits"]) == (200, 8, 7500, True)
    assert fields["flops"]["total"] == FLOPS.total and fields["mesh"] == {"data": 1, "fsdp": 8}
    assert json.loads(json.dumps(plan_of(peak_of(100), flops=None).to_json()))["flops"] is None


# --- that what is planned is what runs ---


def described(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(leaf), jnp.dtype(leaf.dtype)) for leaf in leaves]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_model):
    path = tmp_path_factory.mktemp("plan") / "model"
    save_tiny_model(path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "shifted"},
        {"lora_rank": None, "attention": "full"},
        {"attention": "shifted", "dpo_beta": 0.1},
        {
            "attention": "shifted",
            "lora_targets": ("all-linear", "lm_head"),
            "lora_rank_pattern": {"lm_head": 3},
            "modules_to_save": ("up_proj",),
        },
    ],
)
def test_the_step_of_a_plan_takes_what_finetune_starts_with(folder, options):
    config = FinetuneConfig(
        model=folder, data="-", output="-", context=128, batch_size=4, micro_batches=2, **options
    )
    config = FinetuneConfig(**{**vars(config), "dtype": "float32"})
    model_config = extended_config(config, load_config(folder))
    state, split = load_start(config, model_config, None)
    masks = config.pattern(model_config).masks(model_config, 128)
    planned = step_program(config, model_config, masks, ONE_DEVICE)
    planned_state, planned_frozen, *batch = planned.shapes
    assert described(planned_state) == described(state)
    assert described(planned_frozen) == described(split.frozen)
    margins = [((2, 2, 32), jnp.float32)] if config.dpo_beta else []  # of at most 32 pairs
    assert [(x.shape, x.dtype) for x in batch] == [
        *(((2, 2, 128), d) for d in (jnp.int32, jnp.int32, jnp.bool_)),
        *margins,
    ]
    assert described(planned.parts["trained parameters"])[1] == described(state.params)[1]
    assert bytes_a_device(dict(planned.parts)) == bytes_a_device(planned.shapes)
    # The real thing takes these shapes.
    jax.eval_shape(planned.call, *planned.shapes)


def test_the_programs_of_a_plan_take_what_a_batch_holds(folder):
    model = Llama.from_pretrained(folder)
    streams = [[True, False], [False, True]]
    cache = CacheConfig(budget=16, page_size=16, streaming_heads=streams, sink=4, window=8, kv_bits=4)
    layout = plan_cache(cache, model.config, [40, 40], [8, 8])
    batch = Batch(model, layout)
    chunk, first, decode = generation_programs(ONE_DEVICE, model.config, layout, jnp.float32)
    structure, params, running, *_ = decode.shapes
    assert structure == batch.structure
    assert described(params) == described(batch.params)
    assert described(running) == described(batch.state)
    for one in (chunk, first, decode):
        jax.eval_shape(
            lambda *arrays, one=one: one.call(*one.shapes[:1], *arrays, **one.static), *one.shapes[1:]
        )
        assert bytes_a_device(dict(one.parts)) == bytes_a_device(one.shapes[1:])
    # Beside a prompt stand the rows that wait, without the pool that the prompt writes into.
    rings = with_pool(running, (None,) * len(running.layers))
    assert bytes_a_device(chunk.beside) == bytes_a_device((rings, decode.shapes[3]))
