import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jsparse.models import byte_tokenizer
from jsparse.train.data import windows as windows_module
from jsparse.train.data.overlap import count_shared
from jsparse.train.data.windows import Windows, write_windows

END = 256


def written(folder, name, texts, context):
    file = folder / f"{name}.jsonl"
    lines = [
        {"text": text} if isinstance(text, str) else {"prompt": text[0], "completion": text[1]}
        for text in texts
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_windows(
        [file],
        byte_tokenizer(),
        folder / name,
        context=context,
        eos_token_id=END,
        vocab_size=257,
        may_be_short=True,
    )


texts = st.text("ab", min_size=1, max_size=6)
samples = st.lists(texts | st.tuples(st.just("a"), st.text("ab", min_size=1, max_size=3)), min_size=1)


@given(samples, samples, st.integers(5, 9), st.integers(1, 20))
def test_samples_are_found_however_they_lie_in_windows(tmp_path_factory, some, others, context, at_a_time):
    folder = tmp_path_factory.mktemp("windows")
    held_out = written(folder, "held", some, context)
    training = written(folder, "training", others, context + 1)
    before, windows_module._TOKENS_A_WRITE = windows_module._TOKENS_A_WRITE, at_a_time
    try:
        joined = [sample.tolist() for sample in held_out.samples()]
        found = count_shared(held_out, training)
    finally:
        windows_module._TOKENS_A_WRITE = before
    assert joined == [[*"".join(sample).encode(), END] for sample in some]
    known = {"".join(sample) for sample in others}
    assert found == (sum("".join(sample) in known for sample in some), len(some))


def test_answers_are_the_scored_tokens_of_prompts_completions(tmp_path):
    windows = written(tmp_path, "one", ["ab", ("cd", "e"), "f"], 6)
    assert windows[:].tokens.tolist() == [[97, 98, END, 0, 0, 0], [99, 100, 101, END, 102, END]]
    assert windows.answers([0, 1]).astype(int).tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0]]
    assert not np.any(windows.answers([0, 1]) & ~windows[:].scored)


def test_windows_without_a_target_are_told_apart(monkeypatch):
    monkeypatch.setattr(windows_module, "_TOKENS_A_WRITE", 4)
    # A start, then padding; two targets; only a prompt; a first token, which nothing in its window predicts.
    flags = np.array([[1, 4, 4], [2, 2, 2], [1, 0, 0], [2, 4, 4], [1, 0, 2]], np.uint8)
    windows = Windows(np.zeros((5, 3), np.uint16), flags)
    assert windows.with_targets().tolist() == [1, 4]
    assert windows[:].scored.any(axis=1).tolist() == [False, True, False, False, True]
