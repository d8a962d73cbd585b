"""What decides which pages of the cache a decode step reads."""

import dataclasses
from typing import Literal

SelectHeads = Literal["max", "union", "query"]
Score = Literal["bounds", "exact", "mean", "random"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the retrieval heads of a layer choose the pages that they read at a decode step.

    - budget: the most tokens that a list of pages holds, in whole pages; a context within it is read whole.
    - every: pages are chosen every ``every`` tokens of a sequence. The tokens between reuse that choice, and
      always read what has been written since.
    - heads: query heads share a KV head. "max" gives the KV head one list, by the largest score of its query
      heads; "union" reads the union of their lists, which may take a budget for each of them; "query" gives
      each query head its own list.
    - score: of a page. "bounds" is :func:`jsparse.page_scores`; "exact" is the largest product with a key in
      the page, an oracle for comparison; "mean" is the product with the mean of its keys; "random" does not
      depend on the keys. "exact" and "mean" read all keys.
    - seed: of the random scores, different in each layer.

    Source: LServe (arXiv 2502.14866, §3.5.3 for ``every``).
    """

    budget: int
    every: int = 4
    heads: SelectHeads = "max"
    score: Score = "bounds"
    seed: int = 0
