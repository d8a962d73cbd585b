"""What a sparse cache changes: the logits of its decode steps beside those of a dense one, same tokens."""

import numpy as np
from jaxtyping import Float32


def difference(dense: Float32[np.ndarray, "T vocab"], sparse: Float32[np.ndarray, "T vocab"]) -> dict:
    """How far ``sparse`` logits are from ``dense`` ones.

    ``|dense - sparse|`` over all entries, and for each token ``KL = sum p log(p / q)`` in nats, p from the
    dense logits and q from the sparse ones.

    >>> logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    >>> found = difference(logits, logits[:, ::-1])
    >>> round(found["max_difference"], 3), [round(kl, 3) for kl in found["kl"]], found["same_top_token"]
    (1.099, [0.0, 0.549], 0.5)
    """
    gap = np.abs(dense - sparse)
    log_p, log_q = _log_softmax(dense), _log_softmax(sparse)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return {
        "mean_difference": float(gap.mean()),
        "max_difference": float(gap.max()),
        "mean_kl": float(kl.mean()),
        "kl": kl.tolist(),
        "same_top_token": float((dense.argmax(-1) == sparse.argmax(-1)).mean()),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
