"""Sphinx's settings; ``make docs`` builds, offline and with warnings as errors."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import draw_gallery  # noqa: E402

project = "jsparse"
author = "the jsparse authors"
copyright = "the jsparse authors, Apache-2.0"
release = importlib.metadata.version("jsparse")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "jsparse"
html_copy_source = False

# Members in the order of the source; a signature of many parameters has one per line.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 90


def setup(app):
    app.connect(
        "builder-inited", lambda app: draw_gallery.draw_all(Path(__file__).parent / "gallery_pictures")
    )
