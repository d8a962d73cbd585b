"""The adapter to lm-evaluation-harness: what it scores and generates is what the model alone says."""

import importlib.util
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jsparse.evaluate.lm_eval import (
    JsparseLM,
    Wish,
    answer,
    encode_pair,
    keep_end,
    read_wish,
    rolling_windows,
    score_continuation,
)
from jsparse.extras import MissingExtra
from jsparse.models import Llama, byte_tokenizer
from jsparse.serve import CacheConfig, SamplingParams, decode_logits, generate

installed = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not installed, reason="lm_eval is not installed")
SPARSE = CacheConfig(budget=8, page_size=8, logical_page_size=4)
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_model):
    folder = tmp_path_factory.mktemp("lm_eval")
    save_tiny_model(folder)
    return folder


def request(*arguments):
    """What the adapter reads of the harness's Instance."""
    return SimpleNamespace(args=arguments)


def expected_score(log_probabilities, context, continuation):
    """From log-probabilities [T, vocab] of the whole text, without a cache."""
    rows = log_probabilities[len(context) - 1 : len(context) + len(continuation) - 1]
    return rows[np.arange(len(continuation)), continuation].sum()


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float64), axis=-1))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 5), (2, 1), (20, 17), (40, 3)])
def test_a_dense_cache_scores_as_the_model(model, uncached, before, after):
    tokens = np.random.default_rng(before).integers(0, 60, before + after).tolist()
    context, continuation = tokens[:before], tokens[before:]
    score, greedy = score_continuation(model, context, continuation, CacheConfig(budget=None), 64)
    log_probabilities = log_softmax(uncached(model, tokens))
    assert score == pytest.approx(expected_score(log_probabilities, context, continuation), abs=1e-4)
    best = log_probabilities[before - 1 : before + after - 1].argmax(-1).tolist()
    assert greedy == (best == continuation)


def test_what_greedy_decoding_gives_is_greedy(model):
    cache, prompt = CacheConfig(budget=None), [3, 14, 15, 9, 26]
    (tokens,) = generate(model, [prompt], 4, cache=cache).tokens
    assert score_continuation(model, prompt, tokens, cache, 64)[1]
    assert not score_continuation(model, prompt, [*tokens[:-1], (tokens[-1] + 1) % 60], cache, 64)[1]


def test_a_sparse_cache_scores_by_its_decode_steps(model):
    tokens = np.random.default_rng(0).integers(0, 60, 50)
    logits = decode_logits(model, tokens[:39], tokens[39:-1], SPARSE)
    expected = log_softmax(logits)[np.arange(10), tokens[40:]].sum()
    score, _ = score_continuation(model, tokens[:40].tolist(), tokens[40:].tolist(), SPARSE, 64)
    dense, _ = score_continuation(model, tokens[:40].tolist(), tokens[40:].tolist(), CacheConfig(), 64)
    assert score == pytest.approx(expected, abs=1e-4) and abs(score - dense) > 1e-3


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 30])
def test_windows_score_each_token_once(length):
    windows = list(rolling_windows(list(range(length)), prefix=99, max_length=8))
    assert [token for _, continuation in windows for token in continuation] == list(range(length))
    text = [99, *range(length)]
    for context, continuation in windows:
        joined = [*context, *continuation]
        assert 1 <= len(context) and len(joined) <= 8 + 1
        start = text.index(context[0])
        assert text[start : start + len(joined)] == joined
    if length > 8:
        assert len(windows[-1][0]) + len(windows[-1][1]) == 9  # all the context that fits


def test_windows_are_the_harness_s_own():
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 8, 9, 30):
        tokens = list(range(length))
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 99, 8, 1))
        assert list(rolling_windows(tokens, 99, 8)) == list(theirs)


def test_texts_end_before_their_stop_strings(model):
    """Prompts of one batch, each with its own; what is generated is what generate gives."""
    tokenizer, cache = byte_tokenizer(), CacheConfig(budget=None)
    prompts = [[1, 2, 3], [4, 5], [6]]
    whole = [tokenizer.decode(tokens) for tokens in generate(model, prompts, 12, cache=cache).tokens]
    stops = [(whole[0][5],), (), ("never", whole[2][2:4])]
    batch = [(prompt, Wish(12, stop, GREEDY)) for prompt, stop in zip(prompts, stops, strict=True)]
    texts = answer(model, tokenizer, batch, cache)
    assert texts == [
        whole[0][: whole[0].index(whole[0][5])],
        whole[1],
        whole[2][: whole[2].index(stops[2][1])],
    ]


def test_wishes_are_read_as_the_harness_reads_them():
    assert read_wish({}, 7) == Wish(7, (), GREEDY)
    assert read_wish({"until": ["a", ""], "max_new_tokens": 3}, 7) == Wish(3, ("a",), GREEDY)
    assert read_wish({"do_sample": False, "temperature": 0.8}, 7).sampling == GREEDY
    assert read_wish({"temperature": 0.8, "top_k": 5}, 7).sampling == SamplingParams(temperature=0.8, top_k=5)
    assert read_wish({"do_sample": True}, 7).sampling == SamplingParams(temperature=1.0)
    with pytest.raises(ValueError, match="generation keyword num_beams=4 is unknown; allowed are until"):
        read_wish({"num_beams": 4}, 7)


