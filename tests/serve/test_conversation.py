"""Turns of a conversation: each answer is what ``generate`` gives, whatever the cache still holds."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import PooledBlocks
from jsparse.models import Llama, LlamaConfig, byte_tokenizer
from jsparse.serve import Batch, CacheConfig, SamplingParams, conversation, generate, loop
from jsparse.serve.chat import Chat
from jsparse.serve.conversation import Conversation
from jsparse.serve.kept_prompt import _pieces
from jsparse.serve.prompts import Prompt

GREEDY = SamplingParams(ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, repetition_penalty=1.3, ignore_eos=True)
SPARSE = CacheConfig(
    page_size=8,
    logical_page_size=4,
    budget=32,
    streaming_heads=[[True, False], [False, False]],
    sink=2,
    window=5,
    prefill_window=70,
    prefill_chunk=128,
    select_every=3,
)
CACHES = {
    "dense": CacheConfig(policy="dense", prefill_chunk=128),
    "lserve": SPARSE,
    "codes": dataclasses.replace(
        SPARSE, kv_bits=8, prefill_chunk=64
    ),  # equal chunks: codes round the earlier
    "streaming": CacheConfig(policy="streaming", sink=3, window=20, prefill_window=100, prefill_chunk=128),
    "quest": CacheConfig(policy="quest", budget=32, prefill_chunk=128),
    "odd pages": CacheConfig(
        policy="dense", page_size=24, logical_page_size=8, budget=None, prefill_chunk=100
    ),
}


@pytest.fixture(scope="module")
def talker():
    """A model with room for a conversation, whose answers vary."""
    config = LlamaConfig.tiny(vocab_size=200, max_position_embeddings=1024, initializer_range=0.3)
    return Llama(config, rngs=nnx.Rngs(2))


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(conversation, "_LEAST_CAPACITY", 256)


def said(events):
    return [event.token for event in events]


@pytest.mark.parametrize("name", CACHES)
def test_every_turn_is_what_generate_gives(talker, name):
    cache = CACHES[name]
    talk = Conversation(talker, cache, byte_tokenizer())
    rng = np.random.default_rng(1)
    prompt, reused = [], []
    for turn, (length, sampling) in enumerate([(150, GREEDY), (30, SAMPLED), (5, GREEDY), (200, SAMPLED)]):
        prompt = [*prompt, *rng.integers(0, 200, length).tolist()]
        answer = said(talk.answer(prompt, 20, sampling, seed=turn))
        expected = generate(talker, [prompt], 20, sampling, cache, seed=turn).tokens[0]
        assert answer == expected and len(set(answer)) > 3
        reused.append((len(prompt), talk.reused_tokens))
        prompt += answer[:-1] if turn == 1 else answer  # a template may leave out the end
    # All but the last page or so of the prompt before; the fourth turn needs a larger cache, an empty one.
    unit = 72 if name == "odd pages" else 64
    lengths = [length for length, _ in reused]
    kept = [0, *((length - 16) // unit * unit for length in lengths[:-1])]
    assert [count for _, count in reused] == [*kept[:3], 0] and any(kept[1:3])


def test_a_prompt_that_begins_otherwise_is_computed_anew(talker):
    talk = Conversation(talker, SPARSE, byte_tokenizer())
    prompt = np.random.default_rng(2).integers(0, 200, 160).tolist()
    said(talk.answer(prompt, 5, GREEDY))
    others = {
        "changed early": [7, *prompt[1:], 3],
        "as long as what is kept": prompt[:128],
        "cut within what is kept": prompt[:100],
        "changed late": [*prompt[:140], 9, 9, 9],
        "little more than what is kept": prompt[:130],
    }
    for name, other in others.items():
        said(talk.answer(prompt, 5, GREEDY))
        assert said(talk.answer(other, 12, GREEDY)) == generate(talker, [other], 12, GREEDY, SPARSE).tokens[0]
        assert talk.reused_tokens == (
            128 if name in ("changed late", "little more than what is kept") else 0
        ), name


def test_an_answer_that_ends_early_gives_its_pages_back(talker):
    talk = Conversation(talker, SPARSE, byte_tokenizer())
    prompt = np.random.default_rng(3).integers(0, 200, 150).tolist()
    events = talk.answer(prompt, 100, GREEDY)
    begun = [next(events).token for _ in range(10)]
    events.close()
    batch = talk._batch
    assert batch is not None and batch.running == 0
    assert batch.free_pages == batch.layout.num_pages - 128 // 8  # what is kept
    prompt = [*prompt, *begun, 5]
    assert said(talk.answer(prompt, 30, GREEDY)) == generate(talker, [prompt], 30, GREEDY, SPARSE).tokens[0]
    assert talk.reused_tokens == 128


@pytest.mark.parametrize("where", ["prefill", "first_token", "decode_steps"])
def test_an_answer_that_breaks_off_leaves_the_next_one_whole(talker, monkeypatch, where):
    """Ctrl-C, or no memory: the call that it hits was given the cache for good."""
    talk = Conversation(talker, SPARSE, byte_tokenizer())
    prompt = np.random.default_rng(6).integers(0, 200, 150).tolist()
    prompt += said(talk.answer(prompt, 5, GREEDY))

    call = getattr(loop, where)

    def broken(*arguments, **named):
        call(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, where, broken)
        with pytest.raises(KeyboardInterrupt):
            said(talk.answer(prompt, 20, GREEDY))
    assert said(talk.answer(prompt, 20, GREEDY)) == generate(talker, [prompt], 20, GREEDY, SPARSE).tokens[0]


def test_an_answer_that_is_left_in_the_middle(talker):
    """The next one begins with an empty cache, and both are whole."""
    talk = Conversation(talker, SPARSE, byte_tokenizer())
    prompt = np.random.default_rng(7).integers(0, 200, 150).tolist()
    left = talk.answer(prompt, 20, GREEDY)
    begun = [next(left), next(left)]
    answer = said(talk.answer(prompt, 20, GREEDY))
    assert answer == said([*begun, *left]) and talk.reused_tokens == 0


def test_later_turns_compile_nothing(talker, compilations):
    talk = Conversation(talker, SPARSE, byte_tokenizer())
    prompt = np.random.default_rng(4).integers(0, 200, 140).tolist()
    for _ in range(2):
        prompt += said(talk.answer(prompt, 5, GREEDY))
    compilations.clear()
    for length in (1, 20, 17):
        prompt += said(talk.answer([*prompt, *range(length)], 7, SAMPLED))
    assert not compilations


def test_what_is_warm_compiles_nothing_for_a_first_message(talker, compilations):
    """Whether some of its prompt is kept or not."""
    cache = CacheConfig(policy="dense", page_size=32)  # of no other test
    for text in ("hello", "x" * 90):
        talk = Chat(
            Conversation(talker, cache, byte_tokenizer()),
            talker.config,
            byte_tokenizer(),
            None,
            Prompt(),
            max_new_tokens=8,
            sampling=SamplingParams(temperature=1, repetition_penalty=1.1),
            seed=0,
        )
        talk.warm_up()
        if text == "hello":
            assert compilations
        compilations.clear()
        assert "".join(talk.say(text))
        assert not compilations


def test_the_cache_grows_with_the_conversation(talker):
    talk = Conversation(talker, CACHES["dense"], byte_tokenizer())
    sizes = []
    for length in (10, 150, 300, 20):
        said(talk.answer([5] * length, 4))
        sizes.append(talk.cache_bytes)
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3] == 2 * sizes[1]


def test_scored_prompts_are_computed_whole(talker):
    batch = Batch(talker, dataclasses.replace(SPARSE, capacity=256, batch=1), keeps_prompt=True)
    prompt = np.random.default_rng(5).integers(0, 200, 150).tolist()
    scored = SamplingParams(prompt_logprobs=0)
    batch.add_prompts([prompt], 1)
    assert len(batch.add_prompts([prompt], 1, scored)[0].prompt_logprobs or ()) == 150
    assert batch.reused_tokens == 0 and batch.free_pages == batch.layout.num_pages


def test_what_cannot_be_kept(talker):
    for fields in ({"batch": 2}, {"batch": 1, "prefill_estimate": PooledBlocks(budget=128, block=64)}):
        with pytest.raises(ValueError, match="keeps_prompt=True is for a cache with batch=1 and without"):
            cache = dataclasses.replace(CACHES["dense"], capacity=256, **fields)
            Batch(talker, cache, keeps_prompt=True)


def test_bad_input(talker):
    talk = Conversation(talker, CACHES["dense"], byte_tokenizer())
    for prompt, most, sampling, message in [
        ([1], 3, SamplingParams(n=2), "n=2, but a turn of a conversation has one answer"),
        ([1] * 1020, 5, GREEDY, "prompt 0 has 1020 tokens.*max_position_embeddings=1024"),
        ([], 3, GREEDY, "is empty; a prompt has at least one token id"),
    ]:
        with pytest.raises(ValueError, match=message):
            said(talk.answer(prompt, most, sampling))
    assert len(said(talk.answer([1] * 1019, 5, GREEDY))) == 5
    with pytest.raises(ValueError, match="streaming_heads"):  # before the first turn
        Conversation(talker, dataclasses.replace(SPARSE, streaming_heads=[[True]]), byte_tokenizer())


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 8))
def test_pieces(first, count, times):
    """From start to end without a gap, each chunk at a multiple of its size."""
    short = 64
    start, end, long = first * short, (first + count) * short, times * short
    pieces = list(_pieces(start, end, short, long))
    at = start
    for begin, stop, chunk in pieces:
        assert begin == at and begin % chunk == 0 and stop > begin and chunk in (short, long)
        at = stop
    assert at == end
    assert sum((stop - begin) // chunk for begin, stop, chunk in pieces) <= count // times + 2 * times
