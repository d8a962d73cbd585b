"""Which held-out loss is best and when patience is spent, against a plain reading of the definition."""

from hypothesis import given
from hypothesis import strategies as st

from jsparse.train.run.evaluations import best_line, is_spent

losses = st.lists(st.none() | st.sampled_from([1.0, 1.5, 2.0]), max_size=8)


def lines_with(losses):
    """Lines of metrics.jsonl, with steps between that have no evaluation."""
    lines = []
    for loss in losses:
        lines += [{"step": len(lines) + 1}, {"step": len(lines) + 2, "eval": {"loss": loss}}]
    return lines


@given(losses)
def test_the_best_line_is_the_first_of_the_lowest(losses):
    finite = [loss for loss in losses if loss is not None]
    best = best_line(lines_with(losses))
    if not finite:
        assert best is None
    else:
        assert best is not None and best["step"] == 2 * losses.index(min(finite)) + 2


@given(losses, st.integers(1, 4))
def test_patience_is_spent_once_so_many_in_a_row_were_not_the_best(losses, patience):
    bests = {(best_line(lines_with(losses[: n + 1])) or {}).get("step") for n in range(len(losses))}
    in_vain = "".join("." if 2 * n + 2 in bests else "x" for n in range(len(losses)))
    assert is_spent(lines_with(losses), patience) == ("x" * patience in in_vain)
    assert not is_spent(lines_with(losses), None)
