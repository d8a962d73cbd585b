"""Which pages of the cache a decode step reads."""

from jsparse.cache.select.best import best_pages as best_pages
from jsparse.cache.select.best import random_scores as random_scores
from jsparse.cache.select.best import select_pages as select_pages
from jsparse.cache.select.best import with_newest_pages as with_newest_pages
from jsparse.cache.select.selection import Selection as Selection
