"""Building blocks of HTML pages: self-contained files with tables, figures and pictures of cells.

Pages are plain HTML and SVG with one style sheet and one script, both inlined (30 KB; plotting
libraries have 1 to 4 MB and draw neither plates nor galleries). They load nothing from a network.
"""

from perturbjax.report.pages.page import (
    CLASS,
    Section,
    data,
    figure,
    page,
    table,
    widget,
    with_tooltip,
)

__all__ = ["CLASS", "Section", "data", "figure", "page", "table", "widget", "with_tooltip"]
