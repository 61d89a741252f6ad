"""The network that comes with the program: nuclei of any size in one channel, with weights of our own training."""

from __future__ import annotations

from typing import Any

from data_prep.segment import Precision
from data_prep.segment.cellpose import Cellpose
from perturbjax.core.errors import InputError

#: Name of the weights.
WEIGHTS = "nuclei_small"
#: Flow error above which an object is dropped, chosen on held-out training images: the package's 0.4 takes objects that
#: are right (average precision at IoU 0.5, 0.75, 0.9: 0.829, 0.667, 0.435 with it, 0.847, 0.660, 0.425 with this).
FLOW_THRESHOLD = 0.8


class Nuclei(Cellpose):
    """The `cellpose` engine with the shipped weights, which look at every site at the scale of its own nuclei."""

    def __init__(self, weights: str = "", diameter: float = 0.0, precision: Precision = "auto"):
        """
        Args:
            weights: must be empty.
            diameter: typical diameter of a nucleus in pixels; 0 finds it in each site.
            precision: what the network computes in; auto is float32.

        Raises:
            InputError: weights were given, or the diameter makes no sense.
        """
        from perturbjax.segmentation.diameter_estimation import AnySize

        if weights:
            raise InputError(
                f"--weights {weights}: --segmenter nuclei has its own; choose --segmenter cellpose"
            )
        super().__init__(WEIGHTS, diameter, precision)
        self.network.rules = self.network.rules._replace(flow_threshold=FLOW_THRESHOLD)
        self.finder = self.network if diameter else AnySize(self.network)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        found = {} if self.network.diameter else {"diameter": "found in each site"}
        return {**described, "engine": "nuclei", "parameters": {**described["parameters"], **found}}

    def doubt(self) -> str:
        """One line where the nuclei found so far do not have the size that was given; else nothing."""
        return super().doubt() if self.network.diameter else ""
