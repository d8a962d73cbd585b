"""Continuous batching: a sequence gets what it gets alone, whoever comes and goes and whatever pages held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.serve import Batch, CacheConfig, SamplingParams, generate

# Everything at once: few pages, chosen at every third token, codes, and a head that streams.
CACHE = CacheConfig(
    capacity=64,
    batch=3,
    page_size=8,
    logical_page_size=4,
    budget=16,
    streaming_heads=[[True, False]],
    sink=2,
    window=5,
    prefill_window=9,
    prefill_chunk=16,
    select_every=3,
    kv_bits=8,
    num_pages=16,  # three sequences of the whole capacity would take 24
)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, ignore_eos=True)
GREEDY = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def requests():
    """(prompt, new tokens, sampling, seed): lengths around pages, chunks and the budget."""
    rng = np.random.default_rng(3)
    shapes = [(33, 9, GREEDY), (1, 20, SAMPLED), (16, 30, GREEDY), (50, 14, SAMPLED), (7, 25, SAMPLED)]
    return [(rng.integers(0, 60, n).tolist(), new, how, i) for i, (n, new, how) in enumerate(shapes)]


@pytest.fixture(scope="module")
def alone(small, requests):
    """What generate gives for each request by itself."""
    results = [generate(small, [prompt], new, how, CACHE, seed) for prompt, new, how, seed in requests]
    assert all(len(set(result.tokens[0])) > 3 for result in results)  # not one token again and again
    return [(result.tokens[0], result.finish_reasons[0]) for result in results]


class Run:
    """A batch, and what each of its prompts was given."""

    def __init__(self, model):
        self.batch, self.tokens, self.reasons = Batch(model, CACHE), {}, {}

    def take(self, events):
        for prompt, token, reason in events:
            assert prompt not in self.reasons
            self.tokens.setdefault(prompt, []).append(token)
            if reason is not None:
                self.reasons[prompt] = reason

    def add(self, prompt, new, how, seed):
        self.take(self.batch.add_prompts([prompt], new, how, seed))

    def step(self, steps=1):
        self.take(self.batch.step(steps))

    def poison(self):
        """Makes NaN of all pages that belong to nobody, and -1 of their codes."""
        free = self.batch._allocator.free_pages()

        def dirty(x):
            x = np.array(x)
            x[free] = -1 if x.dtype == np.int8 else np.nan
            return jnp.array(x)

        state = self.batch.state
        pool = state.layers[0].paged
        assert pool is not None and pool.bounds is not None and pool.bits == 8
        layers = (dataclasses.replace(x, paged=jax.tree.map(dirty, x.paged)) for x in state.layers)
        self.batch.state = dataclasses.replace(state, layers=tuple(layers))


def test_sequences_that_come_and_go_get_what_they_get_alone(small, requests, alone):
    run = Run(small)
    pages = {i: run.batch.layout.pages_of(len(prompt) + new) for i, (prompt, new, *_) in enumerate(requests)}
    run.poison()
    run.add(*requests[0])  # 42 tokens
    run.step(2)
    run.add(*requests[1])
    run.step()
    run.add(*requests[2])
    assert run.batch.free_pages == 16 - pages[0] - pages[1] - pages[2] == 1
    while 0 not in run.reasons:
        run.poison()
        run.step()
    assert run.batch.running == 2 and run.batch.free_pages == 1 + pages[0]
    for late in (3, 4):  # into the rows and pages of those before
        while run.batch.running == 3 or run.batch.free_pages < pages[late]:
            run.step(5)
        run.poison()
        run.add(*requests[late])
        run.step(3)
    while run.batch.running:
        run.poison()
        run.step(4)
    assert run.batch.free_pages == 16 and run.batch.step(7) == []
    got = [(run.tokens[i], run.reasons[i]) for i in range(5)]
    assert got == alone


def test_one_that_is_removed_never_touches_the_pages_it_gave_back(small, requests, alone):
    run = Run(small)
    for i in (1, 4, 0):  # in rows 0, 1 and 2, with 3, 4 and 6 pages of 16
        run.add(*requests[i])
    run.step(2)
    run.batch.remove(1)
    run.batch.remove(0)
    assert run.batch.running == 1 and run.batch.free_pages == 10
    run.step()
    assert [len(run.tokens[i]) for i in range(3)] == [3, 3, 4]
    run.poison()
    run.add(*requests[3])  # number 3: in row 0, with all pages of row 1, which stands at an earlier token
    while run.batch.running:
        run.step(6)
    assert [run.tokens[i] for i in range(4)] == [alone[1][0][:3], alone[4][0][:3], alone[0][0], alone[3][0]]
    assert run.reasons == {2: "length", 3: "length"}
    for gone in (0, 1, 2, 9):
        with pytest.raises(KeyError, match=f"prompt {gone} is not running; running are"):
            run.batch.remove(gone)


def test_what_does_not_fit_is_refused_and_the_others_go_on(small, requests, alone):
    run = Run(small)
    run.add(*requests[0])
    run.add(*requests[2])
    free = run.batch.free_pages
    assert free == 16 - 6 - 6
    message = "1 prompts with their new tokens need 5 pages of 8: more than num_pages=16, of which 4 are free"
    before = run.batch.state
    with pytest.raises(ValueError, match=message):
        run.batch.add_prompts([[1] * 20], 20)
    with pytest.raises(
        ValueError, match="2 prompts are more than the cache's batch=3 rows, of which 1 are free"
    ):
        run.batch.add_prompts([[1], [2]], 2)
    with pytest.raises(
        ValueError, match="prompt 0 has 60 tokens, with max_new_tokens=5 65: more than capacity=64"
    ):
        run.batch.add_prompts([[1] * 60], 5)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        run.batch.add_prompts([[1], []], 5)
    for steps in (0, 33, True):
        with pytest.raises(ValueError, match=f"steps must be from 1 to 32, not {steps}"):
            run.batch.step(steps)
    assert run.batch.state is before and (run.batch.running, run.batch.free_pages) == (2, free)
    run.add(*requests[1])  # four pages or fewer fit, and its number is the next one
    while run.batch.running:
        run.step(7)
    assert [run.tokens[i] for i in range(3)] == [alone[i][0] for i in (0, 2, 1)]


def test_joining_and_leaving_compiles_nothing(small, requests, alone, compilations):
    run = Run(small)
    run.add(*requests[0])
    run.step(2)
    run.batch.remove(0)
    compilations.clear()
    for length in (5, 45, 12):
        run.add([3] * length, 7, SAMPLED, length)
        run.step(2)
    run.batch.remove(2)
    run.add(*requests[2])
    run.step(3)
    assert not compilations
    jax.jit(lambda x: x + 2.5)(np.ones(3))
    assert compilations  # the counter counts


def test_rows_choose_pages_at_their_own_tokens(small, requests, alone):
    """From the first one beyond the budget on, at every third, whatever others do or the row did before."""
    run = Run(small)
    at: dict[int, list[int]] = {}

    def step(times):
        for _ in range(times):
            run.step()
            lengths, selected_at = (
                np.asarray(run.batch.state.lengths),
                np.asarray(run.batch.state.selected_at),
            )
            for row, prompt in run.batch._prompts.items():
                mine, length = at.setdefault(prompt, []), int(lengths[row])
                if length > 16 and (not mine or length - mine[-1] >= 3):
                    mine.append(length)
                assert selected_at[row] == (mine[-1] if mine else 0)

    run.add(*requests[2])  # 16 tokens: its first one beyond the budget is the 17th
    step(5)
    run.add(*requests[0])
    step(6)
    run.batch.remove(1)
    run.add(*requests[4])  # 7 tokens, in the row of 33
    step(14)
    assert at[1] == [34, 37] and at[2] == [17, 20] and at[0][:2] == [17, 20]
