"""The allocator of pages: no page has two takers, counts add up, and what is refused changes nothing."""

import hypothesis
import hypothesis.strategies as st
import pytest

from jsparse.serve.pages import PageAllocator


@hypothesis.given(data=st.data(), size=st.integers(1, 12))
def test_every_page_is_free_or_has_the_owners_that_took_it(data, size):
    """Against a model: the list of pages that each owner holds."""
    pages, owners = PageAllocator(size), []
    for _ in range(data.draw(st.integers(0, 30))):
        action = data.draw(st.sampled_from(["allocate", "share", "release"]))
        before = pages.free_pages()
        if action == "allocate":
            count = data.draw(st.integers(0, size + 1))
            if count > len(before):
                with pytest.raises(ValueError, match=f"free pages, not {count}"):
                    pages.allocate(count)
                assert pages.free_pages() == before
                continue
            taken = pages.allocate(count)
            assert taken == before[:count]
            assert not set(taken) & {page for held in owners for page in held}
            owners.append(taken)
        elif owners:
            held = data.draw(st.sampled_from(owners))
            if action == "share":
                pages.share(held)
                owners.append(list(held))
            else:
                pages.release(held)
                owners.remove(held)
        counts = [sum(held.count(page) for held in owners) for page in range(size)]
        assert [pages.references(page) for page in range(size)] == counts
        assert sorted(pages.free_pages()) == [page for page in range(size) if not counts[page]]
        assert pages.free == counts.count(0)


def test_pages_come_from_the_lowest_on_and_then_as_they_were_given_back():
    pages = PageAllocator(5)
    first, second = pages.allocate(2), pages.allocate(2)
    assert (first, second) == ([0, 1], [2, 3])
    pages.release(second)
    pages.release(first)
    assert pages.allocate(5) == [4, 2, 3, 0, 1]


def test_a_free_page_is_neither_shared_nor_released():
    pages = PageAllocator(3)
    taken = pages.allocate(2)
    for call in (pages.share, pages.release):
        with pytest.raises(ValueError, match="page 2 "):
            call([0, 2])
        assert [pages.references(page) for page in range(3)] == [1, 1, 0]
    with pytest.raises(ValueError, match="page 0 has 1 owners"):
        pages.release([0, 0])
    assert pages.references(0) == 1
    pages.share(taken)
    pages.release([0, 0])
    assert pages.free_pages() == [2, 0]
