"""Sections of the results pages, which benchmarks write between two marks, and the numbers in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parents[1] / "docs" / "results"
RESULTS = "../../benchmarks/results"  # as the pages see it
END = "<!-- to here -->"


def put_between(text: str, section: str, begin: str, end: str = END) -> str:
    """The text with what stands between the two marks replaced. Sections of other marks may end the same way.

    >>> begin = "<!-- begin -->"
    >>> put_between(f"{END} a {begin} old {END} b", "new", begin) == f"{END} a {begin}\\n\\nnew\\n\\n{END} b"
    True
    """
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended or begin in rest:
        raise ValueError(f"the text must hold {begin!r} and after it {end!r}, once each")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def write_section(page: Path, section: str, begin: str) -> None:
    """Replaces one section of a page. ValueError unless the page has its marks, once each."""
    text = put_between(page.read_text(encoding="utf-8"), section, begin)
    page.write_text(text, encoding="utf-8")


def number(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> number(12345.6), number(12.345), number(0.98765)
    ('12,346', '12.3', '0.988')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(result: Mapping[str, Any]) -> str:
    """A result's ratio: the median, the least and the largest over the rounds.

    >>> ratio({"ratio_median": 0.5, "ratio_min": 0.48, "ratio_max": 0.55})
    '0.5 (0.48 to 0.55)'
    """
    return "{} ({} to {})".format(*(number(result[f"ratio_{name}"]) for name in ("median", "min", "max")))
