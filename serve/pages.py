"""Which pages of the pool have owners, and how many: a reference-counting allocator on the host."""

from collections import Counter
from collections.abc import Sequence


class PageAllocator:
    """The pages of one pool. Each is free or has a number of owners.

    A page id stands for that page in every layer. Free pages are handed out in the order in which they became
    free, starting with page 0.

    >>> pages = PageAllocator(4)
    >>> pages.allocate(3)
    [0, 1, 2]
    >>> pages.share([1])
    >>> pages.release([0, 1])
    >>> pages.free, pages.references(1)
    (2, 1)
    """

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages))
        self._references = [0] * num_pages

    @property
    def free(self) -> int:
        """How many pages have no owner."""
        return len(self._free)

    def free_pages(self) -> list[int]:
        """The pages that have no owner, in the order in which they are handed out."""
        return list(self._free)

    def references(self, page: int) -> int:
        """How many owners a page has; 0 if it is free."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free pages, which then have one owner each.

        Raises ValueError if fewer are free. None is taken then.
        """
        if not 0 <= count <= len(self._free):
            raise ValueError(f"count must be from 0 to the {len(self._free)} free pages, not {count}")
        pages, self._free = self._free[:count], self._free[count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds an owner to each of these pages, as often as it is listed.

        Raises ValueError if one of them is free. Nothing changes then.
        """
        for page in pages:
            if not self._references[page]:
                raise ValueError(f"page {page} is free: only a page that has an owner can be shared")
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes an owner from each of these pages, as often as it is listed; without owners a page is free.

        Raises ValueError if a page is listed more often than it has owners. Nothing changes then.
        """
        for page, times in Counter(pages).items():
            owners = self._references[page]
            if times > owners:
                raise ValueError(f"page {page} has {owners} owners, and cannot be released more often")
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
