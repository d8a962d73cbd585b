"""One training step: what is trained, the loss, the optimizer, and the function that is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from jsparse.models import Llama, LoRAParam, set_dropout_keys
from jsparse.models.loss import next_targets, token_nll
from jsparse.models.masking import ModelMask
from jsparse.models.preference import pair_margins, pairs_exist, preference_sums
from jsparse.models.sharding import parameter_shardings


class TrainState(NamedTuple):
    """All that a step changes, and so all that a checkpoint holds."""

    params: PyTree  # the trained parameters, float32
    opt_state: optax.OptState
    step: Int32[Array, ""]  # steps taken, skipped ones too
    skipped: Int32[Array, ""]  # steps that changed nothing: loss or gradient not finite, or without a target
    skipped_in_row: Int32[Array, ""]  # how many of these were the last steps, in a row


class Rewards(NamedTuple):
    """Over the pairs of a step: by how much the chosen answer gained on the rejected one, and how often."""

    margin: Float32[Array, ""]
    accuracy: Float32[Array, ""]


class Metrics(NamedTuple):
    """What one step reports: ``loss`` is the mean over its ``tokens`` or pairs, before the update."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]  # before clipping
    tokens: Int32[Array, ""]  # that had a target
    skipped: Int32[Array, ""]  # steps skipped so far
    skipped_in_row: Int32[Array, ""]
    rewards: Rewards | None = None  # of a step that learns from pairs


class SplitModel(NamedTuple):
    """A model without its trained parameters: its structure, their shapes and dtypes, and the rest."""

    graphdef: nnx.GraphDef
    trained: PyTree
    frozen: PyTree

    def exported(self, params: PyTree) -> Llama:
        """The model with ``params``, all in the dtypes that it is saved with."""
        params = jax.tree.map(lambda param, like: param.astype(like.dtype), params, self.trained)
        return nnx.merge(self.graphdef, params, self.frozen)

    def join(self, params: PyTree, frozen: PyTree) -> Llama:
        """The model with ``params``, cast to the dtypes it computes with.

        All but the embedding and output tables, which stay float32: what is read from them is cast instead.
        Otherwise the gradients of a token's many uses would be summed in bfloat16.
        """

        def cast(path, param, like):
            return param if is_table(path) else param.astype(like.dtype)

        return nnx.merge(self.graphdef, jax.tree.map_with_path(cast, params, self.trained), frozen)


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at ``path`` is the table of the embedding or of the output."""
    return any(getattr(key, "key", None) in ("embed_tokens", "lm_head") for key in path)


def split_model(model: Llama, is_trained: Any) -> tuple[PyTree, SplitModel]:
    """The parameters to train, in float32 whatever the model computes in, and the model without them.

    - is_trained: a filter for ``nnx.split``.

    The parameters may share memory with ``model``, so do not use it once a step has donated them.
    """
    graphdef, params, frozen = nnx.split(model, is_trained, ...)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    return jax.tree.map(lambda p: p.astype(jnp.float32), params), SplitModel(graphdef, abstract, frozen)


def new_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    counts = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three arrays: each is donated
    return TrainState(params, optimizer.init(params), *counts)


def train_step(
    split: SplitModel,
    optimizer: optax.GradientTransformation,
    mask: ModelMask | None,
    *,
    remat: str,
    dropout_seed: int | None = None,
    dpo_beta: float | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted ``step(state, frozen, tokens, segment_ids, scored) -> state, metrics``, donating ``state``.

    The batch is [micro-batches, B, T]; gradients are computed for one micro-batch after another and summed in
    float32. The loss is the mean next-token cross-entropy over all tokens of the batch that have a target in
    their own document and are ``scored``; every such token weighs the same.

    A step whose loss or gradient is not finite changes nothing but the counts of steps. A step without any
    target has nothing to learn from: it changes nothing either, and does not count in ``skipped_in_row``.

    - mask: as the model takes it.
    - remat: what the backward pass keeps (``Llama.hidden``).
    - dropout_seed: seed of the adapters' dropout, keyed by step and micro-batch; None without dropout.
    - dpo_beta: learn from pairs of answers, by DPO with this beta. The step then also takes the margins of
      the pairs under the model before training, [micro-batches, B, P], and its loss is the mean over pairs.
    - mesh: the mesh that the arguments lie on, which must be in context (``jax.set_mesh``); None for one
      device.
    """
    parts = 1 if mesh is None else mesh.shape["sequence"]
    some_frozen = any(isinstance(leaf, nnx.Param) for _, leaf in nnx.to_flat_state(split.frozen))
    options = {"remat": remat, "trained": LoRAParam if some_frozen else nnx.Param}

    def loss_fn(params, frozen, batch, key, total):
        """The micro-batch's part of the mean over ``total`` tokens or pairs, and of the rewards of pairs."""
        tokens, segment_ids, scored, *beside = batch
        model = split.join(params, frozen)
        if key is not None:
            set_dropout_keys(model, key)
        hidden = model.hidden(tokens, None, model.attend(mask, segment_ids), **options)
        targets, counts = next_targets(tokens, segment_ids, scored)
        dropout = None if model.lm_head is None else model.lm_head.dropout_key
        head_key = None if dropout is None else dropout[...]
        nll = token_nll(hidden, model.logits, targets, key=head_key, parts=parts)
        if dpo_beta is None:
            return jnp.where(counts, nll, 0.0).sum() / total, None
        (reference,) = beside
        sums = preference_sums(pair_margins(nll, counts, segment_ids), reference, dpo_beta)
        return sums.loss / total, Rewards(sums.margin / total, sums.right / total)

    def gradient(params, frozen, batches, step, total):
        """Loss, rewards and gradient over all micro-batches."""
        keys = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), step)
            keys = jax.random.split(key, len(batches[0]))

        def one_gradient(batch, key):
            return jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, key, total)

        if len(batches[0]) == 1:
            return one_gradient(*jax.tree.map(lambda x: x[0], (batches, keys)))

        def add(sums, x):
            return jax.tree.map(jnp.add, sums, one_gradient(*x)), None

        rewards = None if dpo_beta is None else Rewards(jnp.zeros(()), jnp.zeros(()))
        zeros = (jnp.zeros(()), rewards), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (batches, keys))[0]

    def step(
        state: TrainState,
        frozen: PyTree,
        tokens: Int32[Array, "A B T"],
        segment_ids: Int32[Array, "A B T"],
        scored: Bool[Array, "A B T"],
        *reference: Float32[Array, "A B P"],
    ):
        counts = jax.vmap(next_targets)(tokens, segment_ids, scored)[1]
        counted = counts.sum(dtype=jnp.int32)
        of = counted if dpo_beta is None else jax.vmap(pairs_exist)(counts, segment_ids).sum(dtype=jnp.int32)
        total = jnp.maximum(of, 1)  # a batch without any target has loss 0
        batches = tokens, segment_ids, scored, *reference
        (loss, rewards), grads = gradient(state.params, frozen, batches, state.step, total)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Not optax.apply_if_finite: it checks only the gradients, not the loss.
        empty = counted == 0
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~empty
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = state.skipped + ~good
        skipped_in_row = jnp.where(good, 0, state.skipped_in_row + ~empty)
        state = TrainState(params, opt_state, state.step + 1, skipped, skipped_in_row)
        if mesh is not None:  # placed as it came in, whatever the compiler prefers
            state = jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh))
        return state, Metrics(loss, norm, counted, skipped, skipped_in_row, rewards)

    return jax.jit(step, donate_argnums=0)
