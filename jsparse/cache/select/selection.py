"""What decides which pages of the cache a decode step reads."""

import dataclasses
from typing import Literal

SelectHeads = Literal["max", "union", "query"]
Score = Literal["bounds", "exact", "mean", "random"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the retrieval heads of a layer choose the pages that they read at a decode step.

    - ``budget``: tokens that a list of pages holds at most, in whole pages; a context within it is read
      whole.
    - ``every``: the selector runs at every so many-th token of a sequence; the tokens between reuse its
      choice (LServe, arXiv 2502.14866, section 3.5.3). What they wrote themselves is always read too.
    - ``heads``: query heads share a KV head. "max" gives the KV head one list, by the largest score of its
      query heads; "union" reads the union of the lists of its query heads, up to that many budgets; "query"
      gives each query head a list of its own.
    - ``score``: of a page. "bounds" is :func:`page_scores`; "exact" the largest product with a key in the
      page (an oracle to compare with) and "mean" the product with the mean of its keys, both of which read
      all keys; "random" has nothing to do with the keys.
    - ``seed``: of the random scores, so that layers differ.
    """

    budget: int
    every: int = 4
    heads: SelectHeads = "max"
    score: Score = "bounds"
    seed: int = 0
