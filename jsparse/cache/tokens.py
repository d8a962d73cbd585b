"""What travels beside a cache: which tokens it holds, where, and how many come."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Tokens(NamedTuple):
    """The tokens that one call adds to a cache, for all layers the same.

    - ``page_table``: ``[B, max_pages]``, the page of the pool that holds tokens ``i * page_size ...`` of a
      sequence; None beside a cache of rings alone.
    - ``before``: ``[B]``, how many tokens of each sequence the cache holds already.
    - ``added``: ``[B]``, how many of the given tokens are added to each sequence, the first ones; the rest
      stand for nothing.
    """

    page_table: Int[Array, "B max_pages"] | None
    before: Int[Array, " B"]
    added: Int[Array, " B"]

    @property
    def after(self) -> Int[Array, " B"]:
        """How many tokens of each sequence the cache holds with the new ones."""
        return self.before + self.added
