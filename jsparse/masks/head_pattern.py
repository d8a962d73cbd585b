"""Head patterns: which KV heads of which layers keep every key, and which only stream."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

PATTERN_FILE = "full_attention_heads.tsv"  # the name that DuoAttention gives it, in a folder


@dataclasses.dataclass(frozen=True, eq=False)
class HeadPattern:
    """How much each KV head needs the whole context: one score for each layer and KV head.

    ``scores`` is ``[layers, kv_heads]``. A head with a high score is a *retrieval* head, which must see every
    key; one with a low score is a *streaming* head, for which the sink and the recent window are enough.
    DuoAttention (arXiv 2410.10819) learns the scores as gates; :meth:`load` and :meth:`save` read and write
    its ``full_attention_heads.tsv``, and :meth:`threshold` makes the cut.

    Raises ``ValueError`` where ``scores`` is not a table of finite numbers.

    >>> HeadPattern([[0.9, 0.1], [0.4, 1.2]]).threshold(0.5)
    array([[False,  True],
           [ True, False]])
    """

    scores: Float[np.ndarray, "layers kv_heads"]

    def __init__(self, scores):
        scores = np.array(scores, dtype=np.float64)
        if scores.ndim != 2 or 0 in scores.shape:
            raise ValueError(
                f"scores must be [layers, kv_heads] with at least one of each, not {scores.shape}"
            )
        if not np.isfinite(scores).all():
            layer, head = (int(i) for i in np.argwhere(~np.isfinite(scores))[0])
            raise ValueError(f"scores must be finite: layer {layer}, KV head {head} is {scores[layer, head]}")
        scores.setflags(write=False)
        object.__setattr__(self, "scores", scores)

    def threshold(self, sparsity: float | int) -> Bool[np.ndarray, "layers kv_heads"]:
        """Which heads stream, when the fraction ``sparsity`` of all heads of the model shall.

        True marks a streaming head. Scores are clipped to [0, 1] first: learned gates lie slightly outside.
        Exactly ``round(sparsity * layers * kv_heads)`` heads stream, those of the lowest scores in the whole
        model; of equal scores the earlier layer streams first, then the lower head. The counts a layer are
        therefore uneven, and a layer may have none or only streaming heads.
        """
        if isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must be a number from 0 to 1, not {sparsity!r}")
        order = np.argsort(np.clip(self.scores, 0, 1), axis=None, kind="stable")
        streams = np.zeros(self.scores.size, bool)
        streams[order[: round(sparsity * self.scores.size)]] = True
        return streams.reshape(self.scores.shape)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadPattern":
        """Reads DuoAttention's TSV: a line a layer, a number a KV head, separated by tabs.

        Raises ``ValueError`` naming the file and the line where an entry is no finite number, is no gate, or
        a line is of another length than the first. Gates are meant for [0, 1], and learned ones lie a little
        outside: they load as they are, and :meth:`threshold` clips. Beyond [-10, 10] there are none.
        """
        rows: list[list[float]] = []
        for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
            if not line.strip():
                continue
            row = [_gate(text, f"{path}, line {number}") for text in line.strip().split("\t")]
            if rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"{path}, line {number}: {len(row)} KV heads, but the first line has {len(rows[0])}"
                )
            rows.append(row)
        if not rows:
            raise ValueError(f"{path}: the file is empty; a head pattern has a line a layer")
        return cls(rows)

    def save(self, path: str | os.PathLike) -> None:
        """Writes what :meth:`load` reads back to the very same numbers."""
        lines = ("\t".join(repr(float(score)) for score in row) for row in self.scores)
        Path(path).write_text("".join(line + "\n" for line in lines))


def _gate(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(f"{place}: {text!r} is not a finite number")
    if not -10 <= value <= 10:
        raise ValueError(f"{place}: {text!r} is no gate; they lie in [0, 1] or little outside, in [-10, 10]")
    return value
