"""The data of the recipe: long documents, and conversations about long texts, each with a part held out.

    python examples/long_chat/make_data.py --output long-chat/data

The documents are the long modules of Python's standard library. In a conversation the user shows a part of
such modules in which words are explained, "# amber is tulip.", and asks about the words; the assistant
answers. What is held out is of modules that the shipped model never saw. The seed decides what is drawn.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from jsparse.checks import require_integers, require_new_folder
from jsparse.models import load_tokenizer, shipped_model
from jsparse.texts.corpus import standard_library_files
from jsparse.texts.tasks import HEADER, KEYS, VALUES, statement

SMALL_TALK = {
    "Hello!": "Hello! Show me a text, and ask me about its words.",
    "Who are you?": "I am a very small model. I find words in long texts.",
    "What can you do?": "I find words in long texts. Show me one.",
    "Thank you!": "You are welcome.",
}
TURNS = 8  # questions per conversation
SPACING = 96  # tokens of text per word that is explained
SHORTEST = 256  # tokens of a text
AROUND = 320  # tokens of a conversation that are not its text, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """How much is made, and how long it is."""

    output: Path
    """A new folder for documents.jsonl, chats.jsonl, the same two with -held-out, and a conversation to try:
    shown.json, its first message, and asked.txt, the next questions."""
    context: int = 4096
    """Tokens of the shortest document, and of the longest conversation."""
    chats: int = 480
    """Conversations to learn from. A twentieth as many are held out."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self):
        object.__setattr__(self, "output", Path(self.output))
        require_integers(self, SHORTEST + AROUND, "context")
        require_integers(self, 20, "chats")


class Texts:
    """Stretches of modules with words explained in them, measured in tokens of the shipped model."""

    def __init__(self, files: tuple[Path, ...]):
        tokenizer = load_tokenizer(shipped_model())
        self.count = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
        self.modules = [file.read_text(encoding="utf-8") for file in files]
        self.lines = [line for text in self.modules for line in text.splitlines(True)]
        encoded = tokenizer.encode_batch(self.lines, add_special_tokens=False)
        self.ends = np.cumsum([len(line.ids) for line in encoded])  # tokens up to the end of each line

    def draw(self, tokens: int, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
        """A text of nearly as many tokens, and its words with what they are."""
        keys = rng.permutation(KEYS)[: max(TURNS, tokens // SPACING)]
        words = {str(key): str(rng.choice(VALUES)) for key in keys}
        said = [statement(*word) for word in words.items()]
        room = tokens - self.count(HEADER + "".join(said))
        first = int(rng.integers(np.searchsorted(self.ends, self.ends[-1] - room)))
        last = int(np.searchsorted(self.ends, self.ends[first] + room))
        pieces = [*self.lines[first + 1 : last], *said]
        place = np.r_[np.arange(first + 1, last), rng.integers(first + 1, last, size=len(said))]
        return HEADER + "".join(pieces[i] for i in np.argsort(place, kind="stable")), words


def documents(texts: Texts, context: int) -> Iterator[dict]:
    """The modules that are longer than the context, whole."""
    for text in texts.modules:
        if texts.count(text) > context:
            yield {"text": text}


def ask(key: str) -> str:
    return f"What is the word {key}?"


def answer(key: str, value: str) -> str:
    """What the assistant says. After a space, a word is one token of the shipped model, as it is in texts."""
    return f"The word {key} is {value}."


def chats(texts: Texts, number: int, context: int, rng: np.random.Generator) -> Iterator[dict]:
    """Conversations in which the user shows a text of any length and asks for words, one per turn."""
    for _ in range(number):
        tokens = np.exp(rng.uniform(np.log(SHORTEST), np.log(context - AROUND)))
        text, words = texts.draw(int(tokens), rng)
        asked = [str(key) for key in rng.permutation([*words])[:TURNS]]
        turns = [(ask(key), answer(key, words[key])) for key in asked]
        turns[0] = (f"{text}\n{turns[0][0]}", turns[0][1])
        if rng.random() < 0.3:
            said = str(rng.choice([*SMALL_TALK]))
            turns.insert(0 if said == "Hello!" else len(turns), (said, SMALL_TALK[said]))
        yield {
            "messages": [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
        }


def main() -> None:
    config = tyro.cli(Data, description=__doc__)
    require_new_folder(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    kinds = zip(
        standard_library_files(packages=True),
        ("", "-held-out"),
        (config.chats, config.chats // 20),
        strict=True,
    )
    for seed, (files, ending, number) in enumerate(kinds):
        texts, rng = Texts(files), np.random.default_rng([config.seed, seed])
        rows = {
            "documents": documents(texts, config.context),
            "chats": chats(texts, number, config.context, rng),
        }
        for name, made in rows.items():
            lines = [json.dumps(row) + "\n" for row in made]
            file = config.output / f"{name}{ending}.jsonl"
            file.write_text("".join(lines), encoding="utf-8")
            print(f"{file}: {len(lines)} rows")
    first = max(chats(texts, 32, config.context, rng), key=lambda chat: len(chat["messages"][0]["content"]))
    shown, *asked = (message["content"] for message in first["messages"] if message["role"] == "user")
    (config.output / "shown.json").write_text(
        json.dumps([{"role": "user", "content": shown}]), encoding="utf-8"
    )
    (config.output / "asked.txt").write_text("\n".join(asked[:3]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
