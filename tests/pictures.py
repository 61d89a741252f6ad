"""Renew the pictures of README and documentation from the results of `make demo`.

    python tests/pictures.py demo/results

needs chromium and chromedriver.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent))

from report.pages.browser import browser

from perturbjax.core.colours import composite
from perturbjax.dataset import open_dataset
from perturbjax.report.pages.cell_images import draw_outlines, make_renderer

PICTURES = Path(__file__).resolve().parents[1] / "docs/pictures"
#: Picture -> page, element at its top, and height in pixels.
SHOTS = {
    "preview": ("dataset/preview.html", "body", 760),
    "report": ("run/report.html", "body", 430),
    "gallery": ("run/report.html", "#gallery", 760),
}
#: Treatments of the overview, size of their pictures, and space around them in pixels.
TREATMENTS, SIDE, SPACE = ("DMSO", "elongate", "polarize", "coarsen", "toxic"), 128, 14


def main(results: Path) -> None:
    """Take the pictures."""
    with browser() as window:
        for name, (page, element, height) in SHOTS.items():
            window.open(results / page, width=1000, height=height)
            window.run("document.querySelector(arguments[0]).scrollIntoView()", element)
            window.screenshot(PICTURES / f"{name}.png")
    draw_overview(results).save(PICTURES / "overview.png", optimize=True)


def draw_overview(results: Path) -> Image.Image:
    """Draw a test site of some treatments: cells, masks and prediction, above the report."""
    dataset = open_dataset(results / "dataset")
    renderer = make_renderer(dataset)
    table = pd.read_parquet(results / "run/evaluation/predictions.parquet")
    table = table[table["part"] == "test"].set_index("site_id")
    report = Image.open(PICTURES / "report.png").convert("RGB")
    step = SIDE + SPACE
    width, top = report.width, 3 * step + 2 * SPACE
    sheet = Image.new("RGB", (width, top + report.height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype("DejaVuSans.ttf", 15)
    left = 150
    for row, words in enumerate(("cells", "masks", "prediction")):
        pen.text((SPACE, SPACE + row * step + 4), words, "#55616d", font)
    for column, name in enumerate(TREATMENTS):
        own = table[table["label"] == name]
        # Right predictions first, then the most confident.
        confidence = own.filter(like="prob_").max(axis=1) + (own["predicted"] == name)
        site = str(confidence.idxmax())
        image, mask = dataset.pixels(dataset.positions([site])[0])
        plain = composite(image.astype(float), renderer.low, renderer.high)
        x = left + column * (step + 26)
        for row, picture in enumerate((plain, draw_outlines(plain, mask, 0.9))):
            sheet.paste(Image.fromarray(np.asarray(picture)), (x, SPACE + row * step))
        y = SPACE + 2 * step + 4
        predicted = own.loc[site, "predicted"]
        pen.text((x, y), f"{predicted}", "#0072b2" if predicted == name else "#d55e00", font)
        pen.text((x, y + 22), f"given: {name}", "#55616d", font)
        value = own.loc[site, f"prob_{predicted}"]
        pen.text((x, y + 44), f"confidence {value:.2f}", "#55616d", font)
    bottom = SPACE + 2 * step + 84
    sheet.paste(report, (0, bottom))
    return sheet.crop((0, 0, width, bottom + report.height))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
