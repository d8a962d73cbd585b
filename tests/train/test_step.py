"""The compiled step: its loss, its options, and what it does with numbers that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, add_lora
from jsparse.models.longlora import is_trained_with_lora
from jsparse.train import FinetuneConfig, shifted_head_masks
from jsparse.train.start import is_trained, prepare
from jsparse.train.step import new_state, split_model, train_step

CONFIG = FinetuneConfig(model="-", data="-", output="-", context=16, learning_rate=0.1, warmup_steps=0)
MASK = shifted_head_masks(4, 8)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 257, (4, 16)).astype(np.int32)
SEGMENTS = np.ones_like(TOKENS)
SEGMENTS[1, 3:] = 2
SEGMENTS[3, 4:] = 0  # so that windows have unequal numbers of targets
SCORED = RNG.random((4, 16)) < 0.7


@pytest.fixture(scope="module")
def small(tmp_path_factory, save_checkpoint):
    """Of one layer: these tests mostly compile."""
    return save_checkpoint(tmp_path_factory.mktemp("small") / "base", num_hidden_layers=1)


def batch(micro_batches):
    return tuple(x.reshape(micro_batches, -1, 16) for x in (TOKENS, SEGMENTS, SCORED))


def one_step(small, config=CONFIG, *, micro_batches=1, steps=1, adapters=None, remat="none", **options):
    """(state before the last step, frozen, state after, metrics of the last)."""
    model = prepare(config, Llama.from_pretrained(small))
    if adapters is not None:
        adapters(model)
    params, split = split_model(model, is_trained(config))
    state = new_state(params, config.optimizer())
    step = train_step(split, config.optimizer(), MASK, remat=remat, **options)
    before = None
    for _ in range(steps):
        before = jax.device_get(state)
        state, metrics = step(state, split.frozen, *batch(micro_batches))
    return before, split, state, metrics


def test_the_loss_is_the_models_over_all_that_is_scored(small):
    model = Llama.from_pretrained(small)
    logits = np.asarray(jax.jit(lambda: model(TOKENS, segment_ids=SEGMENTS, mask=MASK))(), np.float64)
    picked = np.take_along_axis(logits[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    nll = np.log(np.exp(logits[:, :-1]).sum(-1)) - picked
    counts = SCORED[:, 1:] & (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] > 0)
    for remat in ("none", "layers"):
        _, _, state, metrics = one_step(small, remat=remat)
        np.testing.assert_allclose(metrics.loss, nll[counts].mean(), rtol=1e-5)
        assert int(metrics.tokens) == counts.sum() and int(state.step) == 1


def test_micro_batches_of_unequal_tokens_give_the_same_step(small):
    """Averaging the means of the parts would weigh the tokens of short parts more."""
    counts = SCORED[:, 1:] & (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] > 0)
    assert len(set(counts.sum(-1))) > 1
    whole, parts = one_step(small), one_step(small, micro_batches=4)
    np.testing.assert_allclose(whole[3].loss, parts[3].loss, rtol=1e-6)
    np.testing.assert_allclose(whole[3].grad_norm, parts[3].grad_norm, rtol=1e-5)
    moments = (jax.tree.leaves(run[2].opt_state) for run in (whole, parts))
    for one, other in zip(*moments, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(small):
    """A weight of the frozen base that is infinite for two steps."""
    params, split = split_model(prepare(CONFIG, Llama.from_pretrained(small)), is_trained(CONFIG))
    state = new_state(params, CONFIG.optimizer())
    step = train_step(split, CONFIG.optimizer(), MASK, remat="none")
    donated = state
    state, metrics = step(state, split.frozen, *batch(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated.opt_state))
    assert int(metrics.skipped) == 0 and np.isfinite(metrics.loss)
    before = jax.device_get(state)
    broken = jax.tree.map(lambda x: x * np.inf if jnp.issubdtype(x.dtype, jnp.floating) else x, split.frozen)
    for count in (1, 2):
        state, metrics = step(state, broken, *batch(1))
        assert not np.isfinite(metrics.loss)
        assert int(metrics.skipped) == int(metrics.skipped_in_row) == count
    for one, other in zip(
        jax.tree.leaves((before.params, before.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert int(state.step) == int(before.step) + 2
    state, metrics = step(state, split.frozen, *batch(1))
    assert int(metrics.skipped) == 2 and int(metrics.skipped_in_row) == 0  # in a row no more


def test_a_step_without_a_target_changes_nothing_and_does_not_count_in_a_row(small):
    """Weight decay and Adam's averages would move the weights although nothing is to be learned."""
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    params, split = split_model(prepare(config, Llama.from_pretrained(small)), is_trained(config))
    step = train_step(split, config.optimizer(), MASK, remat="none")
    state, _ = step(new_state(params, config.optimizer()), split.frozen, *batch(1))
    before = jax.device_get(state)
    tokens, segment_ids, scored = batch(1)
    state, metrics = step(state, split.frozen, tokens, segment_ids, np.zeros_like(scored))
    assert (int(metrics.tokens), int(metrics.skipped), int(metrics.skipped_in_row)) == (0, 1, 0)
    for one, other in zip(
        jax.tree.leaves((before.params, before.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert int(state.step) == int(before.step) + 1


def perturbed(model):
    """Adapters whose output is not zero, so that what is dropped matters."""
    for layer in model.layers:
        linear = layer.self_attn.q_proj
        linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape)


def test_dropout_is_drawn_from_the_seed_and_the_step(small):
    """The same step draws the same, computed again in the backward pass too; another one draws otherwise."""
    config = FinetuneConfig(model="-", data="-", output="-", context=16, lora_dropout=0.5)
    plain = one_step(small, config, adapters=perturbed)[3].loss
    metrics = {}
    for remat in ("none", "layers"):
        model = prepare(config, Llama.from_pretrained(small))
        perturbed(model)
        params, split = split_model(model, is_trained(config))
        step = train_step(split, config.optimizer(), MASK, remat=remat, dropout_seed=3)
        for number in (0, 0, 1):
            state = new_state(jax.tree.map(jnp.copy, params), config.optimizer())
            state = state._replace(step=jnp.array(number, jnp.int32))
            metrics.setdefault((remat, number), []).append(step(state, split.frozen, *batch(1))[1])
    first, again = metrics["none", 0]
    (other,) = metrics["none", 1]
    assert first.loss == again.loss != other.loss and first.loss != plain
    np.testing.assert_allclose(metrics["layers", 0][0].loss, first.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["layers", 0][0].grad_norm, first.grad_norm, rtol=1e-5)


def test_float32_masters_move_where_bfloat16_would_not(small):
    """A step of 1e-4 of a weight is lost in bfloat16; the trained parameters keep it."""
    model = Llama.from_pretrained(small, dtype=jnp.bfloat16)
    add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(0))
    params, split = split_model(model, is_trained_with_lora)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    config = FinetuneConfig(model="-", data="-", output="-", context=16, learning_rate=1e-4, warmup_steps=0)
    state = new_state(params, config.optimizer())
    before = np.asarray(state.params["norm"]["scale"][...])
    step = train_step(split, config.optimizer(), MASK, remat="none")
    state, _ = step(state, split.frozen, *batch(1))
    after = np.asarray(state.params["norm"]["scale"][...])
    moved = np.abs(after - before)
    np.testing.assert_allclose(moved, 1e-4, rtol=1e-2)  # Adam's first step is the learning rate
    assert (before.astype(jnp.bfloat16) == after.astype(jnp.bfloat16)).mean() > 0.8
    joined = split.join(state.params, split.frozen)
    assert joined.hidden(TOKENS, None, joined.attend()).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(split.exported(state.params).norm.scale[...])} == {
        jnp.dtype("bfloat16")
    }
