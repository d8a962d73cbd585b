import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.models import Llama, byte_tokenizer
from jsparse.models.loss import next_targets
from jsparse.train.data.batches import batch_at, digest_data, position_at
from jsparse.train.data.windows import Windows, write_windows


def numbered(count, context=10):
    """Windows whose tokens say where they are."""
    tokens = np.arange(count * context, dtype=np.uint16).reshape(count, context)
    return Windows(tokens, np.full((count, context), 2, np.uint8))


def test_every_epoch_is_another_permutation_and_a_batch_depends_on_its_number_only():
    windows = numbered(7)

    def rows(first, last, seed=0):
        batches = [batch_at(windows, step, batch_size=3, seed=seed).tokens for step in range(first, last)]
        return (np.concatenate(batches)[:, 0] // 10).tolist()

    order = rows(0, 7)  # 21 windows: three epochs of seven, whose borders lie inside batches
    epochs = [order[0:7], order[7:14], order[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows(4, 7) == order[12:] and rows(0, 7, seed=1) != order
    batch = batch_at(windows, 5, batch_size=3, seed=0)
    assert [array.shape for array in batch] == [(3, 10)] * 3
    # Of some windows, it is the order of their places among them.
    some = np.array([9, 4, 2, 8, 0, 6, 5])
    batch = batch_at(numbered(10), 1, batch_size=3, seed=0, among=some)
    assert (batch.tokens[:, 0] // 10).tolist() == some[order[3:6]].tolist()
    batch = batch_at(windows, 5, batch_size=3, seed=0)
    # A batch of more windows than there are goes through several epochs.
    assert (batch_at(windows, 0, batch_size=21, seed=0).tokens[:, 0] // 10).tolist() == order


def test_the_position_is_where_the_order_has_come_to():
    windows, order = numbered(7), []
    for step in range(8):
        position = position_at(len(windows), step, 3)
        assert position == {"epoch": len(order) // 7, "window": len(order) % 7}
        order += batch_at(windows, step, batch_size=3, seed=0).tokens[:, 0].tolist()


def test_packed_documents_have_the_loss_that_they_have_alone(base, tmp_path):
    model = Llama.from_pretrained(base)
    rng = np.random.default_rng(0)
    files = [tmp_path / str(number) for number in range(4)]
    for file, length in zip(files, (10, 1, 18, 9), strict=True):  # the first three fill a window
        file.write_bytes(rng.integers(97, 123, length).astype(np.uint8).tobytes())
    windows = write_windows(
        files, byte_tokenizer(), tmp_path / "windows", context=32, eos_token_id=256, vocab_size=257
    )
    batch = windows[:]
    targets, counts = map(np.asarray, next_targets(*map(jnp.asarray, batch)))
    assert counts.sum() == batch.scored.sum() == 10 + 1 + 18 + 9

    packed = jax.jit(lambda: model(jnp.asarray(batch.tokens), segment_ids=jnp.asarray(batch.segment_ids)))()
    documents = [np.array([*file.read_bytes(), 256], np.int32) for file in files]
    rows = np.stack([np.pad(document, (0, 32 - len(document))) for document in documents])
    alone = jax.jit(lambda: model(rows))()

    def nll(logits, targets):
        logits = np.asarray(logits, np.float64)
        return (
            np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        )

    expected = [nll(alone[n, :-1], rows[n, 1:])[: len(d) - 1] for n, d in enumerate(documents)]
    np.testing.assert_allclose(nll(packed, targets)[counts], np.concatenate(expected), rtol=2e-5)


def test_the_digest_is_of_all_that_windows_are_made_of_and_not_of_names(tmp_path):
    def digest(*contents, tokenizer=None, context=8, eos_token_id: int | None = 256, suffix=".txt"):
        files = [tmp_path / f"{rng.integers(10**9)}{suffix}" for _ in contents]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        tokenizer = tokenizer or byte_tokenizer()
        return digest_data(files, tokenizer, context=context, eos_token_id=eos_token_id)

    rng = np.random.default_rng(0)  # other names every time
    shorter, other = byte_tokenizer(), byte_tokenizer()
    shorter.enable_truncation(3)
    other.add_tokens(["ab"])
    line = b'{"text": "ab"}'
    assert digest(b"ab", b"c") == digest(b"ab", b"c") == digest(b"ab", b"c", tokenizer=shorter)
    digests = [
        digest(b"ab", b"c"),
        digest(b"a", b"bc"),
        digest(b"c", b"ab"),
        digest(b"ab"),
        digest(b"ab", b"c", tokenizer=other),
        digest(b"ab", b"c", context=9),
        digest(b"ab", b"c", eos_token_id=None),
        digest(line),
        digest(line[:-1]),  # no JSON, and so a text
    ]
    assert len(set(digests)) == len(digests)
    assert digest(line) == digest(line, suffix=".jsonl")
    with pytest.raises(FileNotFoundError, match="no.txt does not exist"):
        digest_data([tmp_path / "no.txt"], byte_tokenizer(), context=8, eos_token_id=None)
