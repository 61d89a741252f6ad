"""Gallery of the cells with the highest attention in each class."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from perturbjax.core.messages import html_text
from perturbjax.core.plates import WELL
from perturbjax.data.cells import crop_windows
from perturbjax.evaluation.cell_attention import read_cell_attention
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.run_results import RunResults, TestPredictions

#: Cells of a class, cells of one site among them, and maximum number of classes.
_CELLS, _CELLS_PER_SITE, _CLASSES = 10, 2, 24


def cell_gallery(results: RunResults, renderer: pictures.Renderer | None) -> str:
    """Return the cells with the highest attention of each class as HTML.

    Attention is compared between sites after multiplication by the number of cells of the site.
    """
    attention, test = read_cell_attention(results.folder), results.test
    if attention is None or test is None or renderer is None or attention.empty:
        return ""
    # Window of a cell in the network input, in stored pixels.
    size = int(results.config["recipe"]["input"]["cell_size"])
    bar = renderer.bar_length(size)
    strips = []
    for label, rows in select_cells(attention, test).items():
        shots = "".join(_shot(results, renderer, test, row, size, bar) for row in rows)
        name = html_text(test.class_names[label])
        strips.append(f'<div class="strip"><p>{name}</p><div class="shots">{shots}</div></div>')
    note = (
        '<p class="note">Cells of test sites with the highest attention of each class. The number '
        "is the attention relative to the mean of the site: 1 if all cells count equally. Frames "
        f"as above. At most {_CELLS_PER_SITE} cells of a site."
        f"{f' White bars are {bar:g} µm long.' if bar else ''}</p>"
    )
    return f'{note}<div class="strips">{"".join(strips)}</div>'


def select_cells(
    attention: pd.DataFrame, test: TestPredictions
) -> dict[int, list[dict[str, object]]]:
    """Select the cells with the highest relative attention of each class.

    Args:
        attention: table of `evaluation.cell_attention`.
        test: test predictions.

    Returns:
        Class number → rows of the table, highest first, with `test`, the row of the site in the
        test predictions.
    """
    numbers = pd.Series(np.arange(len(test.labels)), index=test.table["site_id"].to_numpy())
    table = attention[attention["site_id"].isin(numbers.index)]
    table = table.assign(test=numbers.loc[table["site_id"]].to_numpy())
    table = table.assign(label=test.labels[table["test"]])
    table = table.sort_values("relative", ascending=False, kind="stable")
    table = table[table.groupby("site_id").cumcount() < _CELLS_PER_SITE]
    classes = sorted(table["label"].unique())[:_CLASSES]
    return {
        int(label): table[table["label"] == label].head(_CELLS).to_dict("records")
        for label in classes
    }


def _shot(
    results: RunResults,
    renderer: pictures.Renderer,
    test: TestPredictions,
    row: dict,
    size: int,
    bar: float,
) -> str:
    picture = draw_cell(renderer, results.positions[row["site_id"]], row, size, bar)
    number = row["test"]
    right = bool(test.right[number])
    predicted = test.class_names[test.predicted[number]]
    outcome = "right" if right else f"site predicted as {predicted}"
    return pictures.shot(
        pictures.address(picture),
        f"{row['relative']:.1f}",
        f"cell with attention {row['relative']:.1f}",
        css="right" if right else "wrong",
        tip=f"{row['site_id']}, cell {row['object']}\n"
        f"well {test.table.iloc[number][WELL]}\n{outcome}",
    )


def draw_cell(
    renderer: pictures.Renderer, position: int, cell: dict, size: int, bar: float = 0.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a cell with its outline, in the window that the network receives.

    Args:
        renderer: contrast and dataset.
        position: row of the site in the dataset.
        cell: `object`, `row` and `column` of the cell.
        size: height and width of the window in stored pixels.
        bar: length of the scale bar in micrometers; 0 for none.
    """
    image, mask = renderer.dataset.pixels(position)
    corner = np.rint([[cell["row"], cell["column"]]]).astype(int) - size // 2
    (window,), (labels,) = crop_windows(image, mask, corner, size)
    # Smallest whole factor for which the picture fits.
    step = max(1, -(-size // pictures.SIDE))
    drawn = pictures.composite(
        pictures.downsample_pixels(window, step), renderer.low, renderer.high
    )
    own = np.where(labels == cell["object"], labels, 0).astype(np.uint16)
    outlined = pictures.draw_outlines(drawn, own[::step, ::step])
    return renderer.draw_bar(outlined, bar, step * renderer.dataset.pixel_size(position))
