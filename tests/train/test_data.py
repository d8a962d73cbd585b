import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jsparse.models import Llama, byte_tokenizer
from jsparse.train.data import PADDING, batch_at, pack, read_documents
from jsparse.train.loss import next_token_nll


def read(*files, tokenizer=None, eos_token_id: int | None = 256, vocab_size=257):
    tokenizer = tokenizer or byte_tokenizer()
    return read_documents(files, tokenizer, eos_token_id=eos_token_id, vocab_size=vocab_size)


def test_a_document_is_its_text_and_the_end_token(tmp_path):
    (tmp_path / "a").write_bytes("né\r\n".encode())
    (document,) = read(tmp_path / "a")
    assert document.tolist() == [*"né\r\n".encode(), 256] and document.dtype == np.int32
    assert read(tmp_path / "a", eos_token_id=None)[0].tolist() == [*"né\r\n".encode()]


def test_text_cannot_forge_the_end_of_a_document_nor_be_truncated(tmp_path):
    text = "a<|endoftext|>b"
    (tmp_path / "a").write_text(text)
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = False
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    assert read(tmp_path / "a", tokenizer=tokenizer)[0].tolist() == [*text.encode(), 256]
    assert len(tokenizer.encode("abcdefgh").ids) == 40  # the caller's tokenizer is as it was


def test_ids_beyond_16_bits(tmp_path):
    (tmp_path / "a").write_text("big big")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"big": 120_000, "?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (document,) = read(tmp_path / "a", tokenizer=words, eos_token_id=None, vocab_size=150_000)
    assert document.tolist() == [120_000, 120_000]
    with pytest.raises(ValueError, match="a has token id 120000, .* 257 entries"):
        read(tmp_path / "a", tokenizer=words)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "bad.txt does not exist"),
        ("directory", ValueError, "bad.txt is a directory"),
        (b"", ValueError, "bad.txt is empty"),
        (b" \n ", ValueError, "bad.txt is empty"),
        (b"good \xff\xfe", ValueError, "bad.txt is not UTF-8 text: byte 0xff at offset 5"),
    ],
)
def test_bad_files_are_named(tmp_path, content, error, message):
    (tmp_path / "good.txt").write_text("good")
    bad = tmp_path / "bad.txt"
    if content == "directory":
        bad.mkdir()
    elif content is not None:
        bad.write_bytes(content)
    with pytest.raises(error, match=message):
        read(tmp_path / "good.txt", bad)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), context=st.integers(2, 16))
def test_packing_keeps_every_token_and_cuts_at_every_document(lengths, context):
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    if len(tokens) < context:
        with pytest.raises(
            ValueError, match=f"{len(tokens)} tokens in all do not fill one .* context={context}"
        ):
            pack(documents, context)
        return
    windows = pack(documents, context)
    row, segments = windows.tokens.reshape(-1), windows.segment_ids.reshape(-1)
    assert (
        windows.tokens.shape[1] == context and windows.tokens.dtype == windows.segment_ids.dtype == np.int32
    )
    assert np.array_equal(row[: len(tokens)], tokens) and len(row) < len(tokens) + context
    assert (segments[len(tokens) :] == PADDING).all() and (segments[: len(tokens)] != PADDING).all()
    # Two neighbours are of one segment exactly if they are of one document and one window.
    owner = np.repeat(np.arange(len(lengths)), lengths)
    same = (owner[1:] == owner[:-1]) & (np.arange(1, len(tokens)) % context != 0)
    inside_windows = np.arange(1, len(tokens)) % context != 0
    found = segments[1 : len(tokens)] == segments[: len(tokens) - 1]
    assert np.array_equal(found[inside_windows], same[inside_windows])


def test_every_epoch_is_another_permutation_and_a_batch_depends_on_its_number_only():
    windows = pack([np.arange(70, dtype=np.int32)], context=10)

    def rows(first, last, seed=0):
        batches = [batch_at(windows, step, batch_size=3, seed=seed)[0] for step in range(first, last)]
        return (np.concatenate(batches)[:, 0] // 10).tolist()

    order = rows(0, 7)  # 21 windows: three epochs of seven, whose borders lie inside batches
    epochs = [order[0:7], order[7:14], order[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows(4, 7) == order[12:] and rows(0, 7, seed=1) != order
    tokens, segment_ids = batch_at(windows, 5, batch_size=3, seed=0)
    assert tokens.shape == segment_ids.shape == (3, 10)


def test_packed_documents_have_the_loss_that_they_have_alone(base):
    model = Llama.from_pretrained(base)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 257, length).astype(np.int32) for length in (11, 1, 20, 9)]
    windows = pack(documents, context=32)
    tokens, segment_ids = jnp.asarray(windows.tokens), jnp.asarray(windows.segment_ids)
    logits = jax.jit(lambda: model(tokens, segment_ids=segment_ids))()
    nll, counts = next_token_nll(logits, tokens, segment_ids)
    assert counts.sum() == 10 + 0 + 19 + 8

    rows = np.stack([np.pad(document, (0, 32 - len(document))) for document in documents])
    alone = []
    for document, logits in zip(
        documents, np.asarray(jax.jit(lambda: model(rows))(), np.float64), strict=True
    ):
        log_sum = np.log(np.exp(logits).sum(axis=-1))
        alone += [log_sum[t] - logits[t, document[t + 1]] for t in range(len(document) - 1)]
    np.testing.assert_allclose(np.asarray(nll)[np.asarray(counts)], alone, rtol=2e-5)
