"""What reading training data finds: files, shapes, counts, a first sample, and rows that cannot be used."""

import dataclasses
import re
from collections import Counter
from typing import Any

_FORMS = {
    "template": "by the model's chat template",
    "plain": "in Alpaca's plain form, for the model has no chat template",
}
LIMIT = 20  # places that are named; more are counted


@dataclasses.dataclass
class Problems:
    """Rows of one kind of problem: how many, and places and reasons of the first ``LIMIT``.

    >>> problems = Problems()
    >>> problems.add("a.jsonl, line 2", " is not valid JSON")
    >>> problems.add("a.jsonl, line 5", " is not valid JSON")
    >>> str(problems)
    'a.jsonl, line 2 is not valid JSON (and so line 5)'
    """

    count: int = 0
    first: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """``reason`` goes on where the place ends: " has no text", ": ..."."""
        self.count += 1
        if self.count <= LIMIT:
            self.first.append((place, reason))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for place, reason in self.first:
            by_reason.setdefault(reason, []).append(place)
        told = [
            f"{first}{reason}" + (f" (and so {_in_brief(first, others)})" if others else "")
            for reason, (first, *others) in by_reason.items()
        ]
        more = self.count - len(self.first)
        return "; ".join(told) + (f"; and {more} more" if more else "")


def _in_brief(first: str, others: list[str]) -> str:
    """Places, each without its file where that is the file of the place before."""
    files = [place.rpartition(", ")[0] for place in (first, *others)]
    return ", ".join(
        place.removeprefix(f"{file}, ") if file == before else place
        for before, file, place in zip(files, files[1:], others, strict=False)
    )


@dataclasses.dataclass
class Findings:
    """What was found so far. Whoever reads adds to it; in the end it is stored beside the windows.

    - files: for each file its name, its kind, and how many rows of which shape it has.
    - samples, tokens, targets: what is trained on; targets before windows cut documents.
    - ignored: how many rows have each field that is not read.
    - bad, long: rows left out, or that end the run.
    - truncated: samples whose end was cut.
    - left_out: files that were found but not read, and why.
    - form: what rendered the instructions and conversations: "template", the model's own, or "plain",
      Alpaca's plain form; "" if there are none.
    - example: the first sample, with its targets marked.
    """

    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: Problems = dataclasses.field(default_factory=Problems)
    long: Problems = dataclasses.field(default_factory=Problems)
    truncated: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)
    form: str = ""
    example: str = ""

    def begin_file(self, name: str, kind: str) -> None:
        self.files.append({"file": name, "kind": kind, "shapes": {}})

    def add_row(self, shape: str, place: str) -> None:
        """Count a row of the last file."""
        file = self.files[-1]
        first = place.removeprefix(f"{file['file']}, ")
        file["shapes"].setdefault(shape, {"rows": 0, "first": first})["rows"] += 1

    def mixed_file(self) -> str | None:
        """What is wrong with a file that holds several shapes; None if there is no such file."""
        for file in self.files:
            if len(file["shapes"]) > 1:
                what = ", ".join(
                    f"{shape} (from {found['first']} on)" for shape, found in file["shapes"].items()
                )
                return f"{file['file']} holds {what}; put rows of one shape in a file of their own"
        return None

    def to_json(self) -> dict[str, Any]:
        # asdict would make a Counter of the pairs that a Counter has.
        return dataclasses.asdict(self) | {"ignored": dict(self.ignored)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Findings":
        problems = {name: _read_problems(**fields[name]) for name in ("bad", "long")}
        return cls(**{**fields, **problems, "ignored": Counter(fields["ignored"])})

    def lines(self) -> list[str]:
        """What a user is told about the data before the first step, in lines."""
        found = [_file_line(file) for file in self.files[:LIMIT]]
        if len(self.files) > LIMIT:
            found.append(f"and {len(self.files) - LIMIT} more files")
        found += [f"left out: {text}" for text in self.left_out]
        samples = f"{self.samples:,} sample{'' if self.samples == 1 else 's'}"
        found.append(f"{samples}, {self.tokens:,} tokens, {self.targets:,} of them targets")
        if self.form:
            found.append(f"rendered {_FORMS[self.form]}")
        if self.ignored:
            ignored = (f"{name} ({count:,})" for name, count in sorted(self.ignored.items()))
            found.append(f"fields not read, with their rows: {', '.join(ignored)}")
        if self.bad:
            found.append(f"{_rows(self.bad.count, 'bad ')} left out: {self.bad}")
        if self.long:
            found.append(f"{_rows(self.long.count)} longer than the context left out: {self.long}")
        if self.truncated:
            ends = "its end" if self.truncated == 1 else "their ends"
            found.append(f"{_rows(self.truncated)} longer than the context cut at {ends}")
        if self.example:
            found.append(f"first sample, targets between ⟦ and ⟧: {self.example}")
        return found


def _read_problems(count: int, first: list[list[str]]) -> Problems:
    return Problems(count, [(place, reason) for place, reason in first])


def _file_line(file: dict[str, Any]) -> str:
    rows = ", ".join(_of_shape(found["rows"], shape) for shape, found in file["shapes"].items())
    return f"{file['file']}: {file['kind']}, {rows or 'no rows'}"


def _of_shape(count: int, shape: str) -> str:
    """One prompt with completion, two prompts with completions."""
    return f"{count:,} " + (re.sub(r"s\b", "", shape) if count == 1 else shape)


def _rows(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}row{'' if count == 1 else 's'}"
