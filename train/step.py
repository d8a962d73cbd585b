"""One training step: what is trained, the loss, the optimizer, and the function that is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32, PyTree

from jsparse.models import Llama
from jsparse.models.llama import Mask
from jsparse.train.loss import next_token_nll


class TrainState(NamedTuple):
    """All that a step changes, and so all that a checkpoint holds."""

    params: PyTree  # the trained parameters, float32
    opt_state: optax.OptState
    step: Int32[Array, ""]  # steps taken


class Metrics(NamedTuple):
    """What one step reports: ``loss`` is the mean over its ``tokens``, before the update."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]  # before clipping
    tokens: Int32[Array, ""]  # that had a target


class SplitModel(NamedTuple):
    """A model without its trained parameters: its structure, their shapes and dtypes, and the rest."""

    graphdef: nnx.GraphDef
    trained: PyTree
    frozen: PyTree

    def join(self, params: PyTree, frozen: PyTree) -> Llama:
        """The model with ``params``, cast to the dtypes it computes with."""
        params = jax.tree.map(lambda p, like: p.astype(like.dtype), params, self.trained)
        return nnx.merge(self.graphdef, params, frozen)


def split_model(model: Llama, is_trained: Any) -> tuple[PyTree, SplitModel]:
    """The parameters to train, in float32 whatever the model computes in, and the model without them.

    is_trained: a filter for ``nnx.split``. The parameters may share memory with ``model``, which is not to be
    used any more once a step has donated them.
    """
    graphdef, params, frozen = nnx.split(model, is_trained, ...)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    return jax.tree.map(lambda p: p.astype(jnp.float32), params), SplitModel(graphdef, abstract, frozen)


def train_step(
    split: SplitModel, optimizer: optax.GradientTransformation, mask: Mask | None, *, remat: bool
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted ``step(state, frozen, tokens, segment_ids) -> state, metrics``, which donates ``state``.

    The loss is the next-token cross-entropy over all tokens of the batch that have a target in their own
    document, each weighing the same. mask: as the model takes it. remat: keep only each layer's input for the
    backward pass and compute the rest again, which saves memory for a third more time.
    """

    def loss_fn(params, frozen, tokens, segment_ids):
        model = split.join(params, frozen)
        hidden = model.hidden(tokens, None, model.attend(mask, segment_ids), remat=remat)
        logits = model.logits(hidden)
        nll, counts = next_token_nll(logits, tokens, segment_ids)
        tokens_counted = counts.sum(dtype=jnp.int32)
        # A batch without any target, all of it documents of one token, has loss 0.
        return jnp.where(counts, nll, 0.0).sum() / jnp.maximum(tokens_counted, 1), tokens_counted

    def step(state, frozen, tokens, segment_ids):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, tokens_counted), grads = gradient(state.params, frozen, tokens, segment_ids)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(loss, optax.tree.norm(grads), tokens_counted)
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)
