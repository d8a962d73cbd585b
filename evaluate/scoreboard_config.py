"""The settings of the scoreboard."""

import dataclasses
from pathlib import Path

from jsparse.evaluate.methods import METHODS
from jsparse.models.options import ModelOptions
from jsparse.texts.tasks import TASKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreboardConfig(ModelOptions):
    """What sparse KV caches lose on tasks that need the whole context, by method and by budget.

    Every method answers the same texts. Their questions are fed to the decode step token by token, where a
    sparse cache chooses what it reads; answers are greedy. A score is the fraction of the expected words in
    an answer as long as the right one, with Wilson's interval at 95 %.

    Quest reads everything in its first two layers, half of a four-layer model.
    """

    pattern: Path | None = None
    """A head pattern (default: full_attention_heads.tsv in the model's folder, if there is one). Without it,
    methods that need a pattern are left out."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """The tasks to ask."""
    methods: tuple[str, ...] = tuple(METHODS)
    """The methods to compare, each a row of the table."""
    budgets: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Tokens that a head reads per step, as fractions of --length; rounded to pages of 64, at least two."""
    length: int | None = None
    """Tokens per text, its answer included; all positions that the model has unless given."""
    samples: int = 12
    """Texts for each task and seed."""
    seeds: int = 3
    """How many seeds; their texts count together, and the JSON file has the score of each."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Needle grid: where the needle is, from 0 to 1."""
    grid_lengths: tuple[int, ...] | None = None
    """Needle grid: tokens per text; a quarter of --length, half, and all of it unless given."""
    grid_methods: tuple[str, ...] = ("dense", "streaming", "random", "lserve")
    """Needle grid: the methods; each answers every text of the grid. Give none to leave the grid out."""
    grid_budget: float = 1 / 8
    """Needle grid: the budget at all its lengths, as a fraction of --length."""
    grid_samples: int = 12
    """Needle grid: texts for each length and depth."""
    haystack: tuple[Path, ...] = ()
    """UTF-8 text files that the tasks are hidden in (default: the modules of Python's standard library that
    jsparse holds out of training)."""
    batch_size: int = 12
    """Texts per batch; best a divisor of --samples times --seeds."""
    seed: int = 0
    """The first seed."""
    json: Path | None = None
    """Write the scores to this file: a list of objects; "-" is stdout, without the tables."""
    output: Path | None = None
    """A folder for scoreboard.md and figures (needs the extra plot)."""

    def __post_init__(self):
        for name, known in (("tasks", TASKS), ("methods", METHODS), ("grid_methods", METHODS)):
            given = getattr(self, name)
            wrong = [one for one in given if one not in known]
            if wrong:
                raise ValueError(f"{name} must be of {', '.join(known)}, not {wrong[0]!r}")
        for name in ("tasks", "methods", "budgets", "depths", "grid_methods", "grid_lengths"):
            given = getattr(self, name) or ()
            if len(set(given)) < len(given):
                raise ValueError(f"{name} must name each once, not {', '.join(map(str, given))}")
        for name in ("tasks", "methods", "budgets", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for budget in (*self.budgets, self.grid_budget):
            if not 0 < budget < 1:
                raise ValueError(f"budgets must be fractions of --length between 0 and 1, not {budget}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths must be from 0 to 1, not {depth}")
        for name in ("samples", "seeds", "grid_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
