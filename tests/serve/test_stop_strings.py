"""Stop strings and text, whatever the token borders: against Python's own search in the whole text."""

import functools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jsparse.models import LlamaConfig, byte_tokenizer, train_tokenizer
from jsparse.serve import SamplingParams, StopStrings, TextStream, generate, stream
from jsparse.serve.request import check_requests

TEXTS = ["to be or not to be, that is the question", "naïve café, 北京 🙂 crème brûlée", "aaaa abab baab"]
texts = st.text(st.sampled_from("ab é北🙂\n#"), max_size=24)
stops = st.text(st.sampled_from("ab é北🙂\n#"), min_size=1, max_size=4)


def metaspace_tokenizer() -> Tokenizer:
    """As SentencePiece's: spaces are "▁", one before the text is left out, other characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special[:2], show_progress=False)
    trainer.initial_alphabet = ["a", "b", "▁", "#"]
    tokenizer.train_from_iterator(["to be ab ba aab #"], trainer)
    tokenizer.add_tokens(special[2:])
    return tokenizer


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return {
        "bytes": byte_tokenizer,
        "bpe": lambda: train_tokenizer([*TEXTS] * 20, 300),
        "metaspace": metaspace_tokenizer,
    }[kind]()


def cut(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first; of those, before the longest."""
    for end in range(len(text) + 1):
        begins = [end - len(one) for one in stop if text[:end].endswith(one)]
        if begins:
            return text[: min(begins)]
    return text


@given(st.lists(texts, max_size=8), st.lists(stops, max_size=3))
@example(["a", "b", "a"], ["ab", "bab"])
def test_strings_stop_the_text_wherever_it_is_cut(pieces, stop):
    strings = StopStrings(stop)
    shown = [strings.feed(piece) for piece in pieces]
    whole = "".join(pieces)
    assert strings.stopped == any(one in whole for one in stop)
    if len(stop) == 1:
        assert cut(whole, stop) == whole.split(stop[0])[0]
    for count, _ in enumerate(pieces, start=1):  # nothing that was shown is taken back
        assert cut(whole, stop).startswith("".join(shown[:count]))
    held = max((len(one) for one in stop), default=1) - 1
    if not strings.stopped:
        assert len("".join(shown)) >= len(whole) - held
    assert "".join(shown) + strings.end() == cut(whole, stop)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "metaspace"])
@given(st.sampled_from(TEXTS) | texts, texts, stops)
def test_tokens_give_the_text_that_they_decode_to(kind, before, text, stop):
    tokenizer = tokenizer_of(kind)
    prompt, whole = tokenizer.encode(before).ids, tokenizer.encode(before + text).ids
    if whole[: len(prompt)] != prompt or tokenizer.decode(whole) != before + text:
        return  # a token across the border, or a text that this tokenizer cannot write
    for strings in ([], [stop]):
        view = TextStream(tokenizer, prompt, strings)
        shown = [view.feed(token) for token in whole[len(prompt) :]]
        assert "�" not in "".join(shown)
        assert "".join(shown) + view.end() == cut(text, strings)
        assert view.stopped == (strings == [stop] and stop in text)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(st.data())
def test_any_tokens_give_the_text_that_they_decode_to(kind, data):
    """Characters of which bytes are missing, too, in the prompt or after it."""
    tokenizer = tokenizer_of(kind)
    ids = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=24)
    prompt, new = data.draw(ids), data.draw(ids)
    view = TextStream(tokenizer, prompt)
    assert "".join(map(view.feed, new)) + view.end() == tokenizer.decode(new)


@given(st.lists(st.sampled_from(["a", "b", "▁", "<0xC3>", "<0xA9>", "<0x80>", "<0xF0>"]), max_size=16))
def test_bytes_that_are_no_characters_keep_nothing_else_from_coming(pieces):
    """Where a byte makes those before it invalid, too, the tokenizers' own stream raises."""
    tokenizer = tokenizer_of("metaspace")
    ids = [tokenizer.get_vocab()[piece] for piece in pieces]
    view = TextStream(tokenizer, tokenizer.encode("ab").ids)
    text = "".join(map(view.feed, ids)) + view.end()
    letters = "".join(piece for piece in pieces if len(piece) == 1).replace("▁", " ")
    assert "".join(one for one in text if one.isascii()) == letters
    assert text.count("é") <= "".join(pieces).count("<0xC3><0xA9>")


