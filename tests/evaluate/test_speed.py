"""The benchmarks: what they count is what was asked for; how long it took is nobody's business here."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse
from jsparse.evaluate.speed import decode, filled_cache
from jsparse.evaluate.speed.cache_bytes import bytes_table, nbytes, step_bytes
from jsparse.evaluate.speed.decode import DecodeBench, bench_decode
from jsparse.evaluate.speed.filled_cache import (
    FilledCache,
    attention_steps,
    endless_rows,
    listed_pages,
    random_state,
)
from jsparse.evaluate.speed.prefill import PrefillBench, bench_prefill
from jsparse.evaluate.speed.report import draw_decode, spread
from jsparse.evaluate.speed.results import RESULTS
from jsparse.evaluate.speed.settings import model_config
from jsparse.models import Llama
from jsparse.reports.machine import describe_machine
from jsparse.serve import loop
from jsparse.serve.config import Policy
from jsparse.serve.state import ModelShape, new_state, split_model

# Without pages, with all, with pages chosen in some layers and in all: each takes long to compile.
MEASURED: tuple[Policy, ...] = ("dense", "streaming", "quest", "lserve")
CONTEXTS, STEPS, REPEATS = (64, 78), 2, 1  # in whole pages, 16 or 64 tokens, both as large: less to compile
LAYERS, HEADS, DIM = 3, 2, 8  # Quest reads everything in the first two layers
SMALL: dict[str, Any] = {"budget": 64, "sink": 4, "window": 16, "steps": STEPS, "repeats": REPEATS}


@pytest.fixture(scope="module")
def llama(one_layer):
    return dataclasses.replace(one_layer, num_hidden_layers=LAYERS, sliding_windows=(None,) * LAYERS)


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    Llama(llama, rngs=nnx.Rngs(0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shape():
    return ModelShape(q_heads=4, kv_heads=HEADS, head_dim=DIM, hidden_size=32, dtype=np.dtype("float32"))


@pytest.fixture(scope="module")
def decoded(folder, tmp_path_factory):
    """One small benchmark of everything: its configuration, its rows, and the calls of decode_steps."""
    config = DecodeBench(
        model=folder,
        output=tmp_path_factory.mktemp("bench") / "out" / "decode",
        contexts=CONTEXTS,
        policies=MEASURED,
        **SMALL,
    )
    calls, decode_steps = [], loop.decode_steps

    def counted(structure, params, state, rows, steps, *, selections):
        before = state.lengths.tolist()
        state, tokens = decode_steps(structure, params, state, rows, steps, selections=selections)
        calls.append((before, state.lengths.tolist(), (np.asarray(tokens) >= 0).sum(), selections))
        return state, tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "decode_steps", counted)
        rows = bench_decode(config)
    return config, rows, calls


@pytest.mark.slow
def test_every_policy_is_measured_at_every_context(decoded):
    _, rows, _ = decoded
    assert [(row.context, row.policy) for row in rows] == [
        (c, policy) for c in CONTEXTS for policy in MEASURED
    ]
    for row in rows:
        timings = [row.decode, row.attention, row.selector, row.reading]
        assert all(len(one.rounds) == REPEATS and one.least > 0 for one in timings if one is not None)
        assert (row.selector is None) == (row.policy in ("dense", "streaming"))
        assert (row.reading is None) == (row.policy == "streaming")
        assert (row.selector_to_reading is None) == (row.selector is None)
        assert row.ratio_to_dense == 1 if row.policy == "dense" else row.ratio_to_dense > 0


@pytest.mark.slow
def test_each_call_decodes_the_steps_that_are_divided_by(decoded):
    config, _, calls = decoded
    expected = []
    for context in CONTEXTS:
        for _ in range(1 + REPEATS):
            expected += [([context], [context + STEPS], STEPS)] * len(MEASURED)
    assert [call[:3] for call in calls] == expected
    llama = model_config(config.model, CONTEXTS, STEPS)
    selections = [config.layout(llama, policy, CONTEXTS[0]).selections for policy in MEASURED]
    assert [call[3] for call in calls[: len(MEASURED)]] == selections


@pytest.mark.slow
def test_bytes_are_those_of_arithmetic(decoded, llama, shape):
    config, rows, _ = decoded
    of = {row.policy: row for row in rows if row.context == 64}  # and a capacity of 128 tokens
    values = 2 * DIM * 4  # keys and values of a token and head
    dense = LAYERS * HEADS * 128 * values
    assert of["dense"].cache_bytes == dense
    assert of["dense"].step_bytes == dense  # the 65th token is on the second page
    assert of["dense"].cache_bytes_per_token == LAYERS * HEADS * values

    ring = LAYERS * (4 + 16) * values
    assert of["streaming"].cache_bytes == of["streaming"].step_bytes == HEADS * ring

    pages, bounds, lists = LAYERS * 128 * values, LAYERS * 128 // 16 * values, LAYERS * 4
    assert of["lserve"].cache_bytes == pages + bounds + ring + lists  # one head of each kind
    assert of["lserve"].step_bytes == pages // 2 + bounds / 4 + ring  # one page; chosen every 4th token

    def reads(policy: Policy) -> int:
        layout = config.layout(llama, policy, 64)
        return step_bytes(layout, jax.eval_shape(lambda: new_state(layout, shape)).layers, 65)

    assert reads("lserve") == of["lserve"].step_bytes
    assert reads("random") == pages // 2 + ring
    assert reads("oracle") == reads("mean") == pages // 2 + pages / 2 / 4 + ring  # all keys, every 4th token

    capacity = 64 + 16  # Quest's pages are smaller; two layers read the 65 tokens, one has bounds and a list
    assert of["quest"].cache_bytes == (LAYERS * capacity + capacity // 16) * HEADS * values
    assert of["quest"].step_bytes == (2 * capacity + 64 + capacity // 16) * HEADS * values


def test_codes_and_batches_count_too(llama, shape, tmp_path):
    config = DecodeBench(output=tmp_path, kv_bits=4, batch=3, contexts=(128,), **SMALL)
    layout = config.layout(llama, "dense", 128)
    state = jax.eval_shape(lambda: new_state(layout, shape))
    token = 2 * (DIM // 2 + 4 + 4)  # two codes a byte, scale and zero
    assert nbytes(state.layers) == 3 * LAYERS * HEADS * 192 * token
    assert step_bytes(layout, state.layers, 128) == 3 * LAYERS * HEADS * 128 * token


def test_bytes_a_token_of_each_kind_of_cache(shape):
    table = {row.kind: row for row in bytes_table(shape, sink=4, window=16)}
    assert list(table) == ["float32 pages", "bfloat16 pages", "int8 pages", "int4 pages", "float32 ring"]
    bounds = HEADS * 2 * DIM * 4 / 16
    assert table["float32 pages"].per_token == HEADS * 2 * DIM * 4 + bounds
    assert table["bfloat16 pages"].per_token == table["float32 pages"].per_token / 2
    assert table["int8 pages"].per_token == HEADS * 2 * (DIM + 8) + bounds
    assert table["int4 pages"].per_token == HEADS * 2 * (DIM / 2 + 8) + bounds
    assert table["float32 ring"].per_sequence == HEADS * 2 * (4 + 16) * DIM * 4
    assert table["float32 ring"].per_token == 0


@pytest.mark.slow
def test_results_read_back(decoded):
    config, rows, _ = decoded
    results = json.loads((config.output / RESULTS).read_text())
    assert results["rows"] == json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))
    assert results["settings"]["contexts"] == list(CONTEXTS) and results["settings"]["budget"] == 64
    assert results["model"]["kv_heads"] == HEADS and results["model"]["dtype"] == "float32"
    assert results["machine"]["jax"] == jax.__version__ and results["machine"]["date"]
    assert [row["kind"] for row in results["bytes"]][0] == "float32 pages"
    assert (config.output / "decode.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match=r"has files \(decode.png, results.json\)"):
        bench_decode(config)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_filled_cache_is_one_that_appending_could_have_made(llama, shape, bits, tmp_path):
    config = DecodeBench(output=tmp_path, kv_bits=bits, batch=2, contexts=(128,), **SMALL)
    layout = config.layout(llama, "lserve", 128)
    state = random_state(layout, shape, 128)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: new_state(layout, shape))
    )
    assert state.lengths.tolist() == [128, 128] and state.page_table.tolist() == [[0, 1, 2], [3, 4, 5]]
    first, second = state.layers[0].paged, state.layers[1].paged
    assert first is not None and second is not None
    assert (first.k_min < first.k_max).all()
    k = np.asarray(first.restored(first.k, np.float32)).reshape(6, 1, 4, 16, DIM)
    assert np.abs(k.min(axis=3) - first.k_min).max() <= (0 if bits is None else 0.05)
    assert np.abs(k.max(axis=3) - first.k_max).max() <= (0 if bits is None else 0.05)
    assert 0.8 < k.std() < 1.2 and not np.array_equal(first.bounds, second.bounds)


def test_attention_alone_does_what_decode_steps_do_with_the_cache(llama, shape, tmp_path):
    config = DecodeBench(output=tmp_path, contexts=(128,), **SMALL)
    one = dataclasses.replace(llama, num_hidden_layers=1, sliding_windows=(None,))
    layout = config.layout(one, "dense", 128)
    state = random_state(layout, shape, 128)
    pool = jax.tree.map(np.array, state.layers[0].paged)  # the state itself is donated
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, heads, DIM)).astype(np.float32) for heads in (4, HEADS, HEADS))
    after, total = attention_steps(state, q, k, v, layout.selections, 1)

    keys, values = (np.moveaxis(x, 1, 0).reshape(HEADS, -1, DIM)[:, :128] for x in (pool.k, pool.v))
    keys, values = (np.concatenate([x, new[0].swapaxes(0, 1)], 1) for x, new in ((keys, k), (values, v)))
    scores = np.einsum("hgd,hsd->hgs", q.reshape(HEADS, 2, DIM), keys.astype(np.float64)) / DIM**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hgs,hsd->hgd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(total - q, out.reshape(1, 1, 4, DIM), atol=1e-5)
    assert after.lengths.tolist() == [129]
    np.testing.assert_array_equal(after.layers[0].paged.k[2, :, 0], k[0, 0])


def test_lists_are_those_of_a_step_that_selects(llama, shape, tmp_path):
    config = DecodeBench(output=tmp_path, contexts=(128,), **SMALL)
    cache = FilledCache(config.layout(llama, "lserve", 128), shape, 128)
    arguments = cache.arguments()
    lists = [np.asarray(pages).tolist() for pages in listed_pages(*arguments, cache.selections)]
    assert lists == [[[[2, -1]]]] * LAYERS  # the newest token's page, and room for one that begins
    # Four tokens share a choice: attention from 128 on selects at its first and its fifth token.
    assert cache.attend(5) > 0 and cache.state.selected_at.tolist() == [133]
    assert cache.attend(4) > 0 and cache.state.selected_at.tolist() == [129]


def test_logits_that_are_not_finite_are_no_timing(llama, shape, tmp_path):
    config = DecodeBench(output=tmp_path, contexts=(64,), **SMALL)
    one = dataclasses.replace(llama, num_hidden_layers=1, sliding_windows=(None,))
    model = Llama(one, rngs=nnx.Rngs(0))
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], jnp.nan)
    structure, params = split_model(model)
    cache = FilledCache(config.layout(one, "dense", 64), shape, 64)
    rows = endless_rows(1, one.vocab_size)
    with pytest.raises(FloatingPointError, match="decoding ended after 1 of 2 steps at context 64"):
        cache.decode(structure, params, rows, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": ()}, "policies must have at least one entry"),
        ({"policies": ("dense", "dense")}, "policies has 'dense' more than once"),
        ({"contexts": ()}, "contexts must have at least one entry"),
        ({"contexts": (64, 0)}, "contexts must be integers >= 1, not 0"),
        ({"contexts": (64, 64)}, "contexts has 64 more than once"),
        ({"contexts": (255,)}, r"contexts has 255, which with 2 new tokens .* max_position_embeddings=256"),
        ({"budget": 100}, "budget=100 must be a multiple of page_size=64"),
        ({"sparsity": 1.5}, "sparsity must be a number from 0 to 1, not 1.5"),
        ({"window": 0}, "window must be an integer >= 1, not 0"),
        ({"steps": 33}, "steps must be an integer from 1 to 32, not 33"),
        ({"repeats": 0}, "repeats must be an integer >= 1, not 0"),
        ({"batch": 0}, "batch must be an integer >= 1, not 0"),
        ({"output": Path("taken")}, "has files"),
        ({"output": Path("taken/file")}, "is a file"),
        ({"model": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_allocated(
    folder, tmp_path, monkeypatch, settings, message
):
    def must_not(*_):
        raise AssertionError("something was allocated")

    monkeypatch.setattr(decode, "load_model", must_not)
    monkeypatch.setattr(filled_cache, "random_state", must_not)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        bench_decode(
            DecodeBench(**{"model": folder, "output": Path("new"), "contexts": CONTEXTS} | SMALL | settings)
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_prefill_times_whole_prompts_after_one_token(folder, tmp_path, monkeypatch):
    lengths, prefill = [], loop.prefill

    def counted(structure, params, state, prompts, *rest):
        lengths.append([len(prompt) for prompt in prompts])
        return prefill(structure, params, state, prompts, *rest)

    monkeypatch.setattr(loop, "prefill", counted)
    config = PrefillBench(model=folder, output=tmp_path / "out", contexts=(70,), sink=4, window=16, chunk=32)
    rows = bench_prefill(config)
    assert lengths == [[1], [1], [70], [70]]
    assert [(row.context, row.variant) for row in rows] == [(70, "dense"), (70, "streaming")]
    assert all(row.seconds.least > 0 for row in rows) and rows[0].ratio_to_dense == 1
    assert rows[0].cache_bytes == LAYERS * HEADS * 128 * 2 * DIM * 4
    results = json.loads((config.output / RESULTS).read_text())
    assert results["rows"] == json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))


def test_variants_of_prefill_are_what_they_say(llama, tmp_path):
    config = PrefillBench(output=tmp_path, variants=("dense", "streaming", "pooled", "vertical-slash"))
    layouts = {variant: config.layout(llama, variant, 8192) for variant in config.variants}
    assert {v: set(one.estimates) for v, one in layouts.items()} == {
        "dense": {None},
        "streaming": {None},
        "pooled": {jsparse.PooledBlocks(4096)},
        "vertical-slash": {jsparse.VerticalSlash(2048, 1024)},
    }
    streaming = {v: {layer.streaming_heads for layer in one.layers} for v, one in layouts.items()}
    assert streaming == {"dense": {()}, "streaming": {(1,)}, "pooled": {()}, "vertical-slash": {()}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ("dense", "dense")}, "variants has 'dense' more than once"),
        ({"estimate_budget": 1000}, "estimate_budget=1000 must be a multiple of 512"),
        ({"variants": ("pooled",), "chunk": 100}, "prefill_chunk=100 must be a multiple"),
        ({"contexts": ()}, "contexts must have at least one entry"),
    ],
)
def test_bad_settings_of_prefill(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PrefillBench(output=tmp_path, **settings)


@pytest.mark.slow
def test_without_matplotlib_the_figure_is_missed_aloud(decoded, tmp_path, monkeypatch, capsys):
    _, rows, _ = decoded
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not draw_decode(rows, "a model", describe_machine(), tmp_path / "decode.png")
    assert "decode.png was not drawn" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_labels_are_spread_and_keep_their_order():
    values = [0.5, 0.1, 0.52, 0.11, 0.49]
    places = spread(values, 0.1)
    assert np.argsort(places).tolist() == np.argsort(values).tolist()
    assert np.diff(sorted(places)).min() >= 0.1 - 1e-9
    assert spread([0.0, 1.0], 0.1) == [0.0, 1.0]
