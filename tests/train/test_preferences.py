"""Learning from pairs of answers: DPO against its formula in float64, and runs that do it."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.models import Llama, byte_tokenizer
from jsparse.models.loss import next_targets, token_nll
from jsparse.models.preference import Pairs, most_pairs, pair_margins, preference_sums
from jsparse.texts.documents import read_samples
from jsparse.texts.reading import Reading
from jsparse.train import FinetuneConfig, MergeConfig, finetune, merge, open_windows, write_windows

END = 256
PAIRS = [
    {"prompt": f"{word}: ", "chosen": word, "rejected": word[::-1], "id": number}
    for number, word in enumerate(["cat", "dog", "tree", "house", "river", "stone", "bird", "salt"] * 3)
]


def write(folder, rows, name="pairs.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def config(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    return FinetuneConfig(
        model=base,
        data=[write(folder, PAIRS[:16])],
        eval_data=[write(folder, PAIRS[16:20], "held.jsonl")],
        output=folder / "out",
        context=32,
        dpo_beta=0.5,
        lora_rank=4,
        steps=8,
        batch_size=4,
        learning_rate=2e-2,
        warmup_steps=0,
        eval_every=4,
        checkpoint_every=3,
    )


@pytest.fixture(scope="module")
def run(config):
    return finetune(config, progress=False)


def logp(model, prompt, answer):
    """The log-probability of an answer and its end, in float64, from all logits."""
    tokens = np.array([[*prompt.encode(), *answer.encode(), END]])
    logits = np.asarray(model(jnp.asarray(tokens)), np.float64)[0]
    scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    start = len(prompt.encode())
    return sum(scores[at - 1, tokens[0, at]] for at in range(start, tokens.shape[1]))


def margins(model, rows):
    return np.array(
        [logp(model, r["prompt"], r["chosen"]) - logp(model, r["prompt"], r["rejected"]) for r in rows]
    )


def test_margins_are_those_of_answers_alone(base, tmp_path):
    """Packed, with shorter and longer questions, against each answer alone."""
    rows = PAIRS[:5] + [{"prompt": "x", "chosen": "yes, indeed", "rejected": ""}]
    windows = write_windows(
        [write(tmp_path, rows)],
        byte_tokenizer(),
        tmp_path / "windows",
        context=40,
        eos_token_id=END,
        vocab_size=257,
        reading=Reading(pairs=True),
    )
    model, batch = Llama.from_pretrained(base), windows[:]
    segment_ids = jnp.asarray(batch.segment_ids)
    targets, counts = next_targets(jnp.asarray(batch.tokens), segment_ids, jnp.asarray(batch.scored))
    hidden = model.hidden(jnp.asarray(batch.tokens), None, model.attend(None, segment_ids))
    found = pair_margins(token_nll(hidden, model.logits, targets), counts, segment_ids)
    assert found.margins.shape == (len(windows), most_pairs(40)) and found.exist.sum() == len(rows)
    assert np.allclose(np.asarray(found.margins)[np.asarray(found.exist)], margins(model, rows), atol=2e-4)
    assert not np.asarray(found.margins)[~np.asarray(found.exist)].any()


def test_the_loss_and_its_gradient_are_the_formulas():
    rng = np.random.default_rng(0)
    pi, ref = rng.standard_normal((2, 3, 4)).astype(np.float32) * 5
    exist = rng.random((3, 4)) < 0.7

    def loss(margins):
        return preference_sums(Pairs(margins, jnp.asarray(exist)), jnp.asarray(ref), beta=0.3).loss

    rewards = 0.3 * (pi.astype(np.float64) - ref)[exist]
    sums = preference_sums(Pairs(jnp.asarray(pi), jnp.asarray(exist)), jnp.asarray(ref), beta=0.3)
    assert np.allclose(sums.loss, -np.log(1 / (1 + np.exp(-rewards))).sum(), rtol=1e-6)
    assert np.allclose(sums.margin, rewards.sum(), rtol=1e-5) and sums.right == (rewards > 0).sum()
    expected = np.where(exist, -0.3 / (1 + np.exp(0.3 * (pi.astype(np.float64) - ref))), 0.0)
    assert np.allclose(jax.grad(loss)(jnp.asarray(pi)), expected, rtol=1e-5)


def test_a_run_learns_what_is_preferred(config, run):
    lines = lines_of(config.output)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # the model is still its own reference
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-6) and lines[0]["eval_before"]["pairs"] == 4
    assert lines[-1]["loss"] < 0.3 and lines[-1]["reward_accuracy"] == 1.0
    before, after = Llama.from_pretrained(config.model), Llama.from_pretrained(config.output)
    assert (margins(after, PAIRS[:16]) > margins(before, PAIRS[:16])).all()


def test_held_out_pairs_are_measured_with_full_attention(config, run):
    (last,) = [line["eval"] for line in lines_of(config.output) if line["step"] == run.exported_step]
    before, after = Llama.from_pretrained(config.model), Llama.from_pretrained(config.output)
    rewards = config.dpo_beta * (margins(after, PAIRS[16:20]) - margins(before, PAIRS[16:20]))
    assert last["loss"] == pytest.approx(np.log1p(np.exp(-rewards)).mean(), rel=1e-3)
    assert last["margin"] == pytest.approx(rewards.mean(), rel=1e-3, abs=1e-3)
    assert last["accuracy"] == (rewards > 0).mean() and last["pairs"] == 4


@pytest.mark.parametrize("changes", [{"micro_batches": 2}, {"attention": "shifted", "micro_batches": 4}])
def test_the_first_steps_in_parts(config, run, tmp_path, changes):
    short = dataclasses.replace(config, **changes, output=tmp_path / "out", steps=2)
    losses = finetune(short, progress=False).losses
    if "attention" not in changes:
        assert np.allclose(losses, run.losses[:2], rtol=1e-4)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)


def test_an_interrupted_run_goes_on_bit_for_bit(config, run, tmp_path):
    part = dataclasses.replace(config, output=tmp_path / "out", steps=3)
    finetune(part, progress=False)
    result = finetune(dataclasses.replace(part, steps=8), progress=False)
    assert result.losses == run.losses
    with pytest.raises(ValueError, match="its dpo_beta is 0.5, here 0.4"):
        finetune(dataclasses.replace(part, dpo_beta=0.4), progress=False)
    merge(MergeConfig(run=part.output, output=tmp_path / "adapter", adapter=True))


CHAT = [{"role": "user", "content": "hi"}]
GOOD, BAD = {"role": "assistant", "content": "yo"}, {"role": "assistant", "content": "no!"}
EMPTY, OTHER = {"role": "assistant", "content": ""}, {"role": "user", "content": "who?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": CHAT, "chosen": "yo", "rejected": "no!"},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {
            "prompt": "hi",
            "chosen": [*CHAT, GOOD],
            "rejected": [*CHAT, BAD],
            "messages": [*CHAT, GOOD],
            "score": 1,
        },
        {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
        {"prompt": CHAT, "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
        {"instruction": "hi", "input": "", "chosen": "yo", "rejected": "no!"},
    ],
)
def test_pairs_that_people_have(tmp_path, row):
    settings = {"eos_token_id": END, "vocab_size": 257, "reading": Reading(pairs=True)}
    (sample,) = read_samples([write(tmp_path, [row])], byte_tokenizer(), **settings)
    prompt = b"### Instruction:\nhi\n\n### Response:\n"
    assert sample.tokens.tolist() == [*prompt, *b"yo", END, *prompt, *b"no!", END]
    assert sample.second == len(prompt) + 3 and sample.scored is not None
    assert np.flatnonzero(sample.scored).tolist() == [35, 36, 37, *range(73, 77)]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (PAIRS[:3], {"dpo_beta": None}, "is a pair of answers, one preferred; --dpo-beta 0.1 learns"),
        ([{"text": "a"}] * 40, {}, r"has the fields \['text'\]; with --dpo-beta a row must have"),
        ([PAIRS[0] | {"rejected": "cat"}], {}, "line 1: the two answers are the same"),
        (
            [PAIRS[0] | {"chosen": "c" * 20}],
            {},
            "line 1 has 35 tokens, the question with each of its answers",
        ),
        ([PAIRS[0] | {"chosen": 5}], {}, '"chosen" must be a text or a list of messages, not 5'),
        ([PAIRS[0] | {"rejected": None}], {}, '"rejected" must be a text or a list of messages, not null'),
        ([PAIRS[0] | {"chosen": " "}], {}, '"chosen" says nothing, and a model that prefers it would not'),
        ([{"chosen": [*CHAT, EMPTY], "rejected": [*CHAT, BAD]}], {}, '"chosen" says nothing'),
        (
            [PAIRS[0] | {"chosen": [GOOD]}],
            {},
            '"chosen" is messages and "rejected" a text; both must be the same kind of answer',
        ),
        (
            [{"chosen": [*CHAT, GOOD], "rejected": [OTHER, BAD]}],
            {},
            r"chosen\[0\] and rejected\[0\] differ and are no answers; both must answer one question",
        ),
        (
            [{"chosen": [*CHAT, GOOD, OTHER, GOOD], "rejected": [*CHAT, GOOD]}],
            {},
            r"chosen\[2\] and rejected\[2\] differ and are no answers",
        ),
        ([{"chosen": "a", "rejected": "b"}], {}, '"chosen" answers nothing; with --dpo-beta'),
        (PAIRS[:3], {"loss_on": "all"}, "loss_on='all' is not for dpo_beta"),
        (PAIRS[:3], {"dpo_beta": 0.0}, "dpo_beta must be a number > 0, not 0.0"),
    ],
)
def test_what_is_refused(config, tmp_path, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(
            dataclasses.replace(
                config,
                data=[write(tmp_path, rows)],
                eval_data=(),
                eval_every=None,
                output=tmp_path / "o",
                **changes,
            ),
            progress=False,
        )
    assert not (tmp_path / "o").exists()


def test_talks_may_go_on_differently_after_an_answer_that_differs(tmp_path):
    settings = {"eos_token_id": END, "vocab_size": 257, "reading": Reading(pairs=True)}
    for rows in (
        {"chosen": [*CHAT, GOOD, OTHER, BAD], "rejected": [*CHAT, BAD, *CHAT, GOOD]},
        {"chosen": [*CHAT, GOOD, *CHAT, GOOD], "rejected": [*CHAT, BAD]},
        {"prompt": "a", "chosen": "b", "rejected": ""},
    ):
        (sample,) = read_samples([write(tmp_path, [rows])], byte_tokenizer(), **settings)
        assert sample.targets


def test_pairs_that_are_too_long_are_left_out_and_not_cut(tmp_path):
    rows = [*PAIRS[:4], PAIRS[0] | {"chosen": "c" * 30}]
    file = write(tmp_path, rows)
    for too_long in ("skip", "truncate"):
        write_windows(
            [file],
            byte_tokenizer(),
            tmp_path / too_long,
            context=32,
            eos_token_id=END,
            vocab_size=257,
            reading=Reading(pairs=True, too_long=too_long),
        )
        assert len(open_windows(tmp_path / too_long)) == 4


def test_held_out_pairs_that_are_trained_on_are_counted_as_pairs(config, tmp_path, caplog):
    """Not a pair of which one answer is in a pair that is trained on, nor one whose answers are exchanged."""
    exchanged = PAIRS[2] | {"chosen": PAIRS[2]["rejected"], "rejected": PAIRS[2]["chosen"]}
    held_out = [PAIRS[0], PAIRS[1] | {"rejected": "cow"}, exchanged, PAIRS[7] | {"prompt": "pepper: "}]
    shared = dataclasses.replace(
        config, eval_data=[write(tmp_path, held_out, "held.jsonl")], output=tmp_path / "o", steps=1
    )
    with caplog.at_level(logging.WARNING, "jsparse"):
        finetune(shared, progress=False)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "1 of 4 samples of eval_data are in data too" in message
