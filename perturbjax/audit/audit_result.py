"""Result of an audit as frozen records; terminal, JSON, CSV and page are views of it."""

from __future__ import annotations

from dataclasses import dataclass

from perturbjax.audit.controls import BLIND, REQUIRED, UNTRAINED
from perturbjax.evaluation.bootstrap import Estimate
from perturbjax.evaluation.calibration import Confidence
from perturbjax.evaluation.conclusions import MIN_TEST_WELLS
from perturbjax.evaluation.evaluation_result import EvaluationResult, Level, ModelScores
from perturbjax.evaluation.scores import HEADLINE

#: Reason why a run is audited under its split only.
OTHER_SPLIT = "the network was trained on another split"
#: Fraction of the way from chance to 1 above which the position-only control invalidates a split.
_POSITION_LEAK = 0.5


@dataclass(frozen=True)
class SplitResult:
    """Scores of the audited model and its controls under one split."""

    policy: str
    evaluation: EvaluationResult
    """One model (the audited one) next to every control."""
    p: float | None
    """p-value of the permutation test; None if the test is not possible."""
    no_p: str
    """Reason why there is no p-value; empty if there is one."""
    n_excluded: int
    """Sites without a training site of the same label; they are not evaluated."""

    @property
    def level(self) -> Level:
        """Level of the conclusion: wells if they have several sites, otherwise sites."""
        return self.evaluation.verdict_level

    @property
    def model(self) -> ModelScores:
        """Scores of the audited model at the level of the conclusion."""
        return self.level[self.evaluation.model_names[0]]

    @property
    def confidence(self) -> Confidence:
        """Calibration of the model's probabilities."""
        return self.evaluation.confidence[self.evaluation.model_names[0]]

    @property
    def score(self) -> Estimate:
        """Balanced accuracy of the audited model."""
        return self.model.scores[HEADLINE]

    @property
    def controls(self) -> dict[str, Estimate]:
        """Balanced accuracy of each control."""
        return {row.name: row.scores[HEADLINE] for row in self.level.rows if row.baseline}

    @property
    def chance(self) -> float:
        """Balanced accuracy of guessing with the training frequencies."""
        return self.controls["chance"].value

    @property
    def best_control(self) -> str:
        """The best control that uses technical covariates of the site; the first if several tie."""
        excluded = (*BLIND, UNTRAINED)
        values = {name: one.value for name, one in self.controls.items() if name not in excluded}
        return max(values, key=lambda name: values[name]) if values else "chance"

    @property
    def leaks(self) -> tuple[str, ...]:
        """Reasons why the split gives no valid score: shared "wells", or "position"."""
        if self.evaluation.overlap.well > 0:
            return ("wells",)
        position = self.controls.get("position")
        limit = _POSITION_LEAK * (1 - self.chance)
        return ("position",) if position and position.value - self.chance > limit else ()

    @property
    def uncontrolled(self) -> dict[str, str]:
        """Required controls that could not be computed, and the reason."""
        return {name: why for name, why in self.evaluation.skipped.items() if name in REQUIRED}

    @property
    def too_few_wells(self) -> bool:
        """Whether the test set has fewer wells than a conclusion needs."""
        return self.evaluation.n.well < MIN_TEST_WELLS


@dataclass(frozen=True)
class Difference:
    """Score under a weaker split minus score under a stricter split, on the same sites.

    The unit is that of the conclusion, `SplitResult.level`.
    """

    weaker: str
    stricter: str
    sites: int
    wells: int
    estimate: Estimate


@dataclass(frozen=True)
class AuditResult:
    """The same features under every split that the data allow."""

    source: str
    """Audited file, dataset or run, for messages."""
    label: str
    """Metadata column that is predicted."""
    model: str
    """Name of the classifier, or "model" for the network of a run."""
    splits: tuple[SplitResult, ...]
    """Weakest split first."""
    differences: tuple[Difference, ...]
    """From the weakest split to each stricter one."""
    refused: dict[str, str]
    """Splits that the data do not allow, and the reason."""

    def __getitem__(self, policy: str) -> SplitResult:
        return next(split for split in self.splits if split.policy == policy)

    @property
    def words(self) -> str:
        """Unit of the scores: "by well" or "by site"."""
        return self.strictest.level.words

    @property
    def strictest(self) -> SplitResult:
        """The strictest split of the same treatments (`compound` predicts unseen ones)."""
        same = [split for split in self.splits if split.policy != "compound"]
        return (same or list(self.splits))[-1]

    @property
    def leak(self) -> Difference | None:
        """Difference of the weakest and the strictest split; None if there is only one split."""
        strictest = self.strictest.policy
        return next((one for one in self.differences if one.stricter == strictest), None)
