"""What is passed along with a cache: which tokens it holds, where, and how many are added."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Tokens(NamedTuple):
    """The tokens that one call adds to a cache, the same for all layers.

    - page_table: [B, max_pages], the page of the pool that holds tokens ``i * page_size ...`` of a sequence;
      None for a cache of rings alone.
    - before: [B], how many tokens of each sequence the cache holds already.
    - added: [B], how many of the given tokens are added to each sequence, from the first on; the rest are
      ignored.
    """

    page_table: Int[Array, "B max_pages"] | None
    before: Int[Array, " B"]
    added: Int[Array, " B"]

    @property
    def after(self) -> Int[Array, " B"]:
        """[B], how many tokens of each sequence the cache holds afterwards."""
        return self.before + self.added
