"""What the recipe changed: held-out loss, recall, and answers in conversations, by length.

    python examples/long_chat/measure.py --folder long-chat

Four models are measured: the shipped one as it is, the same with its RoPE extended and nothing trained, the
one that was extended, and the assistant. All read the same held-out texts. Writes results.json, table.md and
two figures into the folder.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from make_data import AROUND, TURNS, Texts, answer, ask
from tokenizers import Tokenizer

from jsparse.checks import require_integers
from jsparse.evaluate import greedy_answers
from jsparse.evaluate.answers import Question
from jsparse.models import Llama, load_chat_template, load_tokenizer, shipped_model
from jsparse.reports.console import write_json
from jsparse.reports.figures import COLORS, length_axis, new_figure, require_matplotlib, save, tidy
from jsparse.reports.machine import describe_machine, machine_line
from jsparse.serve import CacheConfig
from jsparse.texts.corpus import standard_library_files
from jsparse.texts.tasks import Material, recall, score
from jsparse.train import evaluate_perplexity, read_documents

BUDGET, SINK = 512, 64
CACHES = {
    "all": CacheConfig(policy="dense"),
    "chosen pages": CacheConfig(budget=BUDGET),
    "first and last": CacheConfig(policy="streaming", sink=SINK, window=BUDGET - SINK),
}
ABOUT = {
    "all": "everything",
    "chosen pages": f"{BUDGET} tokens of chosen pages",
    "first and last": f"the first {SINK} and last {BUDGET - SINK} tokens",
}
ROWS = {
    "shipped": "the shipped model as it is",
    "rope": "RoPE extended, nothing trained",
    "extended": "extended",
    "assistant": "assistant",
}
COLOR = dict(zip(ROWS, (COLORS["grey"], COLORS["orange"], COLORS["blue"], COLORS["vermilion"]), strict=True))
TURN = 24  # tokens of a question and of what the template puts around it, at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """How much is measured."""

    folder: Path
    """The folder of the recipe, with extended/ and assistant/ in it."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of the texts, up to the context of the models."""
    windows: int = 8
    """Windows of held-out text for each loss."""
    samples: int = 16
    """Texts for each length."""

    def __post_init__(self):
        object.__setattr__(self, "folder", Path(self.folder))
        require_integers(self, 1, "windows", "samples")


def load_models(folder: Path) -> dict[str, Llama]:
    """The four models, by the names in ``ROWS``; all have the positions of the extended one."""
    shipped, rope = (Llama.from_pretrained(shipped_model(), dtype="float32") for _ in range(2))
    extended, assistant = (
        Llama.from_pretrained(folder / name, dtype="float32") for name in ("extended", "assistant")
    )
    positions = extended.config.max_position_embeddings
    shipped.config = dataclasses.replace(shipped.config, max_position_embeddings=positions)
    rope.config = extended.config
    return dict(zip(ROWS, (shipped, rope, extended, assistant), strict=True))


def measure(config: Measure, tokenizer: Tokenizer) -> dict[str, Any]:
    """Every number: ``loss`` and ``recall`` by model and length, ``chat`` by cache and length."""
    _, files = standard_library_files()
    held_out = config.folder / "data" / "documents-held-out.jsonl"
    models = load_models(config.folder)
    vocab_size = models["assistant"].config.vocab_size
    text = np.concatenate(read_documents([held_out], tokenizer, eos_token_id=None, vocab_size=vocab_size))
    text = text[: config.windows * max(config.lengths)]
    questions = {length: recall_questions(config, tokenizer, text, length) for length in config.lengths}
    chats = [
        right(models["assistant"], *chat_questions(config, Texts(files), length), CACHES, tokenizer)
        for length in config.lengths
    ]
    return {
        "loss": {
            name: [loss(model, text, length) for length in config.lengths] for name, model in models.items()
        },
        "recall": {
            name: [
                right(model, *questions[length], {"all": CACHES["all"]}, tokenizer)["all"]
                for length in config.lengths
            ]
            for name, model in models.items()
        },
        "chat": {name: [answered[name] for answered in chats] for name in CACHES},
    }


def loss(model: Llama, text: np.ndarray, length: int) -> float:
    """Nats per token of the held-out text, in windows side by side."""
    return evaluate_perplexity(
        model, text, context=length, stride=length, scoring="all", batch_size=2, progress=False
    ).nll


def recall_questions(
    config: Measure, tokenizer: Tokenizer, text: np.ndarray, length: int
) -> tuple[list[Question], list[str]]:
    """The task "recall" of ``jsparse evaluate scoreboard``: one of many words is asked for."""
    material = Material(lambda part: tokenizer.encode(part, add_special_tokens=False).ids, text)
    rng = np.random.default_rng(length)
    examples = [recall(material, length, rng) for _ in range(config.samples)]
    questions = [Question(example.context, example.tail, len(example.answer)) for example in examples]
    return questions, [example.expected[0] for example in examples]


