"""What every page of ours is made of: one self-contained file, its tables and figures, and pictures of cells.

Pages are plain HTML and SVG with one style and one small script, both inlined (30 KB; a plotting library is 1 to 4 MB
and draws neither plates nor galleries). They ask nothing of a network, and say so to the browser.
"""

from perturbjax.report.pages.page import (
    CLASS,
    Section,
    data,
    defined,
    figure,
    image,
    page,
    table,
    widget,
)

__all__ = ["CLASS", "Section", "data", "defined", "figure", "image", "page", "table", "widget"]
