"""Pictures of treated wells next to control wells, for the pages of the screening commands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.dataset import Dataset
from perturbjax.report.gallery import BUDGET
from perturbjax.report.pages import cell_images as pictures
from perturbjax.screening.similarity import relative_to_controls
from perturbjax.screening.wells import Wells

#: Pictures of treated wells, and of control wells, per treatment.
PICTURES = 4
#: Maximum number of treatments whose pictures can be enlarged.
ENLARGED = 30


class WellImages:
    """Draws wells of a screen; the size of the page is limited.

    Args:
        dataset: the images.
        wells: the wells of the screen.
    """

    def __init__(self, dataset: Dataset, wells: Wells):
        self.wells, self.renderer = wells, pictures.make_renderer(dataset)
        # Enlarged pictures of many treatments would exceed the size of the page.
        self._enlarges = wells.treatment[~wells.control].nunique() <= ENLARGED
        self._values = relative_to_controls(wells)
        self._sites: dict[tuple[str, str], int] = {}
        for position, key in enumerate(
            zip(dataset.index[PLATE].astype(str), dataset.index[WELL].astype(str), strict=True)
        ):
            self._sites.setdefault(key, position)
        names = zip(wells.metadata[PLATE], wells.metadata[WELL], strict=True)
        # Dataset row of the first site of each well; -1 without images.
        self._position = np.array([self._sites.get(key, -1) for key in names])
        self._images: dict[int, pictures.ShotImages] = {}
        self._remaining = self.renderer.affordable(10_000)
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether the limit of bytes or of decoded sites is reached."""
        return self._bytes >= BUDGET or self._remaining <= 0

    def typical(self, rows: Int[np.ndarray, " k"], count: int = PICTURES) -> list[int]:
        """Select wells with images, closest to the median profile of the rows.

        Args:
            rows: wells of one treatment.
            count: maximum number of wells.
        """
        if not len(rows):
            return []
        values = self._values[rows]
        distance = np.linalg.norm(values - np.median(values, axis=0), axis=1)
        ordered = rows[np.argsort(distance, kind="stable")]
        return [int(row) for row in ordered if self._position[row] >= 0][:count]

    def controls(self, rows: Int[np.ndarray, " k"], count: int = PICTURES) -> list[int]:
        """Select typical control wells on the plates of the rows."""
        plates = self.wells.plates
        return self.typical(
            np.flatnonzero(self.wells.control & np.isin(plates, plates[rows])), count
        )

    def strip(self, title: str, rows: Sequence[int], css: str = "") -> str:
        """Pictures of wells in a row with a title as HTML; empty without wells."""
        if not rows:
            return ""
        shots = "".join(self._shot(row, css) for row in rows)
        return f'<div class="strip"><p>{html_text(title)}</p><div class="shots">{shots}</div></div>'

    def comparison(self, treatment: str, count: int = PICTURES) -> str:
        """Typical treated wells next to typical control wells as HTML.

        Args:
            treatment: name of the treatment.
            count: maximum number of wells of a kind.
        """
        rows = np.flatnonzero((self.wells.treatment == treatment).to_numpy() & ~self.wells.control)
        treated = self.strip("treated", self.typical(rows, count), "right")
        control = self.strip("negative controls of the same plates", self.controls(rows, count))
        return f'<div class="strips">{treated}{control}</div>' if treated else ""

    def legend(self) -> str:
        """Colors of the channels and the contrast, as HTML."""
        return self.renderer.legend(enlarges=self._enlarges)

    def _draw(self, position: int) -> pictures.ShotImages:
        if self._enlarges:
            return self.renderer.shot_images(position)
        return pictures.ShotImages(pictures.address(self.renderer.picture(position)))

    def _shot(self, row: int, css: str) -> str:
        position = int(self._position[row])
        if position not in self._images:
            self._images[position] = self._draw(position)
            self._remaining -= 1
        images = self._images[position]
        # Counted for every use, because the page repeats the bytes of a picture.
        self._bytes += len(images.picture) + len(images.layers)
        plate, well = (str(self.wells.metadata[name].iloc[row]) for name in (PLATE, WELL))
        treatment = str(self.wells.treatment.iloc[row])
        return pictures.shot(
            images,
            well,
            f"cells of {treatment}, plate {plate}, well {well}",
            css=css,
            tip=f"{treatment}\nplate {plate}, well {well}",
        )
