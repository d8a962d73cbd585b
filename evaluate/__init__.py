"""``jsparse evaluate scoreboard``: what sparse caches lose of long-context tasks, method by method."""

from jsparse.serve.quality.answers import greedy_answers as greedy_answers
from jsparse.serve.quality.methods import METHODS as METHODS
from jsparse.serve.quality.methods import Method as Method
from jsparse.serve.quality.report import markdown_table as markdown_table
from jsparse.serve.quality.report import print_scoreboard as print_scoreboard
from jsparse.serve.quality.scoreboard import ScoreboardConfig as ScoreboardConfig
from jsparse.serve.quality.scoreboard import run_scoreboard as run_scoreboard