def test_a_prompt_that_ends_within_a_character_is_not_shown():
    for prompt in ("né".encode()[:2], "\ufffd".encode()):
        view = TextStream(byte_tokenizer(), [*prompt])
        assert [view.feed(byte) for byte in b"ab"] == ["a", "b"]


def test_characters_wait_for_all_their_bytes_and_what_never_comes_is_marked():
    view = TextStream(byte_tokenizer())
    assert [view.feed(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert view.feed("🙂".encode()[0]) == "" and view.end() == "�" and view.end() == ""


def test_stop_strings_count_only_after_the_least_number_of_tokens():
    view = TextStream(byte_tokenizer(), stop=["ab"], min_tokens=3)
    shown = [view.feed(byte) for byte in b"ababab"]
    assert "".join(shown) == "abab" and view.stopped  # the first one that begins after three tokens


def test_special_tokens_have_no_text():
    view = TextStream(byte_tokenizer(), stop=["<|"])
    assert [view.feed(token) for token in (65, 256, 66)] == ["A", "", "B"] and view.end() == ""


@pytest.fixture(scope="module")
def letters():
    """A tokenizer for the vocabulary of the tests' models: one character per token."""
    vocab = {chr(ord("A") + token): token for token in range(61)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize("start", [0, 5])
def test_generation_ends_at_a_stop_string_and_the_others_go_on(small, cache, prompts, letters, start):
    free = generate(small, prompts, 40, SamplingParams(ignore_eos=True), cache, tokenizer=letters)
    assert free.texts == [letters.decode(row).replace(" ", "") for row in free.tokens]
    stop = free.texts[1][start : start + 3]
    how = SamplingParams(ignore_eos=True, stop=["never such", stop])
    result = generate(small, prompts, 40, how, cache, tokenizer=letters)
    for text, tokens, reason, free_text, free_tokens in zip(
        result.texts, result.tokens, result.finish_reasons, free.texts, free.tokens, strict=True
    ):
        assert text == free_text.split(stop)[0]
        end = free_text.find(stop) + len(stop) if stop in free_text else 40
        assert tokens == free_tokens[:end]
        assert reason == ("stop" if stop in free_text else "length")
    assert result.finish_reasons[1] == "stop"
    assert result.stats.new_tokens == sum(map(len, result.tokens))
    events = list(stream(small, prompts, 40, how, cache, tokenizer=letters))
    for row in range(4):
        mine = [event for event in events if event.prompt == row]
        assert "".join(event.text for event in mine) == result.texts[row]
        assert [event.token for event in mine] == result.tokens[row]
        assert mine[-1].finish_reason == result.finish_reasons[row]


def test_a_stop_string_at_the_last_token_is_the_reason(small, cache, prompts, letters):
    free = generate(small, prompts[:1], 6, SamplingParams(ignore_eos=True), cache, tokenizer=letters)
    how = SamplingParams(ignore_eos=True, stop=free.texts[0][-2:], min_tokens=4)
    result = generate(small, prompts[:1], 6, how, cache, tokenizer=letters)
    assert result.texts == [free.texts[0][:-2]] and result.finish_reasons == ["stop"]
    assert result.tokens == free.tokens


def test_a_stop_string_that_is_a_special_token_stops_at_it():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|end|>"])  # 257
    config = LlamaConfig.tiny(vocab_size=258)
    prompts, params = [[104]], SamplingParams(stop=["<|end|>", "x"], stop_token_ids=[3])
    (request,) = check_requests(config, prompts, 8, params, 0, tokenizer)
    assert (request.sampling.stop, request.sampling.stop_token_ids) == (("x",), (3, 257))
    with pytest.raises(ValueError, match=r"'<|end|>' has no text; stop at it with stop_token_ids=\[257\]"):
        check_requests(config, prompts, 8, SamplingParams(stop="a<|end|>"), 0, tokenizer)
