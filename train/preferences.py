"""Preferences of a model while it learns from pairs: the margins that it had before, and held-out pairs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from jsparse.models.masking import ModelMask
from jsparse.models.preference import Pairs, most_pairs, pair_margins
from jsparse.train.config import FinetuneConfig
from jsparse.train.data.windows import Windows
from jsparse.train.run.processes import is_first_process, wait_for_all
from jsparse.train.scoring import in_batches, jit_for_all, token_losses
from jsparse.train.step import SplitModel, TrainState


def reference_margins(
    config: FinetuneConfig,
    split: SplitModel,
    mask: ModelMask,
    mesh: Mesh | None,
    windows: Windows,
    state: TrainState,
    *,
    folder: Path,
    run: dict[str, Any],
) -> Float32[np.ndarray, "N P"]:
    """The margins of all pairs of ``windows`` before the first step, with the run's attention.

    They are computed once and kept in ``folder`` for a run that is resumed.

    - state: before the first step.
    - run: the description of the run, another of which has other margins.
    """
    described = json.dumps({name: value for name, value in run.items() if name != "config"}, sort_keys=True)
    file = folder / f"reference-{hashlib.sha256(described.encode()).hexdigest()[:16]}.npy"
    exists = file.is_file()
    wait_for_all("reference")  # all have looked before the first process writes
    if not exists:
        rows = np.arange(len(windows))
        margins = np.asarray(pairs_of(config, split, mask, mesh, windows, rows, state.params).margins)
        if is_first_process():
            partial = file.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, margins)
            partial.replace(file)
        return margins
    return np.load(file, mmap_mode="r")


def held_out_preferences(
    config: FinetuneConfig, split: SplitModel, mesh: Mesh | None, windows: Windows, state: TrainState
) -> Callable[[TrainState], dict[str, Any]]:
    """``measure(state)``: DPO's loss of held-out pairs under a state's parameters, with full attention.

    - state: before the first step; under it all margins are the reference.

    ``measure`` returns the mean loss, by how much the chosen answer gained on the rejected one ("margin"), in
    which part of the pairs it gained ("accuracy"), and how many pairs there are. A loss that is not finite is
    None.
    """
    rows = windows.with_targets()
    assert config.dpo_beta is not None
    beta = config.dpo_beta
    reference = pairs_of(config, split, None, mesh, windows, rows, state.params)

    def measure(state: TrainState) -> dict[str, Any]:
        found = pairs_of(config, split, None, mesh, windows, rows, state.params)
        rewards = beta * (found.margins.astype(np.float64) - reference.margins)[reference.exist]
        loss = np.logaddexp(0.0, -rewards).mean()
        return {
            "loss": float(loss) if np.isfinite(loss) else None,
            "margin": float(rewards.mean()) if np.isfinite(loss) else None,
            "accuracy": float((rewards > 0).mean()),
            "pairs": int(reference.exist.sum()),
        }

    return measure


def pairs_of(
    config: FinetuneConfig,
    split: SplitModel,
    mask: ModelMask | None,
    mesh: Mesh | None,
    windows: Windows,
    rows: np.ndarray,
    params: PyTree,
) -> Pairs:
    """The pairs of some windows under a model, as NumPy arrays; as many at a time as in a micro-batch."""
    at_a_time = config.batch_size // config.micro_batches
    compiled = _margins(split, mask, mesh)
    margins = np.zeros((len(rows), most_pairs(windows.context)), np.float32)
    exist = np.zeros(margins.shape, bool)
    for at, batch in in_batches(rows, at_a_time, windows.__getitem__, mesh):
        found = compiled(params, split.frozen, *batch)
        count = at.stop - at.start
        margins[at], exist[at] = np.asarray(found.margins)[:count], np.asarray(found.exist)[:count]
    return Pairs(margins, exist)  # type: ignore[arg-type]


def _margins(split: SplitModel, mask: ModelMask | None, mesh: Mesh | None) -> Callable[..., Pairs]:
    """The jitted ``margins(params, frozen, tokens, segment_ids, scored) -> pairs``, without dropout."""
    losses = token_losses(split, mask, mesh)

    def margins(
        params: PyTree,
        frozen: PyTree,
        tokens: Int32[Array, "1 B T"],
        segment_ids: Int32[Array, "1 B T"],
        scored: Bool[Array, "1 B T"],
    ) -> Pairs:
        nll, counts = losses(params, frozen, tokens[0], segment_ids[0], scored[0])
        return pair_margins(nll, counts, segment_ids[0])

    return jit_for_all(margins, mesh)
