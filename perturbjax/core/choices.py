"""Split policies, normalizations and mask encodings: one record per choice, in one table per
option.

A record holds everything that the program knows about a choice: text for `--help`, the computation,
the wording of reports, and the facts that training, export and audit need. Adding a choice means
adding one record here.

The command line reads this module for `--help`. Heavy packages are not imported at module
level: the functions of the records import numpy, pandas and scipy when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame, Series

    class IntensityStatistics(Protocol):
        """Statistics of n sites and c channels, in stored units; computed on first use.

        Those of images and plates exist only for normalizations that declare them in `depends_on`.
        """

        dtype_maximum: int
        """Maximum of the stored integer type."""
        zeros: ndarray
        """(n, c)"""
        background: ndarray
        """(c,) from the training data: median over sites of the 1st percentile, at least 1."""
        site_mean: ndarray
        """(n, c); `site_std` likewise."""
        site_std: ndarray
        plate_mean: ndarray
        """(n, c) over all pixels of the plate of each site; `plate_std` likewise."""
        plate_std: ndarray
else:  # types only
    ndarray = DataFrame = Series = IntensityStatistics = Any


@dataclass(frozen=True)
class Choice:
    """One value of an option.

    Attributes:
        help: description for `--help`: a phrase without a period.
    """

    help: str


# Train/test splits


def _always_available(index: DataFrame, label: str) -> str:
    return ""


@dataclass(frozen=True)
class SplitChoice(Choice):
    """A split policy: the groups of sites that are assigned to train or test as a whole.

    Attributes:
        groups: index (n rows) -> (n,) group names as text.
        meaning: consequence for the score, for messages and reports.
        test_set: the test sites in one phrase, for conclusions ("on held-out plates").
        tests_known_treatments: True if the treatments of test sites also occur in training. The
            audit compares these policies with each other, in table order from weak to strict.
        unavailable: (index, label column) -> reason why the data does not allow this split; empty
            if it does. Raises InputError if a column is missing.
    """

    groups: Callable[[DataFrame], Series]
    meaning: str
    test_set: str
    tests_known_treatments: bool = True
    unavailable: Callable[[DataFrame, str], str] = _always_available


def _wells(index: DataFrame) -> Series:
    return _plates(index) + "_" + index["Metadata_Well"].astype(str)


def _plates(index: DataFrame) -> Series:
    return index["Metadata_Plate"].astype(str)


def _layouts(index: DataFrame) -> Series:
    from perturbjax.core.plates import plate_layouts

    return _plates(index).map(plate_layouts(index))


def _compounds(index: DataFrame) -> Series:
    from perturbjax.core.plates import compound_column

    return index[compound_column(index)].astype(str)


def _site_unavailable(index: DataFrame, label: str) -> str:
    if index.duplicated(["Metadata_Plate", "Metadata_Well"]).any():
        return ""
    return "every well has one site, so it equals the split by well"


def _plate_unavailable(index: DataFrame, label: str) -> str:
    if _plates(index).nunique() > 1:
        return ""
    return "there is only one plate; this split needs the same treatments on at least two plates"


def _layout_unavailable(index: DataFrame, label: str) -> str:
    if reason := _plate_unavailable(index, label):
        return reason
    plates, layouts = _plates(index).nunique(), _layouts(index).nunique()
    if layouts == 1:
        return (
            f"all {plates} plates share one layout; this split needs the same treatments in "
            "different wells on "
            "different plates"
        )
    if layouts == plates:
        return "every plate has its own layout, so it equals the split by plate"
    return ""


def _compound_unavailable(index: DataFrame, label: str) -> str:
    if (_compounds(index).groupby(index[label]).nunique() < 2).all():
        return "every class is one compound, so the class of a held-out compound cannot be learned"
    return ""


#: From weak to strict.
SPLIT_POLICIES: dict[str, SplitChoice] = {
    "site": SplitChoice(
        help="single sites; sites of one well occur in train and test (protocol of the paper)",
        groups=lambda index: index["site_id"],
        meaning="sites of one well occur in train and test, so the score measures recognition "
        "of wells, not of treatments",
        test_set="on held-out sites of wells used for training",
        unavailable=_site_unavailable,
    ),
    "well": SplitChoice(
        help="all sites of a well",
        groups=_wells,
        meaning="wells are not divided; sites of one plate occur in train and test",
        test_set="on held-out wells of the training plates",
    ),
    "plate": SplitChoice(
        help="all sites of a plate",
        groups=_plates,
        meaning="plates are not divided; plates with the same layout can occur in train and test",
        test_set="on held-out plates",
        unavailable=_plate_unavailable,
    ),
    "layout": SplitChoice(
        help="all plates with the same plate map",
        groups=_layouts,
        meaning="plates with the same layout are not divided, so well position does not predict "
        "the treatment",
        test_set="on plates with held-out layouts",
        unavailable=_layout_unavailable,
    ),
    "compound": SplitChoice(
        help="all sites of a compound",
        groups=_compounds,
        meaning="compounds are not divided: every test compound is new to the model",
        test_set="on held-out compounds",
        tests_known_treatments=False,
        unavailable=_compound_unavailable,
    ),
}


# Normalization of intensities


@dataclass(frozen=True)
class NormalizationChoice(Choice):
    """A normalization: (x - shift) * scale, then optionally log(1 + x), for each site and channel.

    Attributes:
        shift_scale: statistics -> shift and scale, each (n, copies * c).
        depends_on: source of the statistics besides the run. "run": none, shift and scale
            are the same for all images. "image": the same image. "plate": all images of its
            plate. Training, prediction and export obey it, and statistics that are not declared
            here cannot be read.
        uses_background: True if the run stores the background of each channel.
        log: True if log(1 + x) follows.
        copies: number of differently normalized copies of each channel in the network input.
        inputs: definition of the inputs `shift` and `scale` of an exported network. Required unless
            `depends_on` is "run": then export stores shift and scale as constants.
    """

    shift_scale: Callable[[Any], tuple[ndarray, ndarray]]
    depends_on: Literal["run", "image", "plate"]
    uses_background: bool = False
    log: bool = False
    copies: int = 1
    inputs: str = ""

    def __post_init__(self) -> None:
        if bool(self.inputs) == (self.depends_on == "run"):
            raise ValueError("`inputs` is required if and only if statistics depend on images")

    @property
    def uses_plates(self) -> bool:
        """Whether the input of a site depends on other sites of its plate."""
        return self.depends_on == "plate"


def _by_dtype(statistics: IntensityStatistics) -> tuple[ndarray, ndarray]:
    return statistics.zeros, statistics.zeros + 1 / statistics.dtype_maximum


def _relative_to_background(
    statistics: IntensityStatistics, *shifts: ndarray
) -> tuple[ndarray, ndarray]:
    """log(1 + (x - shift) / (shift + background)) = log((x + background) / (shift +
    background))."""
    import numpy as np

    shift = np.concatenate(shifts, axis=1).astype(np.float32)
    return shift, 1 / (shift + np.tile(statistics.background, len(shifts)))


def _standardized(mean: ndarray, std: ndarray) -> tuple[ndarray, ndarray]:
    """Mean 0 and standard deviation 1; a channel with constant values is only shifted."""
    import numpy as np

    return mean, 1 / np.where(std > 0, std, 1)


NORMALIZATIONS: dict[str, NormalizationChoice] = {
    "dtype": NormalizationChoice(
        help="divide by the maximum of the integer type (as the original program)",
        shift_scale=_by_dtype,
        depends_on="run",
    ),
    "log": NormalizationChoice(
        help="log(1 + value / background of the channel)",
        shift_scale=lambda s: _relative_to_background(s, s.zeros),
        depends_on="run",
        uses_background=True,
        log=True,
    ),
    "log_plate": NormalizationChoice(
        help="log, plus each channel relative to its plate mean",
        shift_scale=lambda s: _relative_to_background(s, s.zeros, s.plate_mean),
        depends_on="plate",
        uses_background=True,
        log=True,
        copies=2,
        inputs="shift: zeros, then the mean of each channel over all images of the plate; "
        "scale: 1 / (shift + background)",
    ),
    "site": NormalizationChoice(
        help="mean 0 and standard deviation 1 for each site and channel",
        shift_scale=lambda s: _standardized(s.site_mean, s.site_std),
        depends_on="image",
        inputs="shift: mean of each channel over the image; "
        "scale: 1 / its standard deviation, or 1 where that is 0",
    ),
    "plate": NormalizationChoice(
        help="mean 0 and standard deviation 1 for each plate and channel",
        shift_scale=lambda s: _standardized(s.plate_mean, s.plate_std),
        depends_on="plate",
        inputs="shift: mean of each channel over all images of the plate; "
        "scale: 1 / its standard deviation, or 1 where that is 0",
    ),
}


# Encoding of masks


@dataclass(frozen=True)
class MaskEncodingChoice(Choice):
    """A mask encoding: instance labels (0 is background) -> mask channel of the network input.

    Attributes:
        encode: (H, W) uint16 instance labels -> (H, W) integers, stored as `dtype`.
        stored: definition of the encoded pixels, for the description of an exported network.
        dtype: integer type of the encoded mask.
        scale: factor from the stored integers to the mask channel.
    """

    encode: Callable[[ndarray], ndarray]
    stored: str
    dtype: Literal["uint8", "uint16"] = "uint8"
    scale: float = 1.0


def _outline(mask: ndarray) -> ndarray:
    """Mark the pixels of each cell that have a pixel of another label above, below, left or
    right."""
    # Labels are not negative, so this mask is False everywhere.
    outline = mask < 0
    # Compare vertical and horizontal neighbors; where labels differ, both pixels are outlines.
    down = mask[1:] != mask[:-1]
    right = mask[:, 1:] != mask[:, :-1]
    outline[1:] |= down
    outline[:-1] |= down
    outline[:, 1:] |= right
    outline[:, :-1] |= right
    return outline & (mask > 0)


def _relative_depth(mask: ndarray) -> ndarray:
    """Compute the depth of each pixel in its cell, relative to the deepest pixel of the cell (255).

    The site border does not count as an outline: a cell cut by it continues outside the image.
    """
    import numpy as np
    from scipy import ndimage

    outline = _outline(mask)
    if not outline.any():  # no cell, or one cell that fills the site
        return np.where(mask > 0, 255, 0)
    # One distance transform serves all cells: a path to another cell crosses the outline of the own
    # cell first.
    depth = (ndimage.distance_transform_edt(~outline) + 1) * (mask > 0)
    # Labels can have gaps; `position` numbers the cells without gaps.
    cells, position = np.unique(mask, return_inverse=True)
    deepest = ndimage.maximum(depth, position, np.arange(len(cells)))
    # The background has depth 0; dividing by 1 avoids 0 / 0.
    deepest[cells == 0] = 1
    return np.rint(255 * depth / deepest[position])


MASK_ENCODINGS: dict[str, MaskEncodingChoice] = {
    "instance": MaskEncodingChoice(
        help="instance labels (as the original program)",
        encode=lambda mask: mask,
        stored="the label of the cell at each pixel, 0 for background",
        dtype="uint16",
    ),
    "binary": MaskEncodingChoice(
        help="1 in cells, 0 in the background",
        encode=lambda mask: mask > 0,
        stored="1 in cells, 0 for background",
    ),
    "boundary": MaskEncodingChoice(
        help="1 on the outlines of cells",
        encode=_outline,
        stored="1 on the outermost pixels of each cell, also between touching cells",
    ),
    "distance": MaskEncodingChoice(
        help="relative distance to the outline of the cell",
        encode=_relative_depth,
        stored="in cells, the distance to the outline divided by its maximum in the cell, in 1/255",
        scale=1 / 255,
    ),
}


def describe_options() -> dict[str, dict[str, str]]:
    """Return the choices of each option with their descriptions: field -> name -> text."""
    tables: dict[str, Mapping[str, Choice]] = {
        "split": SPLIT_POLICIES,
        "normalize": NORMALIZATIONS,
        "mask_encoding": MASK_ENCODINGS,
    }
    return {
        field: {name: choice.help for name, choice in table.items()}
        for field, table in tables.items()
    }