def chat_questions(config: Measure, texts: Texts, length: int) -> tuple[list[Question], list[str]]:
    """Conversations of ``length`` tokens, as the assistant is served with them, at the first question and at
    the last. The question is fed to the decode step, where a sparse cache chooses what it reads.
    """
    template = load_chat_template(config.folder / "assistant")
    rng = np.random.default_rng(length)
    questions, expected = [], []
    for sample in range(config.samples):
        text, words = texts.draw(length - AROUND, rng)
        asked = [str(key) for key in rng.permutation([*words])[: TURNS if sample % 2 else 1]]
        messages = [{"role": "user", "content": f"{text}\n{ask(asked[0])}"}]
        for before, key in itertools.pairwise(asked):
            messages.append({"role": "assistant", "content": answer(before, words[before])})
            messages.append({"role": "user", "content": ask(key)})
        ids = np.array(template.encode(messages, add_generation_prompt=True), np.int32)
        questions.append(Question(ids[:-TURN], ids[-TURN:], 16))
        expected.append(words[asked[-1]])
    return questions, expected


def right(
    model: Llama,
    questions: Sequence[Question],
    expected: Sequence[str],
    caches: Mapping[str, CacheConfig],
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """The fraction of questions whose answer, up to the end token, has the word that is expected."""
    found = greedy_answers(model, questions, list(caches.values()), batch_size=4)
    ends = model.config.eos_token_ids
    scores = {}
    for name, answers in zip(caches, found, strict=True):
        said = [list(itertools.takewhile(lambda id: id not in ends, answer)) for answer in answers]
        texts = [tokenizer.decode(ids) for ids in said]
        scores[name] = float(
            np.mean([score(text, [word]) for text, word in zip(texts, expected, strict=True)])
        )
    return scores


def markdown(config: Measure, results: dict[str, Any]) -> str:
    """The three tables in one: a line for each model or cache, a column for each length."""
    lines = [
        f"| tokens | {' | '.join(map(str, config.lengths))} |",
        "|---" * (1 + len(config.lengths)) + "|",
        "| *loss of held-out modules (nats per token)* |" + " |" * len(config.lengths),
    ]
    for name, values in results["loss"].items():
        lines.append(f"| {ROWS[name]} | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines.append("| *one of many words found, as in pretraining* |" + " |" * len(config.lengths))
    for name, values in results["recall"].items():
        lines.append(f"| {ROWS[name]} | {' | '.join(f'{value:.0%}' for value in values)} |")
    lines.append("| *right answers of the assistant, where it reads* |" + " |" * len(config.lengths))
    for cache, about in ABOUT.items():
        lines.append(f"| {about} | {' | '.join(f'{value:.0%}' for value in results['chat'][cache])} |")
    return "\n".join(lines) + "\n"


def draw_answers(config: Measure, results: dict[str, Any], path: Path) -> None:
    figure, (loss_axes, found, chat) = new_figure(1, 3, width=12, height=3.8)
    for name, label in ROWS.items():
        style = {"marker": "o", "color": COLOR[name], "label": label}
        loss_axes.plot(config.lengths, results["loss"][name], **style)
        found.plot(config.lengths, results["recall"][name], **style)
    for cache, color in zip(ABOUT, (COLORS["black"], COLORS["green"], COLORS["purple"]), strict=True):
        chat.plot(config.lengths, results["chat"][cache], marker="o", color=color, label=ABOUT[cache])
    loss_axes.set_ylabel("loss of held-out modules (nats per token)")
    found.set_ylabel("words found, as in pretraining")
    chat.set_ylabel("right answers, where the assistant reads")
    for axes in (loss_axes, found, chat):
        length_axis(axes, config.lengths, "tokens")
        tidy(axes)
        axes.legend(frameon=False, fontsize=8)
    for axes in (found, chat):
        axes.set_ylim(-0.05, 1.05)
    save(figure, path, dpi=150)


def draw_training(folder: Path, path: Path) -> None:
    """The loss of each step, and of what is held out, of both runs."""
    figure, panels = new_figure(1, 2, width=10, height=3.8)
    for axes, name in zip(panels, ("extended", "assistant"), strict=True):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        held_out = [(line["step"], line["eval"]["loss"]) for line in lines if "eval" in line]
        held_out.insert(0, (0, lines[0]["eval_before"]["loss"]))
        axes.plot(
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
            color=COLORS["grey"],
            label="training",
        )
        axes.plot(*zip(*held_out, strict=True), marker="o", color=COLOR[name], label="held out")
        axes.set_xlabel(f"step ({ROWS[name]})")
        axes.set_ylabel("loss (nats per target)")
        tidy(axes)
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    save(figure, path, dpi=150)


def main() -> None:
    config = tyro.cli(Measure, description=__doc__)
    require_matplotlib("measure.py draws two figures")
    started = time.perf_counter()
    results = measure(config, load_tokenizer(config.folder / "assistant"))
    results |= {"machine": describe_machine(), "seconds": round(time.perf_counter() - started, 1)}
    write_json(config.folder / "results.json", results)
    table = markdown(config, results)
    (config.folder / "table.md").write_text(table, encoding="utf-8")
    draw_training(config.folder, config.folder / "training.png")
    draw_answers(config, results, config.folder / "answers.png")
    print(table, machine_line(results["machine"]), sep="\n")


if __name__ == "__main__":
    main()
