"""How training data are read: names of fields, what is learned, and what becomes of rows that do not fit."""

import dataclasses
from collections.abc import Mapping

from jsparse.checks import require_choice
from jsparse.texts.shapes import FIELDS


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows become samples.

    - fields: other names for fields, ours to theirs: ``{"prompt": "question"}``.
    - loss_on: "answers" learns completions and what the assistant says; "all" learns prompts too.
    - bad_rows: "error" refuses data with rows that cannot be read; "skip" leaves them out and counts them.
    - too_long: the same for answers that do not fit the context with their prompt; "truncate" cuts their end.
    - pairs: rows are pairs of answers, one preferred (``chosen`` and ``rejected``), and nothing else.
    - mixed: whether one file may hold rows of several shapes.

    Raises ValueError, naming the field, the value and what is allowed.
    """

    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    loss_on: str = "answers"
    bad_rows: str = "error"
    too_long: str = "error"
    pairs: bool = False
    mixed: bool = True

    def __post_init__(self):
        require_choice(self, "loss_on", "answers", "all")
        require_choice(self, "bad_rows", "error", "skip")
        require_choice(self, "too_long", "error", "skip", "truncate")
        strangers = sorted(set(self.fields) - set(FIELDS))
        if strangers:
            raise ValueError(
                f"fields: {', '.join(strangers)} cannot be read from other names; allowed are "
                f"{', '.join(FIELDS)}, each before its name in the rows"
            )
        theirs = list(self.fields.values())
        twice = sorted({name for name in theirs if theirs.count(name) > 1})
        if twice:
            raise ValueError(f"fields reads {', '.join(twice)} as several fields; each must be read once")