def test_pairs_and_what_does_not_fit(model):

    def encode(text):
        return byte_tokenizer().encode(text).ids

    assert encode_pair(encode, "a b ", "c") == (encode("a b"), encode(" c"))
    assert keep_end([1, 2, 3], 2, 8) == [1, 2, 3]
    with pytest.raises(ValueError, match="8 tokens after a context must be less than max_length=8"):
        keep_end([1], 8, 8)
    with pytest.raises(ValueError, match="continuation must be at least one token"):
        score_continuation(model, [1], [], CacheConfig(), 8)


@pytest.mark.skipif(installed, reason="lm_eval is installed")
def test_without_the_harness_its_extra_is_named(folder):
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[lm-eval\]'"):
        JsparseLM(folder)


@needs_harness
def test_arguments_out_of_range_are_refused(folder):
    with pytest.raises(ValueError, match="cache.batch=4 must be None: give batch_size"):
        JsparseLM(folder, CacheConfig(batch=4))
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        JsparseLM(folder, batch_size=0)
    with pytest.raises(ValueError, match="max_length must be 2 to 64 or None, not 65"):
        JsparseLM(folder, max_length=65)
    with pytest.raises(ValueError, match="prefix_token_id must be 0 to 256, not 257"):
        JsparseLM(folder, prefix_token_id=257)
    with pytest.raises(ValueError, match="prefix_token_id=None must be given"):
        JsparseLM(folder).loglikelihood_rolling([request("text")])


@needs_harness
def test_the_methods_answer_requests_in_their_order(folder):
    model, tokenizer = Llama.from_pretrained(folder), byte_tokenizer()
    lm = JsparseLM(folder, CacheConfig(budget=None), batch_size=2, prefix_token_id=256)

    pairs = [("def f", "(x):"), ("", "import"), ("return ", "0")]
    for (context, continuation), (score, _) in zip(
        pairs, lm.loglikelihood([request(*pair) for pair in pairs]), strict=True
    ):
        tokens = tokenizer.encode(context + continuation).ids
        before = len(tokenizer.encode(context.rstrip()).ids)
        tokens, before = ([256, *tokens], 1) if not context else (tokens, before)
        log_probabilities = log_softmax(model(np.array([tokens]))[0])
        expected = expected_score(log_probabilities, tokens[:before], tokens[before:])
        assert score == pytest.approx(expected, abs=1e-3)

    (score,) = lm.loglikelihood_rolling([request("def f(x):")])
    tokens = [256, *tokenizer.encode("def f(x):").ids]
    expected = expected_score(log_softmax(model(np.array([tokens]))[0]), tokens[:1], tokens[1:])
    assert score == pytest.approx(expected, abs=1e-3)

    asked = [("def f", {"until": ["zz"], "max_gen_toks": 6}), ("x", {"max_gen_toks": 3}), ("import os", {})]
    lm.max_new_tokens = 6
    texts = lm.generate_until([request(*one) for one in asked])
    for (context, keywords), text in zip(asked, texts, strict=True):
        prompt, limit = tokenizer.encode(context).ids, keywords.get("max_gen_toks", 6)
        (tokens,) = generate(model, [prompt], limit, cache=CacheConfig(budget=None)).tokens
        assert text == tokenizer.decode(tokens)

    with pytest.warns(UserWarning, match="1 of 2 contexts are too long, the longest with 100 tokens"):
        cut, same = lm.loglikelihood([request("a" * 100, "b"), request("a" * 64, "b")])
    assert cut[0] == pytest.approx(same[0], abs=1e-4)


@needs_harness
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_runs_a_task_of_its_own_kind(folder, tmp_path):
    """A task in files, read by the harness itself, through simple_evaluate."""
    import lm_eval  # type: ignore
    from lm_eval.tasks import TaskManager  # type: ignore

    rows = [{"q": "def", "a": " f", "b": " g"}, {"q": "import", "a": " os", "b": " re"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}"}
    common["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}  # type: ignore
    choice = common | {"task": "tiny_choice", "output_type": "multiple_choice", "doc_to_target": 0}
    choice |= {"doc_to_choice": ["{{a}}", "{{b}}"], "metric_list": [{"metric": "acc"}]}
    text = common | {"task": "tiny_text", "output_type": "generate_until", "doc_to_target": "{{a}}"}
    text |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    text |= {"metric_list": [{"metric": "exact_match"}]}
    for task in (choice, text):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    found = lm_eval.simple_evaluate(
        model=JsparseLM(folder, SPARSE),
        tasks=["tiny_choice", "tiny_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    assert 0 <= found["results"]["tiny_choice"]["acc,none"] <= 1
    assert 0 <= found["results"]["tiny_text"]["exact_match,none"] <= 1
