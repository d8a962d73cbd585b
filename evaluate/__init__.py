"""How good answers are, and how fast: perplexity, passkeys, the scoreboard of caches, published tasks."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.evaluate.answers import greedy_answers as greedy_answers
    from jsparse.evaluate.methods import METHODS as METHODS
    from jsparse.evaluate.methods import Method as Method
    from jsparse.evaluate.passkeys import PasskeyAccuracy as PasskeyAccuracy
    from jsparse.evaluate.passkeys import evaluate_passkeys as evaluate_passkeys
    from jsparse.evaluate.perplexity import Perplexity as Perplexity
    from jsparse.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
    from jsparse.evaluate.perplexity import perplexity_by_context as perplexity_by_context
    from jsparse.evaluate.scoreboard import ScoreboardConfig as ScoreboardConfig
    from jsparse.evaluate.scoreboard import run_scoreboard as run_scoreboard
    from jsparse.evaluate.scoreboard_report import markdown_table as markdown_table
    from jsparse.evaluate.scoreboard_report import print_scoreboard as print_scoreboard
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
