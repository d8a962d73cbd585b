"""Which pages of the cache a decode step reads."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.cache.select.best import best_pages as best_pages
    from jsparse.cache.select.best import random_scores as random_scores
    from jsparse.cache.select.best import select_pages as select_pages
    from jsparse.cache.select.best import with_newest_pages as with_newest_pages
    from jsparse.cache.select.choose import choose_pages as choose_pages
    from jsparse.cache.select.choose import pages_to_read as pages_to_read
    from jsparse.cache.select.selection import Selection as Selection
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
