"""Head patterns: which KV heads of each layer keep every key, and which only stream."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from jsparse.files import read_json_object
from jsparse.integers import require_integer

PATTERN_FILE = "full_attention_heads.tsv"  # the name that DuoAttention gives it, in a folder


@dataclasses.dataclass(frozen=True, eq=False)
class HeadPattern:
    """How much each KV head needs the whole context: one score for each layer and KV head.

    A head with a high score is a *retrieval* head, which must see every key. One with a low score is a
    *streaming* head, for which the sink and the recent window are enough. :meth:`threshold` makes the cut;
    :meth:`load` and :meth:`save` read and write DuoAttention's ``full_attention_heads.tsv``.

    - scores: [layers, kv_heads], numbers.

    Raises ValueError unless ``scores`` is a table of finite numbers.

    Source: DuoAttention (arXiv 2410.10819), which learns the scores as gates.

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
        """Which heads stream if a fraction of all the model's heads does.

        Exactly ``round(sparsity * layers * kv_heads)`` heads stream: those with the lowest scores in the
        whole model. Among equal scores the earlier layer streams first, then the lower head. So the counts
        differ from layer to layer, and a layer may have no streaming heads or nothing else. Scores are
        clipped to [0, 1] first, since learned gates lie slightly outside.

        - sparsity: the fraction of heads that stream, from 0 to 1.

        Returns [layers, kv_heads], True for a streaming head.

        Raises ValueError for another sparsity.
        """
        if isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must be a number from 0 to 1, not {sparsity!r}")
        order = np.argsort(np.clip(self.scores, 0, 1), axis=None, kind="stable")
        streams = np.zeros(self.scores.size, bool)
        streams[order[: round(sparsity * self.scores.size)]] = True
        return streams.reshape(self.scores.shape)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadPattern":
        """Read DuoAttention's TSV: one line per layer, one number per KV head, separated by tabs.

        Gates are meant to lie in [0, 1], and learned ones lie a little outside: they load as they are, and
        :meth:`threshold` clips them. A number outside [-10, 10] is not a gate.

        - path: the file, or a folder with a file of DuoAttention's name.

        Raises FileNotFoundError if there is none, and ValueError, naming the file and the line, for an entry
        that is not a finite number or not a gate, and for a line that differs in length from the first.
        """
        path = Path(path)
        path = path / PATTERN_FILE if path.is_dir() else path
        rows: list[list[float]] = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            row = [_gate(text, f"{path}, line {number}") for text in line.strip().split("\t")]
            if rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"{path}, line {number}: {len(row)} KV heads, but the first line has {len(rows[0])}"
                )
            rows.append(row)
        if not rows:
            raise ValueError(f"{path}: the file is empty; a head pattern has one line per layer")
        return cls(rows)

    def save(self, path: str | os.PathLike) -> None:
        """Write a file from which :meth:`load` reads exactly the same numbers."""
        lines = ("\t".join(repr(float(score)) for score in row) for row in self.scores)
        Path(path).write_text("".join(line + "\n" for line in lines))


def learned_sizes(folder: Path) -> dict[str, int]:
    """The sink and the window with which a folder's pattern was learned, as its config.json says.

    DuoAttention calls them ``sink_size`` and ``recent_size``. Returns those that are there, under our names.

    Raises ValueError, naming the file, for what is no JSON object or no integer.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}
    fields = read_json_object(file)
    sizes = {"sink": fields.get("sink_size"), "window": fields.get("recent_size")}
    for name, value in sizes.items():
        if value is not None:
            require_integer(f"{file}: the {name}", value, least=0)
    return {name: value for name, value in sizes.items() if value is not None}


def _gate(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(f"{place}: {text!r} is not a finite number")
    if not -10 <= value <= 10:
        raise ValueError(
            f"{place}: {text!r} is not a gate; gates lie in [0, 1] or a little outside, within [-10, 10]"
        )
    return value
