"""Longer contexts by another RoPE: position interpolation, NTK-aware, YaRN and Llama 3's bands."""

import dataclasses

from jsparse.models.choices import EXTENSIONS as EXTENSIONS
from jsparse.models.rope import RopeConfig

# By default a kind is extended by its own method. NTK-aware RoPE is a default one with a larger theta, so
# nothing tells it apart.
_OWN_METHOD: dict[str, str] = {
    "default": "linear",
    "linear": "linear",
    "yarn": "yarn",
    "llama3": "llama3",
}


def extend_rope(
    rope: RopeConfig,
    growth: int,
    *,
    head_dim: int,
    max_position_embeddings: int,
    method: str | None = None,
) -> RopeConfig:
    """The RoPE of a model that is to see ``growth`` times as many positions.

    With s = ``growth``, d = ``head_dim`` and L = ``max_position_embeddings``, the length before:

    - ``linear``, position interpolation (arXiv 2306.15595; LongLoRA, arXiv 2309.12307): every frequency is
      divided by s, so the model sees only angles that it was trained on. On default, linear.
    - ``ntk``, NTK-aware scaling (bloc97, 2023; arXiv 2309.00071, §3.1): ``theta * s ** (d / (d - 2))``, so
      the highest frequency stays, the lowest is divided by s, and those between by powers of s. The kind
      stays. On default (one that was extended so before, too), linear.
    - ``yarn`` (arXiv 2309.00071): factor s over the original length L. On default, yarn.
    - ``llama3`` (Llama 3.1): factor s over the original length L, ``low_freq_factor`` 1 and
      ``high_freq_factor`` 4. On default, llama3.
    - None: the way of ``rope.kind``; linear for a default one.

    On its own kind a method multiplies the existing factor, and the original length stays: twice by 2 equals
    once by 4. YaRN's factor on cosines follows from the new factor.

    Raises ValueError for an unknown method, a growth below 1 and a ``head_dim`` that NTK cannot divide;
    NotImplementedError for a method and a kind that together are no single RoPE, and for YaRN with an
    explicit ``attention_factor``, which holds for the old factor only.

    >>> extend_rope(RopeConfig(), 4, head_dim=128, max_position_embeddings=4096, method="yarn").factor
    4.0
    >>> round(extend_rope(RopeConfig(), 4, head_dim=128, max_position_embeddings=4096, method="ntk").theta)
    40890
    """
    check_extension(method)
    if growth < 1:
        raise ValueError(f"growth must be an integer >= 1, not {growth!r}")
    method = _OWN_METHOD[rope.kind] if method is None else method
    check_composes(method, rope.kind)
    factor = float(growth * (rope.factor or 1.0))
    if method == "ntk":
        if head_dim <= 2:
            raise ValueError(f"RoPE extension 'ntk' needs a head_dim above 2, not {head_dim}")
        return dataclasses.replace(rope, theta=rope.theta * growth ** (head_dim / (head_dim - 2)))
    if method == rope.kind == "yarn" and rope.attention_factor is not None:
        raise NotImplementedError(
            f"attention_factor={rope.attention_factor!r} was given for the factor {rope.factor!r}, and none "
            f"is known for {factor!r}; leave it out, and it follows from the factor"
        )
    if method == rope.kind:
        return dataclasses.replace(rope, factor=factor)
    if method == "linear":
        return RopeConfig(kind="linear", theta=rope.theta, factor=factor)
    return RopeConfig(
        kind=method,
        theta=rope.theta,
        factor=factor,
        original_max_position_embeddings=max_position_embeddings,
        low_freq_factor=1.0 if method == "llama3" else None,
        high_freq_factor=4.0 if method == "llama3" else None,
    )


def check_extension(method: str | None) -> None:
    """Raise ValueError unless ``method`` is one of ``extend_rope``'s."""
    if method is not None and method not in EXTENSIONS:
        raise ValueError(f"method must be {', '.join(EXTENSIONS)} or None, not {method!r}")


def check_composes(method: str, kind: str) -> None:
    """Raise NotImplementedError unless ``method`` can extend a RoPE of this kind."""
    if kind not in EXTENSIONS[method]:
        raise NotImplementedError(
            f"RoPE extension {method!r} does not compose with RoPE type {kind!r}, for the two together "
            f"are no single RoPE; allowed on {kind!r} are {', '.join(_methods_on(kind))}"
        )


def _methods_on(kind):
    return [method for method, kinds in EXTENSIONS.items() if kind in kinds]
